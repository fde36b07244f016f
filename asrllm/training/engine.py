"""Build the DeepSpeed engine around the model."""

import contextlib
import importlib
from collections.abc import Callable, Iterator

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig

from asrllm.errors import UserError
from asrllm.launchers import switched_on
from asrllm.models.partitioning import is_partitioned
from asrllm.progress import waiting
from asrllm.training.ds_keys import DsConfig
from asrllm.training.optimizers import make_optimizer, parameter_groups
from asrllm.training.run_config import TrainerConfig
from asrllm.training.scaled_adam import ScaledAdam, bind


@contextlib.contextmanager
def deepspeed_engine(
    config: TrainerConfig, ds: DsConfig, build: Callable[[], nn.Module], device: torch.device
) -> Iterator[deepspeed.DeepSpeedEngine]:
    """Yield the engine around a model.

    Inside the block transformers knows that ZeRO-3 is used: `build` loads the LLM partition by
    partition, and generation gathers its layers.

    Args:
        config: `trainer` part of the run's configuration.
        ds: complete DeepSpeed configuration.
        build: returns the model.
        device: device of this rank.

    Raises:
        UserError: the model has no trainable parameter.
    """
    # transformers only keeps a weak reference to this object, so the name keeps it alive
    hf_ds_config = HfDeepSpeedConfig(ds)
    model = build()
    cast_parameters(model, config.dtype)
    if config.gradient_checkpointing:
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        model.llm.enable_input_require_grads()
        model.audio_encoder.gradient_checkpointing_enable()
    if config.compile:
        compile_layers(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise UserError(
            "nothing is trained, because every part is frozen. "
            "Set model.llm.lora, or set frozen=false for a part."
        )
    drop_frozen_aliases(model)
    if ds["zero_optimization"]["stage"] == 3:
        # gather a whole layer at once rather than weight by weight
        set_z3_leaf_modules(model, model.unsplit_modules())
        gather_head_for_loss(model)
    with waiting("preparing DeepSpeed, which may compile its operators"):
        optimizer = build_optimizer(config, ds, model, device)
        import_muon_uncompiled()
        engine, *_ = deepspeed.initialize(
            model=model.to(device), model_parameters=trainable, optimizer=optimizer, config=ds
        )
    if isinstance(optimizer, ScaledAdam):
        bind(optimizer, engine)
    yield engine
    del hf_ds_config


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters that ZeRO-3 has not partitioned: LoRA, projector and encoder.

    ZeRO-3 needs one dtype for all parameters. It cannot partition scalars either, so they become
    vectors of one element; load_model restores their shape.
    """
    for parameter in model.parameters():
        if not is_partitioned(parameter):
            parameter.data = torch.atleast_1d(parameter.data.to(dtype))


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without torch's compiler.

    The import takes 0.0 s with this, and 1.1 to 3.5 s without it on two busy cores (torch 2.13).
    deepspeed.initialize checks every optimizer against Muon, whose module has functions that are
    decorated with torch.compile, which imports 530 modules of the compiler; others avoid that, too
    (https://github.com/huggingface/accelerate/pull/3947). torch reads TORCHDYNAMO_DISABLE when a
    function is decorated.
    """
    with switched_on("TORCHDYNAMO_DISABLE"), contextlib.suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")


def compile_layers(model: nn.Module) -> None:
    """Compile each layer of the LLM by itself with torch.compile, for rows of any length."""
    layer_names = set(model.causal_lm._no_split_modules or ())
    for layer in model.causal_lm.modules():
        if type(layer).__name__ in layer_names:
            layer.compile(dynamic=True)


def build_optimizer(
    config: TrainerConfig, ds: DsConfig, model: nn.Module, device: torch.device
) -> torch.optim.Optimizer:
    """Return the run's optimizer over the trainable parameters of the model."""
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
    """Let ZeRO-3 gather the LM head for the loss.

    ZeRO-3 gathers only a module's own parameters, but the loss uses those of the LLM's head.
    """
    for parameter in model.causal_lm.get_output_embeddings().parameters():
        deepspeed.zero.register_external_parameter(model.loss, parameter)


def set_lr(engine: deepspeed.DeepSpeedEngine, lr: float) -> None:
    """Set the learning rate of every parameter group to `lr` times the group's ratio."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def drop_frozen_aliases(model: nn.Module) -> None:
    """Keep the second names of frozen tied weights out of checkpoints.

    DeepSpeed excludes frozen weights by their first name only.
    """
    first_names = {name for name, _ in model.named_parameters()}
    aliases = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in first_names and not parameter.requires_grad:
            aliases.add(name)

    def drop(
        module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, object]
    ) -> None:
        for name in aliases:
            state.pop(prefix + name, None)

    model.register_state_dict_post_hook(drop)
