"""The `model` part of a run's configuration."""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from asrllm.defaults import ENCODER_KEY
from asrllm.errors import UserError, nearest
from asrllm.models.attention import backends
from asrllm.models.encoders.registry import ENCODERS, encoder_kind, encoder_sizes
from asrllm.models.fingerprint import is_hub_id
from asrllm.models.projectors import check_projector
from asrllm.schema import NonNegativeInt, PositiveFloat, PositiveInt, RatioBelowOne, component

PRETRAINED_PARTS = ("audio_encoder", "llm")


@component
class PeftOptions:
    """Further options of PEFT's LoraConfig; null: PEFT's default.

    They neither train weights other than those of the adapters nor change the weights below them.
    """

    exclude_modules: list[str] | str | None = None
    """names of layers, or a regular expression: not adapted, although target_modules names them"""
    layers_to_transform: list[NonNegativeInt] | None = None
    """numbers of the layers to adapt, from 0"""
    layers_pattern: list[str] | str | None = None
    """name of the list of layers, for layers_to_transform"""
    rank_pattern: dict[str, PositiveInt] | None = None
    """ranks of some layers, for example {q_proj: 8}; a key is a name or a regular expression"""
    alpha_pattern: dict[str, PositiveFloat] | None = None
    """values of lora_alpha for some layers, as in rank_pattern"""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] | None = None
    """initial values: true | false (random) | gaussian | orthogonal; others change base weights"""
    lora_bias: bool | None = None
    """give the factor B a bias"""

    def as_peft(self) -> dict[str, Any]:
        """Return the options that are not null."""
        return {key: value for key, value in vars(self).items() if value is not None}


@component
class LoraPart:
    """Adapters of a part. The keys are those of PEFT's LoraConfig.

    See https://huggingface.co/docs/peft; Hu et al., "LoRA" (2021); Kalajdzievski, "rsLoRA" (2023);
    Liu et al., "DoRA" (2024).
    """

    r: NonNegativeInt = 16
    """rank; 0: no adapters"""
    lora_alpha: PositiveInt = 32
    """the adapters are scaled by lora_alpha / r"""
    lora_dropout: RatioBelowOne = 0.0
    """dropout of the adapters' input"""
    target_modules: list[str] | str = Field(default=["q_proj", "v_proj"])
    """names of layers, a regular expression, or all-linear; for a Zipformer, for example
    [in_proj, out_proj]"""
    use_rslora: bool = False
    """scale by lora_alpha / sqrt(r)"""
    use_dora: bool = False
    """train magnitude and direction separately"""
    options: PeftOptions | None = PeftOptions()

    def as_peft(self) -> dict[str, Any] | None:
        """Return the options for PEFT without those that are off, or None without adapters."""
        if not self.r:
            return None
        options: dict[str, Any] = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
        }
        if self.use_rslora:
            options["use_rslora"] = True
        if self.use_dora:
            options["use_dora"] = True
        return options | (self.options.as_peft() if self.options else {})


@component
class EncoderPart:
    """The audio encoder."""

    model_type: str = "whisper"
    """whisper | zipformer | hf: wavlm, hubert and others of transformers, see docs/encoders.md |
    directory or hub id whose config.json names the type"""
    pretrained_model: str | None = None
    """directory or hub id; zipformer: of icefall or Auden, or a checkpoint file; null: random
    weights of the given size"""
    size: str | None = None
    """of an encoder without pretrained weights: tiny | base | small | medium | large-v3 for
    whisper; small | medium | large (icefall's) for zipformer"""
    fields: dict[str, bool | int | list[int]] | None = None
    """changes to the fields of that size, for example {encoder_layers: 6}"""
    frozen: bool = True
    """true: train only its adapters, if any; false: train the whole encoder"""
    lora: LoraPart | None = LoraPart(r=0)

    def __post_init__(self) -> None:
        if self.size is not None or self.fields is not None:
            self._check_size()
        encoder_kind(self.model_type)
        check_lora("audio_encoder", self.lora, frozen=self.frozen)

    def _check_size(self) -> None:
        """Raise UserError unless `size` and `fields` describe an encoder without a base model."""
        key = f"model.audio_encoder.size={self.size}"
        if self.size is None:
            raise UserError(
                f"model.audio_encoder.fields={self.fields} changes the fields of a size, but "
                "model.audio_encoder.size is null. Set the size, or remove the fields."
            )
        if self.pretrained_model:
            raise UserError(
                f"{key} is for an encoder with random weights, but {ENCODER_KEY}="
                f"{self.pretrained_model!r} has weights. Remove one of them."
            )
        sizes = encoder_sizes(self.model_type)
        if not sizes:
            known = [name for name in ENCODERS if encoder_sizes(name)]
            raise UserError(
                f"{key} has no meaning for model.audio_encoder.model_type={self.model_type!r}. Use "
                f"model_type={' or '.join(known)}, or {ENCODER_KEY} instead of a size."
            )
        if self.size not in sizes:
            raise UserError(
                f"{key} is not a size of {self.model_type}. {nearest(self.size, sizes)}"
            )

    @functools.cached_property
    def kind(self) -> str:
        """The encoder's name in ENCODERS."""
        return encoder_kind(self.model_type)


