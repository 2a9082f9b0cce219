"""Room for what each API key has had, in seconds and in uploads."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add a column to tasks, two tables and a column to an index; nothing is charged yet."""
    op.add_column("tasks", sa.Column("charged_s", sa.Float, nullable=False, server_default="0"))
    op.create_table(
        "usage",
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("seconds", sa.Float, nullable=False, server_default="0"),
        sa.Column("typical_s", sa.Float, nullable=False, server_default="1"),
    )
    op.execute(
        "INSERT INTO usage (key_id) SELECT DISTINCT key_id FROM tasks WHERE finished_at IS NULL"
    )
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("blob", sa.String(128), nullable=False),
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
        sa.Column("stored_at", sa.Float),
    )
    op.create_index("uploads_listed", "uploads", ["key_id", "created_at", "id", "size_bytes"])
    op.create_index("uploads_expires", "uploads", ["expires_at"])
    op.drop_index("tasks_open", "tasks")
    is_open = sa.text("finished_at IS NULL")
    op.create_index(
        "tasks_open",
        "tasks",
        ["key_id", "finished_at"],
        sqlite_where=is_open,
        postgresql_where=is_open,
    )
