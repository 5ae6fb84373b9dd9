"""Capacity planning: a deployment is simulated, event by event, with the engine's own scheduler and bookkeeping."""
