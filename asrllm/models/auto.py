"""Loading whatever directory a user has: an exported model, a run's exp_dir, or one of Auden's."""

import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers

from asrllm.errors import UserError, refuse_unknown
from asrllm.integrity import verify_weights
from asrllm.models.asr_llm.checks import indexed_files, read_config, read_json
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.asr_llm.serialization import load_model, read_tensors, set_generation_config
from asrllm.models.base_models import BasePaths, move_base_models
from asrllm.models.encoders.zipformer.weights import DAMAGED
from asrllm.models.fingerprint import is_hub_id, resolve_pretrained
from asrllm.models.interop.auden import MODEL_TYPES, load_auden, read_auden_config

# Importing this module makes the model known to transformers' Auto classes; no other module has such an effect.
transformers.AutoConfig.register("asrllm", AsrLlmConfig, exist_ok=True)
transformers.AutoModel.register(AsrLlmConfig, AsrLlmModel, exist_ok=True)
transformers.AutoProcessor.register(AsrLlmConfig, AsrLlmProcessor, exist_ok=True)


# of a directory of weights, as transformers and DeepSpeed's zero_to_fp32.py write it
WEIGHTS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class AutoModel:
    """`AutoModel.from_pretrained(dir_or_exp)`"""

    @staticmethod
    def from_pretrained(
        path: str | Path,
        *,
        weights: str | Path | None = None,
        dtype: Any = None,
        base_models: BasePaths | None = None,
        **unknown: Any,
    ) -> AsrLlmModel:
        """Return the model of an exported directory or of a run, in eval mode.

        Args:
            path: an exported directory, its name on the Hugging Face hub, or an exp_dir.
            weights: a state dict file, or a directory of several; default for a run:
                pretrained.pt, else the newest averaged-*.pt.
            dtype: of the weights, "bfloat16" or a torch.dtype; None or "auto": as saved.
            base_models: where base models are now that moved after training,
                {"audio_encoder" or "llm": path}; compared with the fingerprints of training.

        Raises:
            UserError: there is no model, its keys do not fit, or a base model is missing or is
                another one.
        """
        if unknown.pop("device_map", None) is not None:
            raise UserError(
                "AutoModel.from_pretrained() does not place weights by device_map: leave it out, and use .to(device)"
            )
        refuse_unknown("AutoModel.from_pretrained()", unknown, ("weights", "dtype", "base_models"))
        folder = model_folder(path)
        if is_auden(folder):
            move_base_models(read_auden_config(folder), base_models, where=str(folder))
            return load_auden(folder, weights=weights, dtype=dtype)
        file = Path(weights) if weights else default_weights(folder)
        if file is None:
            return AsrLlmModel.from_pretrained(folder, dtype=dtype, base_models=base_models)
        model = load_model(folder, read_state(file), dtype=dtype, base_models=base_models)
        if not (
            folder / "generation_config.json"
        ).is_file():  # training writes none: an LLM trained as a whole keeps its base's
            set_generation_config(
                model.causal_lm,
                Path((model.config.base_models or {}).get("llm", {}).get("path", folder)),
            )
        return model


def model_folder(path: str | Path) -> Path:
    """A directory as it is; what is none and may be a hub id as its local snapshot, downloaded where a hub is reached."""
    folder = Path(path)
    return folder if folder.exists() or not is_hub_id(path) else resolve_pretrained(path)


def default_weights(folder: Path) -> Path | None:
    """The weights file that is taken where none is given; None where the directory is a model by itself."""
    return (
        None
        if is_auden(folder) or any(folder.glob("model*.safetensors*"))
        else newest_weights(folder)
    )


def is_auden(folder: Path) -> bool:
    return read_json(folder / "config.json").get("model_type") in MODEL_TYPES


def describe(path: str | Path, base_models: BasePaths | None = None) -> AsrLlmConfig:
    """Return the configuration of whatever directory AutoModel loads, without its weights.

    Args:
        path: as for AutoModel.
        base_models: as for AutoModel.
    """
    folder = model_folder(path)
    config = read_auden_config(folder) if is_auden(folder) else read_config(folder)
    move_base_models(config, base_models, where=str(folder))
    return config


def newest_weights(exp_dir: Path) -> Path:
    averaged = sorted(exp_dir.glob("averaged-*.pt"), key=lambda p: p.stat().st_mtime)
    candidates = [exp_dir / "pretrained.pt", *reversed(averaged)]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"{str(exp_dir)!r} holds neither pretrained.pt nor averaged-*.pt: average its checkpoints with 'asrllm average {exp_dir}'"
    )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A plain state dict file, or a directory or an index of several; nothing in it is executed."""
    if path.is_dir():
        if any(path.glob("*mp_rank_*_states.pt")):
            raise UserError(
                f"{str(path)!r} is a ZeRO checkpoint: 'asrllm consolidate {path.parent} --tag {path.name}' makes weights of it"
            )
        path = next(
            (path / name for name in WEIGHTS_FILES if (path / name).is_file()),
            path / WEIGHTS_FILES[0],
        )
    if not path.is_file():
        raise UserError(f"the weights {str(path)!r} do not exist: check the path")
    if path.suffix == ".json":
        return {
            name: tensor
            for file in indexed_files(path)
            for name, tensor in read_state(file).items()
        }
    if path.suffix == ".safetensors":
        return read_tensors(path)
    return load_state(path)


def load_state(path: Path, *, mapped: bool = False) -> dict[str, torch.Tensor]:
    """A state dict of torch.save's. mapped: read when it is used, where the file's form allows it."""
    try:
        verify_weights(path)
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path)
        )
    except (*DAMAGED, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"the weights {str(path)!r} cannot be read ({said}): copy the file again, or make it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"the weights {str(path)!r} are no plain state dict of tensors")
    return state
