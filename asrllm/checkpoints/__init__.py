"""Turn ZeRO checkpoints into weights: consolidate, average, merge, export."""
