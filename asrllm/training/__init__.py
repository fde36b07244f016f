"""The DeepSpeed engine, the training loop, its callbacks, and checkpoints."""
