"""asrllm: train a large language model to hear."""

TYPE_CHECKING = False  # importing `typing` takes 8 ms, during which Ctrl-C is not handled yet
if TYPE_CHECKING:
    from asrllm.models.asr_llm.configuration import AsrLlmConfig
    from asrllm.models.asr_llm.modeling import AsrLlmModel
    from asrllm.models.asr_llm.processing import AsrLlmProcessor
    from asrllm.models.auto import AutoModel

__version__ = "0.1.0"
__all__ = ["AsrLlmConfig", "AsrLlmModel", "AsrLlmProcessor", "AutoModel", "__version__"]


def __getattr__(name: str) -> object:
    """Import a public class on first use (PEP 562), so that `import asrllm` does not load torch.

    All four come from one module, which also registers them with transformers' Auto classes.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("asrllm.models.auto"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
