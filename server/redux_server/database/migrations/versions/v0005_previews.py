"""What holds the last preview of a task that is worked on."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the table of previews, on PostgreSQL without a log: to lose one is nothing."""
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    op.create_table(
        "previews",
        sa.Column("task_id", sa.String(32), primary_key=True),
        sa.Column("attempt", sa.Integer),
        sa.Column("step", sa.Integer),
        sa.Column("image", sa.Integer),
        sa.Column("jpeg", sa.LargeBinary),
        sa.Column("made_at", sa.Float, nullable=False),
        prefixes=["UNLOGGED"] if is_postgresql else [],
    )