@component
class LlmPart:
    """The LLM."""

    model_type: str | None = None
    """qwen2, llama, ..., or a directory or hub id whose config.json names it: checked against the
    pretrained model; null: not checked"""
    pretrained_model: str | None = None
    """directory or hub id of a causal LLM with its tokenizer"""
    frozen: bool = True
    """true: train only its adapters, if any; false: fine-tune the whole LLM"""
    chat_template: Literal["chatml"] | None = None
    """null: that of the tokenizer, or ChatML if it has none; chatml: plain ChatML without a default
    system turn"""
    attention: Literal["auto", "sdpa", "flash", "varlen"] = "auto"
    """over packed rows: flash (flash-attn) | varlen (torch) | sdpa | auto: the fastest that
    works on this machine"""
    lora: LoraPart | None = LoraPart()

    def __post_init__(self) -> None:
        check_lora("llm", self.lora, frozen=self.frozen)
        if self.attention == "auto":
            return
        reason = backends()[self.attention]
        if reason:
            raise UserError(
                f"model.llm.attention={self.attention} cannot run here: {reason}. Use auto."
            )


def is_directory_or_hub_id(text: str) -> bool:
    """Return whether a model type is a place with a config.json instead of a name."""
    return Path(text).is_dir() or is_hub_id(text)


def check_lora(
    part: str,
    lora: LoraPart | None,
    *,
    frozen: bool,
) -> None:
    """Raise UserError if a part's adapters have wrong options, or it is trained in full as well."""
    if lora is None:
        return
    group = f"model.{part}.lora"
    if lora.r and not lora.target_modules:
        raise UserError(
            f"{group}.target_modules is empty. Name the layers to adapt, for example "
            "[q_proj,v_proj]."
        )
    for key, pattern in _regular_expressions(lora):
        try:
            re.compile(f"({pattern})")  # PEFT puts more before and after it
        except re.error as error:
            raise UserError(
                f"{group}.{key}: {pattern!r} is not a regular expression: {error}. Correct it."
            ) from error
    if lora.r and not frozen:
        raise UserError(
            f"model.{part}.frozen=false trains all weights of the {part}, but model.{part}.lora.r="
            f"{lora.r} adds adapters to it. Set model.{part}.lora.r=0 or model.{part}.frozen=true."
        )


def _regular_expressions(lora: LoraPart) -> Iterator[tuple[str, str]]:
    """Yield the keys and values of options that PEFT uses as regular expressions."""
    options = lora.options or PeftOptions()
    for key, value in (
        ("target_modules", lora.target_modules),
        ("options.exclude_modules", options.exclude_modules),
        ("options.layers_pattern", options.layers_pattern),
    ):
        if isinstance(value, str):
            yield key, value
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(options, name) or {}:
            yield f"options.{name}", pattern


