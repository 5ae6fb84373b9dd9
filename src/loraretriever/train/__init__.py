"""Training of adapters (and later of retrievers)."""
