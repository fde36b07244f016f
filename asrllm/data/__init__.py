"""Data: sources, shards and their index, and the batch plan."""
