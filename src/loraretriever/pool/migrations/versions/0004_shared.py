"""Where a shared pool keeps its adapters' files; names ordered by their bytes; PostgreSQL notifies of changes."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# The number is sent when the transaction commits, and only then. Not by the program: earlier versions notify too.
_NOTIFY = """
CREATE FUNCTION loraretriever_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_notify('loraretriever_change', NEW.change::text);
    RETURN NULL;
END
$$
"""
_TRIGGER = """
CREATE TRIGGER loraretriever_notify AFTER UPDATE OF change ON pool
FOR EACH ROW EXECUTE FUNCTION loraretriever_notify()
"""


def upgrade() -> None:
    """Add a column; what is in the pool stays as it is."""
    op.add_column("pool", sa.Column("storage", sa.String(1024)))
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("adapters", "name", type_=sa.String(256, collation="C"), existing_type=sa.String(256))
        op.execute(_NOTIFY)
        op.execute(_TRIGGER)


def downgrade() -> None:
    """Drop what was added."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP TRIGGER loraretriever_notify ON pool")
        op.execute("DROP FUNCTION loraretriever_notify")
        op.alter_column("adapters", "name", type_=sa.String(256), existing_type=sa.String(256, collation="C"))
    op.drop_column("pool", "storage")
