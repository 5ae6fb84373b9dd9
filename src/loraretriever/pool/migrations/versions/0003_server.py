"""API keys, jobs, content of removed adapters, and names with their tenant before them."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_NAMES = {"adapters": ("name",), "changes": ("adapter",), "feedback": ("right", "wrong")}


def upgrade() -> None:
    """Add tables and columns; what is in the pool stays as it is."""
    _set_length(128, 256)
    op.add_column("changes", sa.Column("tenant", sa.String(128)))
    op.create_index("adapters_by_tenant", "adapters", ["tenant"])
    op.create_table(
        "removed",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("expires", sa.DateTime, nullable=False),
    )
    op.create_index("ix_removed_digest", "removed", ["digest"])
    op.create_index("ix_removed_expires", "removed", ["expires"])
    op.create_table(
        "keys",
        sa.Column("id", sa.String(16), primary_key=True, nullable=False),
        sa.Column("label", sa.String(128), nullable=False),
        sa.Column("secret", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("tenant", sa.String(128)),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("expires", sa.DateTime),
        sa.Column("revoked", sa.DateTime),
        sa.Column("requests_per_minute", sa.Integer),
        sa.Column("tokens_per_minute", sa.Integer),
        sa.Column("max_tokens", sa.Integer),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(32), primary_key=True, nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(128)),
        sa.Column("subject", sa.String(256), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("progress", sa.Float, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("result", sa.JSON),
        sa.Column("error", sa.Text),
        sa.Column("code", sa.String(64)),
        sa.Column("created", sa.DateTime, nullable=False),
        sa.Column("updated", sa.DateTime, nullable=False),
        sa.Column("heartbeat", sa.DateTime, nullable=False),
    )
    op.create_index("ix_jobs_created", "jobs", ["created"])


def downgrade() -> None:
    """Drop what was added. Names that an earlier version would refuse stay; content of removed adapters is swept."""
    for table in ("jobs", "keys", "removed"):
        op.drop_table(table)
    op.drop_index("adapters_by_tenant", "adapters")
    op.drop_column("changes", "tenant")
    _set_length(256, 128)


def _set_length(old: int, new: int) -> None:
    if op.get_bind().dialect.name != "sqlite":
        for table, columns in _NAMES.items():
            for column in columns:
                op.alter_column(table, column, type_=sa.String(new), existing_type=sa.String(old))
        return
    # SQLite cannot change a column: the table is made anew, and its sequence of ids goes on. `Database.migrate`
    # has foreign keys off meanwhile, or samples would go with the adapters' old table.
    connection = op.get_bind()
    for table, columns in _NAMES.items():
        is_numbered = table != "changes"
        query = sa.text("SELECT seq FROM sqlite_sequence WHERE name = :table")
        last = connection.execute(query, {"table": table}).scalar() if is_numbered else None
        options = {"sqlite_autoincrement": is_numbered}
        with op.batch_alter_table(table, recreate="always", table_kwargs=options) as batch:
            for column in columns:
                batch.alter_column(column, type_=sa.String(new), existing_type=sa.String(old))
        if last is not None:
            connection.execute(sa.text("DELETE FROM sqlite_sequence WHERE name = :table"), {"table": table})
            values = {"table": table, "last": last}
            connection.execute(sa.text("INSERT INTO sqlite_sequence (name, seq) VALUES (:table, :last)"), values)
