"""The DeepSpeed engine, the loop, its hooks, and checkpoints."""
