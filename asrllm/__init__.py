"""asrllm: train a large language model to hear."""

__version__ = "0.1.0"

from asrllm.models.auto import AutoModel
from asrllm.models.configuration import AsrLlmConfig
from asrllm.models.model import AsrLlmModel
from asrllm.models.processor import AsrLlmProcessor

__all__ = ["AsrLlmConfig", "AsrLlmModel", "AsrLlmProcessor", "AutoModel", "__version__"]
