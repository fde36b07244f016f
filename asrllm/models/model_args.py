"""The `model` part of a run's configuration."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from asrllm.errors import UserError, nearest
from asrllm.models.attention import backends
from asrllm.models.encoders.registry import encoder_kind
from asrllm.models.fingerprint import is_hub_id

# Further options of PEFT's LoraConfig that LoraPart accepts. They neither train weights besides the
# adapters nor change the weights below them.
PEFT_OPTIONS = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "lora_bias",
)
PRETRAINED_PARTS = ("audio_encoder", "llm")


@dataclass(frozen=True, kw_only=True)
class LoraPart:
    """Adapters of a part. The fields are those of PEFT's LoraConfig.

    See https://huggingface.co/docs/peft; Hu et al., "LoRA" (2021); Kalajdzievski, "rsLoRA" (2023);
    Liu et al., "DoRA" (2024).

    Attributes:
        r: rank; 0 means no adapters.
        lora_alpha: alpha; the adapters are scaled by lora_alpha / r.
        lora_dropout: dropout of the adapters' input.
        target_modules: names of the adapted layers, or a regular expression.
        use_rslora: scale by lora_alpha / sqrt(r) instead.
        use_dora: train a magnitude besides.
        options: further options, of those in PEFT_OPTIONS.
    """

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: list[str] | str
    use_rslora: bool = False
    use_dora: bool = False
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.r < 0:
            raise UserError(f"lora.r={self.r} is negative. Use 0 to train without adapters.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(
                f"lora.lora_dropout={self.lora_dropout} is out of range. Use a value of at least 0 "
                "and below 1."
            )
        if self.lora_alpha < 1:
            raise UserError(f"lora.lora_alpha={self.lora_alpha} is below 1. Use at least 1.")
        if self.r and not self.target_modules:
            raise UserError(
                "lora.target_modules is empty. Name the layers to adapt, for example "
                "[q_proj,v_proj]."
            )
        for key, value in (self.options or {}).items():
            if key not in PEFT_OPTIONS:
                raise UserError(
                    f"lora.options: {key!r} is not supported: {nearest(key, PEFT_OPTIONS)}"
                )
            if key == "init_lora_weights" and value not in (True, False, "gaussian", "orthogonal"):
                raise UserError(
                    f"lora.options.init_lora_weights={value!r} changes the base weights. Use true "
                    "or gaussian."
                )

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
        return options | (self.options or {})


@dataclass(frozen=True, kw_only=True)
class EncoderPart:
    """The audio encoder.

    Attributes:
        model_type: a name in ENCODERS, or a directory or hub id with a config.json.
        pretrained_model: directory, file or hub id of the pretrained weights.
        frozen: whether its weights are not trained.
        lora: its adapters.
    """

    model_type: str
    pretrained_model: str | None
    frozen: bool
    lora: LoraPart | None = None

    def __post_init__(self) -> None:
        encoder_kind(self.model_type)
        check_lora("audio_encoder", self.lora, frozen=self.frozen)

    @functools.cached_property
    def kind(self) -> str:
        """The encoder's name in ENCODERS."""
        return encoder_kind(self.model_type)


@dataclass(frozen=True, kw_only=True)
class LlmPart:
    """The LLM.

    Attributes:
        model_type: its family, checked against config.json; None accepts any.
        pretrained_model: directory or hub id of the pretrained weights.
        frozen: whether its weights are not trained.
        lora: its adapters.
        chat_template: "chatml" replaces the tokenizer's own chat template.
        attention: backend of the attention over packed sequences.
    """

    model_type: str | None
    pretrained_model: str | None
    frozen: bool
    lora: LoraPart | None
    chat_template: Literal["chatml"] | None
    attention: Literal["auto", "sdpa", "flash", "varlen"] = "auto"

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
    """Raise UserError if a part has adapters although it is trained in full."""
    if lora is not None and lora.r and not frozen:
        raise UserError(
            f"model.{part}.frozen=false trains all weights of the {part}, but model.{part}.lora.r="
            f"{lora.r} adds adapters to it. Set model.{part}.lora.r=0 or model.{part}.frozen=true."
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model of a run.

    Attributes:
        audio_encoder: the audio encoder.
        llm: the LLM.
        projector: a name in PROJECTORS.
        projector_hidden_size: width of the projector's hidden layer.
        audio_encoder_projector_ds_rate: number of encoder frames that make one audio token.
        audio_token: text that stands for an audio in a chat.
        tag_audio_boundary: put a learned embedding before and after each audio.
        frozen_parameters: glob patterns of the names of further parameters that are not trained.
        exclude_from_checkpoint: frozen parts that checkpoints do not contain.
    """

    audio_encoder: EncoderPart
    llm: LlmPart
    projector: Literal["mlp", "normed"]
    projector_hidden_size: int
    audio_encoder_projector_ds_rate: int
    audio_token: str
    tag_audio_boundary: bool
    frozen_parameters: list[str]
    exclude_from_checkpoint: list[str]

    @property
    def frozen_parts(self) -> list[str]:
        """Names of the parts that are not trained."""
        return [name for name in PRETRAINED_PARTS if getattr(self, name).frozen]

    def __post_init__(self) -> None:
        for name in PRETRAINED_PARTS:
            if not getattr(self, name).pretrained_model:
                key = f"model.{name}.pretrained_model"
                fix = "Give the directory of a pretrained model."
                model_type = getattr(self, name).model_type
                if model_type and is_directory_or_hub_id(model_type):
                    fix = f"To train on from that model, set {key}={model_type} too."
                raise UserError(f"{key} is not set. {fix}")
        for key in ("audio_encoder_projector_ds_rate", "projector_hidden_size"):
            value = getattr(self, key)
            if value < 1:
                raise UserError(f"model.{key}={value} is below 1. Use at least 1.")
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
                f"model.exclude_from_checkpoint: {name!r} is not a part. Choose from "
                f"{', '.join(PRETRAINED_PARTS)}."
            )
        if not getattr(self, name).frozen:
            raise UserError(
                f"model.exclude_from_checkpoint=[{name}], but model.{name}.frozen=false trains it, "
                "and what it learns would be lost. Remove it from the list."
            )
