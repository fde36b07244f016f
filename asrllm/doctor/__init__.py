"""Checks of a machine before a training run. A check is a function that returns findings."""
