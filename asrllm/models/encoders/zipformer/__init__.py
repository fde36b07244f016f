"""The Zipformer encoder in PyTorch."""
