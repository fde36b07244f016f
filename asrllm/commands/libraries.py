"""Imports of the large libraries, with their settings."""

import contextlib
import gc
import os
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Do not look for garbage in the block.

    Imports make a million objects, nearly all of which stay. Python would search them again each
    time their number has grown by a quarter: 1.2 of the 6.5 s in which a training run is imported.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


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
