"""First tables."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create all tables."""
    op.create_table(
        "pool",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("base_model", sa.String(1024), nullable=False),
        sa.Column("check_base", sa.Boolean, nullable=False),
        sa.Column("spec", sa.JSON),
        sa.Column("change", sa.Integer, nullable=False),
        sa.CheckConstraint("id = 1", name="single_pool"),
    )
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("current", sa.Boolean, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("base_model", sa.String(1024), nullable=False),
        sa.Column("base_mismatch", sa.Boolean, nullable=False),
        sa.Column("checked_shapes", sa.Boolean, nullable=False),
        sa.Column("enabled", sa.Boolean, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("tags", sa.JSON, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("ranks", sa.JSON, nullable=False),
        sa.Column("targets", sa.JSON, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("stamp", sa.JSON),
        sa.UniqueConstraint("name", "revision", name="one_row_per_revision"),
        sqlite_autoincrement=True,
    )
    current = sa.text("current")
    op.create_index(
        "one_current_revision", "adapters", ["name"], unique=True, sqlite_where=current, postgresql_where=current
    )
    op.create_table(
        "samples",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id", ondelete="CASCADE"), nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("source", sa.String(32), nullable=False),
        sa.UniqueConstraint("adapter_id", "position", name="one_sample_per_position"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "embeddings",
        sa.Column(
            "sample_id", sa.Integer, sa.ForeignKey("samples.id", ondelete="CASCADE"), primary_key=True, nullable=False
        ),
        sa.Column("encoder", sa.String(512), primary_key=True, nullable=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
    )


def downgrade() -> None:
    """Drop all tables."""
    for table in ("embeddings", "samples", "adapters", "pool"):
        op.drop_table(table)
