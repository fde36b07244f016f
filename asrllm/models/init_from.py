"""Training in stages: start a run with the weights at the end of an earlier one."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from asrllm.errors import UserError
from asrllm.models.asr_llm.checks import read_config
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.auto import has_saved_weights, newest_weights, read_state
from asrllm.models.model_args import PRETRAINED_PARTS
from asrllm.models.partitioning import gathered
from asrllm.models.state_dict import NOT_QUANTIZED, WEIGHT_DTYPES, StateDict, is_adapter, plain_name
from asrllm.text_files import JsonObject

logger = logging.getLogger(__name__)
# Fields without which the trained weights of the projector have no meaning.
PROJECTOR_FIELDS = (
    "projector",
    "projector_hidden_size",
    "audio_encoder_projector_ds_rate",
    "tag_audio_boundary",
    "pad_to_30s",
)
LORA_FIELDS = {"audio_encoder": "audio_encoder_lora", "llm": "lora"}
# Groups of weights that a run trains either completely or not at all.
COMPLETE_GROUPS = ("projector", "llm adapters", "audio_encoder adapters")


def check_earlier_run(exp_dir: Path, description: AsrLlmConfig) -> None:
    """Check that a model can start from an earlier run. The weights themselves are not read.

    Args:
        exp_dir: the earlier run.
        description: configuration of the model.

    Raises:
        UserError: it is not a run, has no weights, or its model differs.
    """
    where = f"init_from={str(exp_dir)!r}"
    if not (exp_dir / "config.json").is_file() or has_saved_weights(exp_dir):
        raise UserError(f"{where} is not a run. Give the exp_dir of a completed training.")
    with _explained(where):
        newest_weights(exp_dir)
        earlier = read_config(exp_dir)
    _check_same_meaning(earlier, description, where)


def load_initial_weights(model: AsrLlmModel, exp_dir: Path) -> set[str]:
    """Load all weights that an earlier run trained. Parts that it did not train do not change.

    Args:
        model: the model; changed in place.
        exp_dir: the earlier run.

    Returns:
        The names of the loaded weights.

    Raises:
        UserError: the run has no weights, they are corrupted or not finite, or they do not fit this
            model.
    """
    where = f"init_from={str(exp_dir)!r}"
    check_earlier_run(exp_dir, model.config)
    with _explained(where):
        earlier = read_config(exp_dir)
        state = read_state(newest_weights(exp_dir))
    _check_trained_groups(earlier, state, where)
    parameters = dict(model.named_parameters())
    # a part that was trained in full may have adapters in the next stage
    names = {plain_name(name): name for name in parameters}
    state = _renamed(state, names)
    _check_shapes(parameters, state, where)
    groups = {_group_of(name) for name in state}
    complete = {*COMPLETE_GROUPS, *_new_parts(earlier)} & groups
    _check_complete_groups(complete, parameters, state, where)
    copy_into(model, state)
    logger.info("%s: loaded %d weights of %s", exp_dir, len(state), ", ".join(sorted(groups)))
    return set(state)


def _check_trained_groups(earlier: AsrLlmConfig, state: Mapping[str, Tensor], where: str) -> None:
    """Check that a run's weights have the groups that it always stores.

    They are its projector, its adapters, and an encoder without a base model.
    """
    expected = ["projector", *_new_parts(earlier)]
    for part, field in LORA_FIELDS.items():
        if getattr(earlier, field):
            expected.append(f"{part} adapters")
    groups = {_group_of(name) for name in state}
    for group in expected:
        if group not in groups:
            raise UserError(
                f"{where} has no weights of the {group}, but its config.json describes them. Copy "
                "the weights again."
            )


def _renamed(state: StateDict, names: Mapping[str, str]) -> StateDict:
    """Rename weights by the names of the new model, given by their plain names."""
    renamed: StateDict = {}
    for name, tensor in state.items():
        renamed[names.get(plain_name(name), name)] = tensor
    return renamed


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Put the run before the message of a UserError in the block."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{where}: {error}") from error


def _check_shapes(
    parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], where: str
) -> None:
    """Check the names, dtypes and shapes of the weights that are loaded."""
    for name, tensor in state.items():
        if name not in parameters:
            raise UserError(
                f"{where}: {name!r} was trained there, but is not in this model. Use the same "
                "adapters."
            )
        if tensor.dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{where}: {name!r} has the dtype {tensor.dtype} there. {NOT_QUANTIZED}"
            )
        shape = getattr(parameters[name], "ds_shape", parameters[name].shape)
        is_scalar = tensor.numel() == 1 and math.prod(shape) == 1  # trained as a vector
        if tensor.shape != shape and not is_scalar:
            raise UserError(
                f"{where}: {name!r} has the shape {tuple(tensor.shape)} there and {tuple(shape)} "
                "here. Use the same configuration."
            )


def _check_complete_groups(
    groups: set[str],
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Tensor],
    where: str,
) -> None:
    for name in parameters:
        group = _group_of(name)
        if group in groups and name not in state:
            raise UserError(
                f"{where} has no {name!r}, which this run has. Use the same "
                "configuration in both runs."
            )


def _group_of(name: str) -> str:
    part = name.partition(".")[0]
    return f"{part} adapters" if is_adapter(name) else part


def _check_same_meaning(earlier: AsrLlmConfig, now: AsrLlmConfig, where: str) -> None:
    """Check the options that give the weights their meaning, and the base models below them."""
    keys = list(PROJECTOR_FIELDS)
    keys += [field for field in LORA_FIELDS.values() if getattr(earlier, field)]
    keys += [part for part in _new_parts(earlier) if part in _new_parts(now)]
    for key in keys:
        there = _without_dropout(getattr(earlier, key))
        here = _without_dropout(getattr(now, key))
        if there != here:
            raise UserError(
                f"{where} was trained with {key}={there}, but this run has {here}. Use the same "
                "value."
            )
    problem = base_difference(earlier.base_models or {}, now.base_models or {})
    if problem:
        raise UserError(f"{where} was trained on another model. {problem} Use the same.")


def base_difference(there: JsonObject, here: JsonObject) -> str:
    """Return a sentence about the first part that has other weights at the start, or "".

    Args:
        there: base models of an earlier run or a checkpoint: {part: {"path", "fingerprint"}}.
        here: those of this run.
    """
    for part in PRETRAINED_PARTS:
        earlier = there.get(part, {})
        now = here.get(part, {})
        if earlier.get("fingerprint") != now.get("fingerprint"):
            return (
                f"Its {part} began with other weights ({_origin(earlier)}) than that of this run "
                f"({_origin(now)})."
            )
    return ""


def _origin(base: JsonObject) -> str:
    return repr(base["path"]) if base else "random"


def _new_parts(config: AsrLlmConfig) -> list[str]:
    """Return the parts of a run that have no base model, so that it stores all their weights."""
    return [part for part in PRETRAINED_PARTS if part not in (config.base_models or {})]


def _without_dropout(value: object) -> object:
    """Return LoRA options without dropout, which does not change the meaning of the weights."""
    if not isinstance(value, dict):
        return value
    return {key: option for key, option in value.items() if key != "lora_dropout"}


def copy_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into the parameters of the same names, which ZeRO-3 may partition."""
    for name, parameter in model.named_parameters():
        if name in state:
            with gathered(parameter, change=True), torch.no_grad():
                parameter.copy_(state[name].reshape(parameter.shape))
