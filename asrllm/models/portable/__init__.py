"""Classes with which transformers loads a saved model, in an environment without this package.

`asrllm.models.portable.bundle` copies them, and what they use, into the files of a saved directory.
"""
