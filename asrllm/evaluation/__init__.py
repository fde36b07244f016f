"""Decode test sets, and score and report the results."""
