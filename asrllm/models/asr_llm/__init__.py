"""Hugging Face classes of the model: configuration, network, processor, generation and files."""
