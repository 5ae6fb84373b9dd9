"""Alembic's environment and revisions for a pool's database; `database.py` runs them when a pool is opened."""
