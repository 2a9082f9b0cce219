"""What workers run, and for which of them a task was accepted."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add columns to tasks and workers, and an index over the waiting tasks."""
    for table, name, length in (
        ("tasks", "fingerprint", 64),
        ("workers", "model", 128),
        ("workers", "fingerprint", 64),
    ):
        kind = sa.String(length)
        op.add_column(table, sa.Column(name, kind, nullable=False, server_default=""))
    where = sa.text("queued_at IS NOT NULL")
    op.create_index(
        "tasks_bound", "tasks", ["fingerprint"], sqlite_where=where, postgresql_where=where
    )
