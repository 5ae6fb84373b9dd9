"""From a prompt to ranked adapters."""
