"""Imports of the large libraries, with their settings."""

import os


def import_torch() -> None:
    """Import torch, and choose the accelerator of DeepSpeed."""
    import torch

    if not torch.accelerator.is_available():  # otherwise DeepSpeed warns that it found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def import_transformers() -> None:
    """Import torch and transformers."""
    import_torch()
    import transformers

    transformers.utils.logging.disable_progress_bar()  # the verbs show their own bars
