"""The DeepSpeed engine around the model."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from asrllm.errors import UserError
from asrllm.launchers import switched_on
from asrllm.training.optimizers import make_optimizer, parameter_groups
from asrllm.training.run_config import TrainerConfig
from asrllm.training.scaled_adam import ScaledAdam, bind


@contextlib.contextmanager
def deepspeed_engine(
    config: TrainerConfig, ds: dict[str, Any], build: Callable[[], nn.Module], device: torch.device
) -> Iterator[deepspeed.DeepSpeedEngine]:
    """The engine with the model that `build` makes.

    Within the block transformers knows of ZeRO-3: `build` loads the LLM partition by partition, and generating gathers its layers.
    """
    stage3 = HfDeepSpeedConfig(ds)  # transformers holds it weakly: this name keeps it alive
    model = build()
    for parameter in model.parameters():
        if not hasattr(
            parameter, "ds_id"
        ):  # ZeRO-3 wants one dtype: those outside its reach so far (LoRA, projector, encoder) follow
            parameter.data = torch.atleast_1d(
                parameter.data.to(config.dtype)
            )  # stage 3 cannot divide a scalar; load_model turns it back
    if config.gradient_checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        model.llm.enable_input_require_grads()
        model.audio_encoder.gradient_checkpointing_enable()
    if config.compile:
        compile_layers(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UserError(
            "nothing is trained: every part is frozen; set model.llm.lora, or frozen=false for a part"
        )
    drop_frozen_aliases(model)
    if (
        ds["zero_optimization"]["stage"] == 3
    ):  # a layer is gathered at once rather than weight by weight
        set_z3_leaf_modules(model, model.unsplit_modules())
        gather_head_for_loss(model)
    optimizer = build_optimizer(config, ds, model, device)
    import_muon_uncompiled()
    engine, *_ = deepspeed.initialize(
        model=model.to(device), model_parameters=trainable, optimizer=optimizer, config=ds
    )
    if isinstance(optimizer, ScaledAdam):
        bind(optimizer, engine)
    yield engine
    del stage3


def import_muon_uncompiled() -> None:
    """deepspeed.initialize asks of every optimizer whether it is DeepSpeed's Muon, whose module loads torch's compiler for two seconds."""
    with (
        switched_on("TORCHDYNAMO_DISABLE"),
        contextlib.suppress(ImportError),
    ):  # torch reads it where a function is decorated
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def compile_layers(model: nn.Module) -> None:
    """torch.compile of the LLM's layers, each by itself, for rows of any length."""
    kinds = set(model.causal_lm._no_split_modules or ())
    for layer in model.causal_lm.modules():
        if type(layer).__name__ in kinds:
            layer.compile(dynamic=True)


def build_optimizer(
    config: TrainerConfig, ds: dict[str, Any], model: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    groups = parameter_groups(
        dict(model.named_parameters()),
        lr=config.lr,
        lr_of=config.lr_of,
        weight_decay=config.weight_decay,
    )
    betas = (config.betas[0], config.betas[1])
    offload = "offload_optimizer" in ds["zero_optimization"]
    return make_optimizer(
        config.optimizer.name, groups, lr=config.lr, betas=betas, device=device, offload=offload
    )


def gather_head_for_loss(model: nn.Module) -> None:
    """ZeRO-3 gathers a module's own parameters: the loss uses those of the LLM's head."""
    for parameter in model.causal_lm.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model.loss, parameter)


def set_lr(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def drop_frozen_aliases(model: nn.Module) -> None:
    """Keep the second names of frozen tied weights out of checkpoints: DeepSpeed leaves frozen weights out by their first name only."""
    first = {name for name, _ in model.named_parameters()}
    aliases = {
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if name not in first and not p.requires_grad
    }

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in aliases:
            state.pop(prefix + name, None)

    model.register_state_dict_post_hook(drop)
