"""From ZeRO checkpoints to weights: consolidate, average, choose."""
