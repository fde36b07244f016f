"""asrllm: train a large language model to hear."""

import gc

__version__ = "0.1.0"

collecting = gc.isenabled()
gc.disable()  # what libraries define stays: looking through it again and again is a fifth of the import's time
try:
    from asrllm.models.auto import AutoModel
    from asrllm.models.configuration import AsrLlmConfig
    from asrllm.models.model import AsrLlmModel
    from asrllm.models.processor import AsrLlmProcessor
finally:
    if collecting:
        gc.enable()
    del collecting

__all__ = ["AsrLlmConfig", "AsrLlmModel", "AsrLlmProcessor", "AutoModel", "__version__"]
