"""Training in stages: a run begins with the weights that an earlier one ended with."""

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from asrllm.errors import UserError
from asrllm.models.asr_llm.checks import read_config
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.modeling import AsrLlmModel
from asrllm.models.auto import newest_weights, read_state
from asrllm.models.state_dict import is_adapter, plain_name

logger = logging.getLogger(__name__)
# what the trained weights of a part mean only together with
PROJECTOR_FIELDS = (
    "projector",
    "projector_hidden_size",
    "audio_encoder_projector_ds_rate",
    "tag_audio_boundary",
    "pad_to_30s",
)
LORA_FIELDS = {"audio_encoder": "audio_encoder_lora", "llm": "lora"}


def take_over(model: AsrLlmModel, exp_dir: Path) -> set[str]:
    """Put all that the earlier run trained into the model; gives the names. A part that it did not train stays as it is.

    Raises UserError where the run has no weights, or where one of them has no place here or means something else here.
    """
    if not (exp_dir / "config.json").is_file() or any(exp_dir.glob("model*.safetensors")):
        raise UserError(
            f"init_from={str(exp_dir)!r} is no run: give the exp_dir of a training that has ended"
        )
    earlier, state = read_config(exp_dir), read_state(newest_weights(exp_dir))
    check_meaning(earlier, model.config, state, exp_dir)
    parameters = dict(model.named_parameters())
    now = {
        plain_name(name): name for name in parameters
    }  # a part trained in full may be given adapters in the next stage
    state = {now.get(plain_name(name), name): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if name not in parameters:
            raise UserError(
                f"init_from={str(exp_dir)!r}: {name!r} was trained there and is not in this model: choose the same adapters"
            )
        shape = getattr(parameters[name], "ds_shape", parameters[name].shape)
        if tensor.shape != shape and tensor.shape != (1,):  # scalars are trained as vectors
            raise UserError(
                f"init_from={str(exp_dir)!r}: {name!r} has the shape {tuple(tensor.shape)} there and {tuple(shape)} here"
            )
    for group in {group_of(name) for name in state}:
        lacking = [name for name in parameters if group_of(name) == group and name not in state]
        if lacking and group in ("projector", "llm adapters", "audio_encoder adapters"):
            raise UserError(
                f"init_from={str(exp_dir)!r} has no {lacking[0]!r}, which this run's {group} have: choose the same there and here"
            )
    copy_into(model, state)
    logger.info(
        "%s: took over %d weights of %s",
        exp_dir,
        len(state),
        ", ".join(sorted({group_of(name) for name in state})),
    )
    return set(state)


def group_of(name: str) -> str:
    part = name.partition(".")[0]
    return f"{part} adapters" if is_adapter(name) else part


def check_meaning(
    earlier: AsrLlmConfig, now: AsrLlmConfig, state: Mapping[str, Tensor], exp_dir: Path
) -> None:
    """The options that make numbers of the weights, and the frozen models below them, are the same."""
    keys = list(PROJECTOR_FIELDS)
    keys += [
        field
        for part, field in LORA_FIELDS.items()
        if any(group_of(name) == f"{part} adapters" for name in state)
    ]
    for key in keys:
        there, here = (_arithmetic(getattr(config, key)) for config in (earlier, now))
        if there != here:
            raise UserError(
                f"init_from={str(exp_dir)!r} was trained with {key}={there}, this run has {here}: choose the same"
            )
    for part in ("audio_encoder", "llm"):
        there, here = ((config.base_models or {}).get(part, {}) for config in (earlier, now))
        if there.get("fingerprint") != here.get("fingerprint"):
            raise UserError(
                f"init_from={str(exp_dir)!r} was trained on another {part}, {there.get('path')!r}; this run has {here.get('path')!r}: "
                "give the same pretrained model"
            )


def _arithmetic(value: object) -> object:
    """Dropout may differ: it changes training, not the weights' meaning."""
    return (
        {k: v for k, v in value.items() if k != "lora_dropout"}
        if isinstance(value, dict)
        else value
    )


def copy_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into the model's parameters of the same names, whole or held in parts by ZeRO-3."""
    for name, parameter in model.named_parameters():
        if name in state:
            with whole(parameter, change=True), torch.no_grad():
                parameter.copy_(state[name].reshape(parameter.shape))


def whole(
    parameter: nn.Parameter, *, change: bool = False
) -> contextlib.AbstractContextManager[None]:
    """The parameter whole inside the block, where ZeRO-3 holds it in parts. change: what is written to it inside stays."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if change else None)
