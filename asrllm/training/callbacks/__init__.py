"""Optional behaviour around the training loop, one callback per file."""
