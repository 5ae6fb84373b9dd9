"""The log of changes, counter samples, feedback, tenants, the pool's encoder."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add columns and tables; what is in the pool stays as it is."""
    op.add_column("pool", sa.Column("encoder", sa.String(1024)))
    op.add_column("adapters", sa.Column("tenant", sa.String(128)))
    op.add_column("samples", sa.Column("counter", sa.Boolean, nullable=False, server_default=sa.false()))
    op.create_index("adapters_by_digest", "adapters", ["digest"])
    op.create_table(
        "changes",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("change", sa.Integer, nullable=False),
        sa.Column("adapter", sa.String(128)),
    )
    op.create_index("ix_changes_change", "changes", ["change"])
    op.create_table(
        "encoders",
        sa.Column("tag", sa.String(512), primary_key=True, nullable=False),
        sa.Column("stored", sa.Integer, nullable=False),
    )
    if op.get_bind().dialect.name == "sqlite":  # which numbers the rows in the order they were inserted
        op.execute("INSERT INTO encoders (tag, stored) SELECT encoder, max(rowid) FROM embeddings GROUP BY encoder")
    op.create_table(
        "feedback",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("prompt", sa.Text, nullable=False),
        sa.Column("right", sa.String(128)),
        sa.Column("wrong", sa.String(128)),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("created", sa.DateTime, nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_feedback_state", "feedback", ["state"])


def downgrade() -> None:
    """Drop what was added; counter samples would count as samples, so they go."""
    for table in ("feedback", "encoders", "changes"):
        op.drop_table(table)
    op.execute("DELETE FROM embeddings WHERE sample_id IN (SELECT id FROM samples WHERE counter)")
    op.execute("DELETE FROM samples WHERE counter")
    op.drop_index("adapters_by_digest", "adapters")
    for table, column in (("samples", "counter"), ("adapters", "tenant"), ("pool", "encoder")):
        op.drop_column(table, column)
