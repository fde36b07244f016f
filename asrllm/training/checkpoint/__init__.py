"""Checkpoints of a run: writing, verifying, and resuming from them."""
