"""Decoding test sets and scoring what was decoded."""
