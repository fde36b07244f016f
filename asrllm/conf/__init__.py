"""The Hydra configuration: a YAML file per verb, a directory per group, a comment per key.

Its modules write these files and pages of the documentation. Nothing in asrllm imports them.
"""
