"""Hydra's configuration tree: every key, its default and what it does."""