@component
class ModelConfig:
    """The model of a run."""

    audio_encoder: EncoderPart = EncoderPart()
    llm: LlmPart = LlmPart()
    projector: Literal["mlp", "normed", "voxtral", "swiglu", "conv", "qformer", "transformer"] = (
        "mlp"
    )
    """mlp: linear, ReLU, linear; normed: LayerNorm, linear, GELU, linear, LayerNorm at the LLM's
    embedding size; voxtral, swiglu (Ultravox), conv, qformer, transformer: see
    docs/training.md"""
    projector_hidden_size: PositiveInt = 2048
    """width of the projector's hidden layer"""
    projector_init: Literal["random", "aligned"] = "random"
    """random | aligned: a warm start, which fits the projector to training speech and the LLM's
    token embeddings (see docs/models.md)"""
    projector_init_hours: PositiveFloat = 2.0
    """hours of speech that a warm start reads on all ranks together; 0.1 to 0.5 GB of host memory
    an hour"""
    audio_encoder_projector_ds_rate: PositiveInt = 8
    """encoder frames that make one token of the LLM"""
    audio_token: str = "<|AUDIO|>"
    """added to the tokenizer; marks the place of the audio in the prompt"""
    tag_audio_boundary: bool = False
    """true: a learned embedding before and after the audio"""
    frozen_parameters: list[str] = Field(default=[])
    """glob patterns of further parameters that are not trained, for example projector.* or
    audio_encoder.layers.[0-3].*"""
    exclude_from_checkpoint: list[str] = Field(default=[])
    """parts (audio_encoder, llm) that exported models leave out and load from the base model's
    directory"""

    @property
    def frozen_parts(self) -> list[str]:
        """Names of the parts that are not trained."""
        return [name for name in PRETRAINED_PARTS if getattr(self, name).frozen]

    @property
    def adapted_parts(self) -> list[str]:
        """Names of the parts that have adapters."""
        adapters = {name: getattr(self, name).lora for name in PRETRAINED_PARTS}
        return [name for name, lora in adapters.items() if lora is not None and lora.r]

    def check_pretrained(self) -> None:
        """Raise UserError if a part has neither a pretrained model nor a size."""
        for name in PRETRAINED_PARTS:
            part = getattr(self, name)
            if part.pretrained_model or (name == "audio_encoder" and part.size):
                continue
            key = f"model.{name}.pretrained_model"
            fix = "Give the directory of a pretrained model."
            if part.model_type and is_directory_or_hub_id(part.model_type):
                fix = f"To start from that model, set {key}={part.model_type} too."
            elif name == "audio_encoder" and encoder_sizes(part.model_type):
                sizes = ", ".join(encoder_sizes(part.model_type))
                fix += f" To start from random weights, set model.audio_encoder.size ({sizes})."
            raise UserError(f"{key} is not set. {fix}")

    def __post_init__(self) -> None:
        check_projector(
            self.projector,
            rate=self.audio_encoder_projector_ds_rate,
            hidden_size=self.projector_hidden_size,
            warm_start=self.projector_init == "aligned",
        )
        if self.projector_init == "aligned" and self.projector_hidden_size < 2:
            raise UserError(
                f"model.projector_hidden_size={self.projector_hidden_size} is too small for "
                "model.projector_init=aligned. Use 2 or more; twice the LLM's width is best."
            )
        if not self.audio_token.strip():
            raise UserError(
                "model.audio_token is empty. Use a text that no prompt contains, for example "
                "<|AUDIO|>."
            )
        for name in self.exclude_from_checkpoint:
            self._check_excluded(name)

    def _check_excluded(self, name: str) -> None:
        if name not in PRETRAINED_PARTS:
            raise UserError(
                f"model.exclude_from_checkpoint: {name!r} is not a part. Available: "
                f"{', '.join(PRETRAINED_PARTS)}."
            )
        if name == "audio_encoder" and self.audio_encoder.size:
            raise UserError(
                f"model.exclude_from_checkpoint=[{name}], but an encoder of model.audio_encoder."
                f"size={self.audio_encoder.size} has no base model from which it could be loaded. "
                "Remove it from the list."
            )
        if not getattr(self, name).frozen:
            raise UserError(
                f"model.exclude_from_checkpoint=[{name}], but model.{name}.frozen=false trains it, "
                "and what it learns would be lost. Remove it from the list."
            )
