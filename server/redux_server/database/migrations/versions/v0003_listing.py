"""What lists a key's tasks, newest first."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add an index to tasks."""
    op.create_index("tasks_listed", "tasks", ["key_id", "created_at", "id", "status"])
