"""Load a model from any directory: an exported model, a run's exp_dir, or a directory of Auden."""

from pathlib import Path
from typing import Any

import torch
import transformers

from asrllm.errors import UserError, reject_unknown
from asrllm.models.asr_llm.checks import (
    check_not_a_checkpoint,
    read_config,
    read_config_fields,
)
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.loading import load_model, set_generation_config
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.placement import DeviceMap, Dtype, device_of_map
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.asr_llm.weight_files import indexed_files, read_tensors
from asrllm.models.base_models import BasePaths, move_base_models
from asrllm.models.fingerprint import is_hub_id, resolve_pretrained
from asrllm.models.interop.auden import MODEL_TYPES, load_auden, read_auden_config
from asrllm.models.plain_tensors import load_plain_tensors
from asrllm.models.state_dict import StateDict, check_finite, check_stored_values
from asrllm.text_files import check_file

# Importing this module registers the model with transformers' Auto classes. No other module has
# such an effect.
transformers.AutoConfig.register("asrllm", AsrLlmConfig, exist_ok=True)
transformers.AutoModel.register(AsrLlmConfig, AsrLlmModel, exist_ok=True)
transformers.AutoProcessor.register(AsrLlmConfig, AsrLlmProcessor, exist_ok=True)

# Names of the weights in a directory that transformers or DeepSpeed's zero_to_fp32.py wrote.
WEIGHT_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class AutoModel:
    """Loads any directory with a model: `AutoModel.from_pretrained(dir_or_exp)`."""

    @staticmethod
    def from_pretrained(
        path: str | Path,
        *,
        weights: str | Path | None = None,
        dtype: Dtype = None,
        torch_dtype: Dtype = None,
        device_map: DeviceMap = None,
        base_models: BasePaths | None = None,
        **unknown: Any,
    ) -> AsrLlmModel:
        """Return the model of an exported directory or of a run, in eval mode.

        Args:
            path: an exported directory, its name on the Hugging Face hub, or an exp_dir.
            weights: a state dict file, or a directory of several. The default for a run is
                pretrained.pt, or else the newest averaged-*.pt.
            dtype: dtype of the weights, for example "bfloat16" or torch.bfloat16. None or "auto"
                means as saved.
            torch_dtype: the old name of `dtype`.
            device_map: device of the whole model, for example "cuda" or {"": 0}; "auto" means the
                first accelerator if there is one. None means the CPU.
            base_models: current paths of base models that moved after training,
                {"audio_encoder" or "llm": path}. They are compared with the fingerprints of
                training.

        Raises:
            UserError: there is no model, its keys do not fit, or a base model is missing or does
                not match.
        """
        known = ("weights", "dtype", "device_map", "base_models")
        reject_unknown("AutoModel.from_pretrained()", unknown, known)
        device = device_of_map(device_map)
        dtype = torch_dtype if dtype is None else dtype
        return _load(model_folder(path), weights, dtype, base_models).to(device)


def _load(
    folder: Path, weights: str | Path | None, dtype: Dtype, base_models: BasePaths | None
) -> AsrLlmModel:
    """Return the model of a directory. The arguments are those of AutoModel."""
    if is_auden(folder):
        move_base_models(read_auden_config(folder), base_models, where=str(folder))
        return load_auden(folder, weights=weights, dtype=dtype)
    file = chosen_weights(folder, weights)
    if file is None:
        return AsrLlmModel.from_pretrained(folder, dtype=dtype, base_models=base_models)
    model = load_model(AsrLlmModel, folder, read_state(file), dtype=dtype, base_models=base_models)
    if not (folder / "generation_config.json").is_file():
        # training writes none: an LLM that is trained in full keeps the one of its base model
        base = (model.config.base_models or {}).get("llm", {})
        set_generation_config(model.causal_lm, Path(base.get("path", folder)))
    return model


def model_folder(path: str | Path) -> Path:
    """Return the directory of a model, downloading a hub id if the hub can be reached."""
    folder = Path(path)
    if folder.exists() or not is_hub_id(path):
        return folder
    return resolve_pretrained(path)


def chosen_weights(source: Path, weights: str | Path | None = None) -> Path | None:
    """Return the weights file of a run, or None if a directory is a complete model.

    Args:
        source: a run's exp_dir, a weights file in it, or an exported directory.
        weights: the file that the user chose.
    """
    if source.is_file():
        return source
    if weights:
        return Path(weights)
    if is_auden(source) or has_saved_weights(source):
        return None
    return newest_weights(source)


def has_saved_weights(folder: Path) -> bool:
    """Return whether save_pretrained wrote weights to a directory."""
    return any(folder.glob("model*.safetensors*"))


def is_auden(folder: Path) -> bool:
    """Return whether a directory's config.json is one of Auden's."""
    return read_config_fields(folder).get("model_type") in MODEL_TYPES


def load_model_config(path: str | Path, base_models: BasePaths | None = None) -> AsrLlmConfig:
    """Return the configuration of any directory that AutoModel loads, without its weights.

    Args:
        path: as for AutoModel.
        base_models: as for AutoModel.
    """
    folder = model_folder(path)
    config = read_auden_config(folder) if is_auden(folder) else read_config(folder)
    move_base_models(config, base_models, where=str(folder))
    return config


def newest_weights(exp_dir: Path) -> Path:
    """Return a run's pretrained.pt, or else its newest averaged-*.pt.

    Raises:
        UserError: the run has neither.
    """
    averaged = sorted(exp_dir.glob("averaged-*.pt"), key=lambda p: p.stat().st_mtime)
    for path in (exp_dir / "pretrained.pt", *reversed(averaged)):
        if path.exists():
            return path
    raise UserError(
        f"{str(exp_dir)!r} contains neither pretrained.pt nor averaged-*.pt. Average the "
        f"checkpoints of a run with 'asrllm average {exp_dir} --iter N --avg K'. "
        "If it is an exported model, copy its weights again."
    )


def read_state(path: Path) -> StateDict:
    """Read a plain state dict. No code in it is executed.

    Args:
        path: a file, an index of several files, or a directory with either.

    Raises:
        UserError: the weights are missing, corrupted or not finite, or are a ZeRO checkpoint.
    """
    if path.is_dir():
        path = _weights_in(path)
    check_file(path, "the weights file")
    if path.suffix == ".json":
        state: StateDict = {}
        for file in indexed_files(path):
            state.update(read_state(file))
        return state
    if path.suffix == ".safetensors":
        return read_tensors(path)
    state = load_state(path)
    for name, tensor in state.items():
        check_finite(name, tensor, path)
    return state


def _weights_in(folder: Path) -> Path:
    check_not_a_checkpoint(folder)
    for name in WEIGHT_NAMES:
        if (folder / name).exists():
            return folder / name
    return folder / WEIGHT_NAMES[0]


def load_state(path: Path, *, mapped: bool = False) -> StateDict:
    """Read a state dict that torch.save wrote.

    Args:
        path: the file.
        mapped: map the file into memory if its format allows it, so that a tensor is read when it
            is used.

    Raises:
        UserError: the file cannot be read, is not a plain state dict, or has a sparse tensor.
    """
    what = f"the weights {str(path)!r}"
    state = load_plain_tensors(path, what, "Copy the file again, or make it again.", mapped=mapped)
    is_state = isinstance(state, dict) and all(
        isinstance(value, torch.Tensor) for value in state.values()
    )
    if not is_state:
        raise UserError(f"{what} are not a plain state dict of tensors. Give one.")
    check_stored_values(state, path)
    return state
