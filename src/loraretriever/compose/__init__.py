"""From ranked adapters to a composition."""
