"""Load a model from a directory or a state dict, with strict checks of its keys."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import COPY_TOKENIZER, AsrLlmConfig
from asrllm.models.asr_llm.network import AsrLlmNetwork
from asrllm.models.asr_llm.placement import Dtype, as_dtype, prevailing_dtype
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.models.asr_llm.weight_files import read_tensors, weight_files
from asrllm.models.base_models import BasePaths, base_paths, move_base_models
from asrllm.models.hub_files import load_generation_config
from asrllm.models.meta_device import parameters_on_meta
from asrllm.models.model_args import PRETRAINED_PARTS
from asrllm.models.pretrained import (
    empty_llm,
    pretrained_encoder,
    pretrained_llm,
)
from asrllm.models.state_dict import (
    StateDict,
    check_state,
    is_adapter,
    without_second_names,
)

PEFT_DEFAULT_RANK = 8  # rank of adapters whose configuration has no "r"
ModelT = TypeVar("ModelT", bound=AsrLlmNetwork)


def load_directory(
    model_class: type[ModelT],
    path: str | Path,
    *,
    dtype: Dtype = None,
    base_models: BasePaths | None = None,
) -> ModelT:
    """Load a directory that `save_model` wrote. See `AsrLlmModel.from_pretrained`."""
    config, processor = read_config_and_processor(path, base_models)
    state: StateDict = {}
    for file in weight_files(Path(path)):
        state.update(read_tensors(file, as_dtype(dtype)))
    return assemble(
        model_class,
        config,
        processor,
        state,
        from_base=config.exclude_from_checkpoint or [],
        dtype=dtype,
        where=str(path),
    )


def load_model(
    model_class: type[ModelT],
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    dtype: Dtype = None,
    base_models: BasePaths | None = None,
) -> ModelT:
    """Return the model described in a directory with the weights of `state`, in eval mode.

    Args:
        model_class: class of the model.
        path: a directory with config.json and the tokenizer.
        state: the weights. Weights of the encoder and of the LLM that it does not contain are read
            from the base models.
        dtype: dtype of the weights. None or "auto" means the most frequent one in `state`.
        base_models: as in `move_base_models`.

    Raises:
        UserError: a key is missing, unexpected or has another shape, or a base model is missing
            or is not the one used in training.
    """
    config, processor = read_config_and_processor(path, base_models)
    return assemble(
        model_class,
        config,
        processor,
        state,
        from_base=PRETRAINED_PARTS,
        dtype=dtype,
        where=str(path),
    )


def read_config_and_processor(
    path: str | Path,
    base_models: BasePaths | None = None,
) -> tuple[AsrLlmConfig, AsrLlmProcessor]:
    """Return the configuration and the processor in a directory.

    Raises:
        UserError: a file is missing or corrupted, or the tokenizer and the configuration contradict
            each other.
    """
    processor = AsrLlmProcessor.from_pretrained(path)
    config = processor.config
    move_base_models(config, base_models, where=str(path))
    found = processor.tokenizer.convert_tokens_to_ids(config.audio_token)
    if found != config.audio_token_id:
        raise UserError(
            f"the tokenizer in {str(path)!r} has the id {found} for {config.audio_token!r}, but "
            f"config.json has {config.audio_token_id}. {COPY_TOKENIZER}"
        )
    return config, processor


def assemble(
    model_class: type[ModelT],
    config: AsrLlmConfig,
    processor: AsrLlmProcessor,
    state: Mapping[str, Tensor],
    *,
    from_base: Sequence[str],
    dtype: Dtype,
    where: str,
) -> ModelT:
    """Build a model from its weights, in eval mode.

    The parameters are the tensors of `state`, not copies of them, and none is initialized first.

    Args:
        model_class: class of the model.
        config: its configuration.
        processor: its processor.
        state: its weights.
        from_base: parts of which `state` may lack weights. Those come from the base models.
        dtype: dtype of the weights. None or "auto" means the most frequent one in `state`.
        where: the directory of the model, for error messages.
    """
    chosen = as_dtype(dtype) or prevailing_dtype(state, where)
    model = _without_weights(model_class, config, chosen, where)
    multiple = rank_multiple(model, state)
    if multiple > 1:
        config = with_rank_multiple(config, multiple)
        processor.config = config
        model = _without_weights(model_class, config, chosen, where)
    state = without_second_names(model, state, where)
    for part in config.stored or {}:
        own = state.keys() & model.weights().keys()
        check_stored(config, part, len(base_weights(own, [part])), where)
    missing = model.weights().keys() - state.keys()
    based = [part for part in from_base if base_weights(missing, [part])]
    if based:
        model = _with_base_parts(model_class, config, based, chosen)
    set_generation_config(model.causal_lm, Path(where))
    state = _restore_scalars(model, state)
    _check_complete(model, state, based, where)
    # One tensor at a time: the original of a converted tensor is freed if nothing else holds it.
    for key in list(state):
        if state[key].is_floating_point():
            state[key] = state[key].to(chosen)
    model.load_state_dict(state, strict=False, assign=True)
    model.llm.tie_weights()
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.processor = processor
    return model.eval()


def _without_weights(
    model_class: type[ModelT], config: AsrLlmConfig, dtype: torch.dtype, where: str
) -> ModelT:
    with parameters_on_meta():
        return model_class(config, llm=empty_llm(config.llm or {}, dtype, where=where))


def _check_complete(
    model: AsrLlmNetwork, state: Mapping[str, Tensor], based: Sequence[str], where: str
) -> None:
    """Check keys and shapes of `state`, which may lack the base weights of the `based` parts."""
    expected = model.weights()
    needed = expected.keys() - base_weights(expected, based)
    what = f"the weights of {where!r}"
    check_state(state, expected, what, _mismatch_reason("model", where), needed=needed)


def check_stored(
    config: AsrLlmConfig,
    part: str,
    found: int,
    where: str,
) -> None:
    """Raise UserError unless weights have as many tensors of a part as the run's checkpoints.

    Args:
        config: configuration of the run.
        part: "audio_encoder" or "llm".
        found: number of its tensors in the weights, without adapters.
        where: the directory of the run.
    """
    count = (config.stored or {}).get(part, found)
    if found != count:
        raise UserError(
            f"the weights of {where!r} contain {found} tensors of the {part}, but its checkpoints "
            f"contain {count}. {_mismatch_reason('run', where)}"
        )


def _mismatch_reason(what: str, where: str) -> str:
    """Return the likely reasons why weights do not fit the run in the directory `where`."""
    reason = f"They belong to another {what}, or its config.json was changed."
    if (Path(where) / "inherited_weights.pt").is_file():
        reason += (
            " If zero_to_fp32.py wrote them, run 'asrllm consolidate' instead: that script drops "
            "the weights in inherited_weights.pt."
        )
    return reason


def rank_multiple(model: AsrLlmNetwork, state: Mapping[str, Tensor]) -> int:
    """Return how many times the rank of the model's adapters the adapters in `state` have.

    Averaged adapters contain the factors of several checkpoints.
    """
    for key, tensor in model.weights().items():
        is_factor = ".lora_A." in key or ".lora_embedding_A." in key
        if not is_factor or key not in state or tensor.shape[1:] != state[key].shape[1:]:
            continue
        multiple, rest = divmod(state[key].shape[0], tensor.shape[0])
        return multiple if rest == 0 else 1
    return 1


def with_rank_multiple(config: AsrLlmConfig, multiple: int) -> AsrLlmConfig:
    """Return a copy of the configuration with adapters of a multiple of the rank.

    Their alpha does not change.
    """
    config = copy.deepcopy(config)
    for options in (config.lora, config.audio_encoder_lora):
        if options is not None:
            options["r"] = options.get("r", PEFT_DEFAULT_RANK) * multiple
            pattern = options.get("rank_pattern") or {}
            options["rank_pattern"] = {name: rank * multiple for name, rank in pattern.items()}
    return config


def base_weights(keys: Iterable[str], parts: Sequence[str]) -> set[str]:
    """Return the keys of the weights that these parts of the model share with their base models."""
    found: set[str] = set()
    for part in parts:
        found |= {key for key in keys if is_base_weight(key, part)}
    return found


def is_base_weight(key: str, part: str) -> bool:
    """Return whether a key belongs to the pretrained weights of a part, not to its adapters."""
    return key.startswith(f"{part}.") and not is_adapter(key)


def _with_base_parts(
    model_class: type[ModelT], config: AsrLlmConfig, parts: Sequence[str], dtype: torch.dtype
) -> ModelT:
    """Build a model with the pretrained weights of some parts, and the others on meta."""
    encoder = None
    llm = None
    paths = base_paths(config, parts)
    if "audio_encoder" in parts:
        encoder = _cast_parameters(pretrained_encoder(config, paths["audio_encoder"]), dtype)
    if "llm" in parts:
        llm = pretrained_llm(paths["llm"], dtype)
    with parameters_on_meta():
        llm = llm or empty_llm(config.llm or {}, dtype)
        return model_class(config, audio_encoder=encoder, llm=llm)


def _cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert the parameters and not the buffers.

    In bfloat16 a rotary embedding's frequencies would lose the far positions.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def set_generation_config(llm: PreTrainedModel, folder: Path) -> None:
    """Give an LLM the settings in a directory's generation_config.json, if there is one."""
    if (folder / "generation_config.json").is_file():
        llm.generation_config = load_generation_config(folder)


def _restore_scalars(model: AsrLlmNetwork, state: Mapping[str, Tensor]) -> StateDict:
    """Return the state dict with the shape () of the model's scalars.

    Training stores them as vectors of one element.
    """
    restored = dict(state)
    for name, tensor in model.weights().items():
        if tensor.dim() == 0 and name in state and state[name].numel() == 1:
            restored[name] = state[name].reshape(())
    return restored
