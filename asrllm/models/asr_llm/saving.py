"""Save a model to a directory."""

import copy
import re
import shutil
import tempfile
from pathlib import Path

from torch import nn
from transformers import GenerationConfig

from asrllm.defaults import MAX_SHARD_SIZE
from asrllm.errors import UserError
from asrllm.integrity import write_checksums
from asrllm.models.asr_llm.adapter_files import ADAPTER, check_separable, write_adapter
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.merging import merged_names, weight_source
from asrllm.models.asr_llm.network import AsrLlmNetwork
from asrllm.models.asr_llm.weight_files import INDEX, SINGLE
from asrllm.models.hub_files import LLM_SETTINGS
from asrllm.models.portable.files import describe_code, write_code
from asrllm.models.state_dict import (
    StateDict,
    is_adapter,
)
from asrllm.tensor_files import write_sharded
from asrllm.text_files import first_words

SIZE = re.compile(r"\s*(?=[\d.]*[1-9])\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)


def check_shard_size(size: int | str) -> None:
    """Raise UserError unless `size` is a number of bytes above 0 or a text like "5GB"."""
    if isinstance(size, str):
        is_valid = SIZE.fullmatch(size) is not None
    else:
        is_valid = isinstance(size, int) and not isinstance(size, bool) and size > 0
    if not is_valid:
        raise UserError(
            f"max_shard_size={size!r} is not a size. Use a number of bytes above 0, or a text "
            "like '5GB'."
        )


def save_model(
    model: AsrLlmNetwork,
    folder: Path,
    *,
    merge_adapter: bool = False,
    separate_adapter: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Save a model. The arguments are those of `AsrLlmModel.save_pretrained`.

    Existing files are replaced only once all new ones are written, the list of weights last.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.stored = None
    state = _saved_weights(model)
    tuned: dict[str, nn.Module] = {}
    if merge_adapter or separate_adapter:
        state, tuned = merged_names(model, state)
        _describe_as_merged(config)
    if separate_adapter:
        check_separable(model)
        tuned = {key: layer for key, layer in tuned.items() if not key.startswith("llm.")}
        config.separate_adapter = True
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file. Give a directory to save the model to.")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        model.require_processor().save_pretrained(partial)
        write_generation_config(model.llm.generation_config, partial)
        if is_portable(config):
            (partial / "generation_config.json").replace(partial / LLM_SETTINGS)
            describe_code(config)
            write_code(config, model.require_processor(), partial)
        config.save_pretrained(partial)
        source = weight_source(state, tuned)
        write_sharded(source, partial, max_shard_size=max_shard_size, what="model")
        if separate_adapter:
            write_adapter(model, partial / ADAPTER)
        write_checksums(partial)
        _move_into_place(partial, folder)
    except BaseException:
        shutil.rmtree(folder if is_new else partial, ignore_errors=True)
        raise


def _saved_weights(model: AsrLlmNetwork) -> StateDict:
    """Return the weights of all parts that are not excluded, and all adapters."""
    excluded = tuple(f"{part}." for part in model.config.exclude_from_checkpoint or [])
    state: StateDict = {}
    for name, tensor in model.weights().items():
        if not name.startswith(excluded) or is_adapter(name):
            state[name] = tensor
    return state


def is_portable(config: AsrLlmConfig) -> bool:
    """Return whether transformers alone can load the model: without adapters, with all parts."""
    adapters = config.lora or config.audio_encoder_lora
    return not adapters and not config.exclude_from_checkpoint


def _describe_as_merged(config: AsrLlmConfig) -> None:
    """Remove from a configuration what a model with merged adapters no longer has."""
    config.lora = None
    config.audio_encoder_lora = None
    excluded = config.exclude_from_checkpoint or []
    bases = {part: base for part, base in (config.base_models or {}).items() if part in excluded}
    config.base_models = bases or None


def write_generation_config(settings: GenerationConfig, folder: Path) -> None:
    """Write generation_config.json, or raise UserError if transformers rejects the settings."""
    try:
        settings.save_pretrained(folder)
    except ValueError as error:
        raise UserError(
            f"the LLM's generation settings cannot be saved: {first_words(error, 300)}. "
            "Correct its generation_config.json."
        ) from error


def _move_into_place(partial: Path, folder: Path) -> None:
    """Move all files from `partial`, a subdirectory of `folder`, to `folder`.

    If the process dies on the way, the directory does not load.
    """
    for name in (SINGLE, INDEX):
        (folder / name).unlink(missing_ok=True)
    for stale in folder.glob("model-*-of-*.safetensors"):
        stale.unlink()
    # The list of weights comes last: until then the directory does not load.
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name in (SINGLE, INDEX)):
        target = folder / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)
    partial.rmdir()
