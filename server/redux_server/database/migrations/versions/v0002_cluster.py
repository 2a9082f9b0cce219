"""Room for priorities, cancelling, idempotency keys, webhooks, and duties shared by API nodes."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add columns to tasks and keys, what a fair claim reads, and three tables."""
    for column in (
        sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
        sa.Column("shape", sa.String(64), nullable=False, server_default=""),
        sa.Column("not_before", sa.Float),
        sa.Column("cancel_requested_at", sa.Float),
        sa.Column("webhook_url", sa.Text),
    ):
        op.add_column("tasks", column)
    op.add_column("keys", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    _index_tasks()
    op.create_table(
        "idempotency",
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("task_id", sa.String(32), nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
    )
    op.create_index("idempotency_created", "idempotency", ["created_at"])
    op.create_table(
        "webhooks",
        sa.Column("task_id", sa.String(32), primary_key=True),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("next_at", sa.Float),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("delivered_at", sa.Float),
        sa.Column("error", sa.Text, nullable=False),
    )
    op.create_index("webhooks_next", "webhooks", ["next_at"])
    op.create_table(
        "duties",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("done_at", sa.Float, nullable=False),
    )


def _index_tasks() -> None:
    op.create_index("tasks_delayed", "tasks", ["not_before"])
    op.create_index("tasks_started", "tasks", ["key_id", "started_at"])
    for name, columns, condition in (
        ("tasks_ready", ["priority", "key_id", "queued_at"], "queued_at IS NOT NULL"),
        ("tasks_alike", ["shape", "priority", "key_id", "queued_at"], "queued_at IS NOT NULL"),
        ("tasks_running", ["key_id"], "lease_until IS NOT NULL"),
        ("tasks_open", ["key_id"], "finished_at IS NULL"),
    ):
        where = sa.text(condition)
        op.create_index(name, "tasks", columns, sqlite_where=where, postgresql_where=where)
