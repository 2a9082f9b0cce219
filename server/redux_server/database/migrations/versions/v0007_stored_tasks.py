"""Room for what the tasks of each API key store."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add two columns and a table; tasks that are there count nothing until they are deleted."""
    for name in ("stored_bytes", "output_bytes"):
        column = sa.Column(name, sa.BigInteger, nullable=False, server_default="0")
        op.add_column("tasks", column)
    op.create_table(
        "stored",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
    )
    op.create_index("stored_by_key", "stored", ["key_id", "size_bytes"])
