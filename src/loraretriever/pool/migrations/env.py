"""Run by Alembic: applies revisions over the connection that `database.py` passes."""

from alembic import context

from loraretriever.pool.schema import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()
