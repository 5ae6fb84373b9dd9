"""Many compositions in one forward pass."""
