"""The `model` part of the run's configuration."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

from asrllm.errors import UserError, nearest
from asrllm.models.attention import backends
from asrllm.models.encoders.registry import encoder_kind

# of PEFT's LoraConfig, beside LoraPart's own: those that neither train something beside the adapters nor change the weights below them
PEFT_OPTIONS = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
    "lora_bias",
)


@dataclass(frozen=True, kw_only=True)
class LoraPart:
    """PEFT's LoraConfig (https://huggingface.co/docs/peft): Hu et al., "LoRA" (2021); Kalajdzievski, "rsLoRA" (2023); Liu et al., "DoRA"
    (2024). r = 0: no adapters. options: those of PEFT_OPTIONS."""

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: list[str] | str
    use_rslora: bool = False
    use_dora: bool = False
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.r < 0:
            raise UserError(f"lora.r={self.r} must not be below 0; 0 trains without adapters")
        if not 0 <= self.lora_dropout < 1 or self.lora_alpha < 1:
            raise UserError(
                f"lora: lora_dropout={self.lora_dropout} must be 0 to below 1, lora_alpha={self.lora_alpha} at least 1"
            )
        if self.r and not self.target_modules:
            raise UserError(
                "lora.target_modules names no layer: name some, such as [q_proj,v_proj]"
            )
        for key, value in (self.options or {}).items():
            if key not in PEFT_OPTIONS:
                raise UserError(
                    f"lora.options: {key!r} is none of those that go with packed training: {nearest(key, PEFT_OPTIONS)}"
                )
            if key == "init_lora_weights" and value not in (True, False, "gaussian", "orthogonal"):
                raise UserError(
                    f"lora.options.init_lora_weights={value!r} changes the base weights: take true or gaussian"
                )

    def as_peft(self) -> dict[str, Any] | None:
        """The fields for PEFT; None without adapters. Those that are off are left out."""
        if not self.r:
            return None
        given = {
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": self.target_modules,
        }
        return (
            given
            | {key: True for key in ("use_rslora", "use_dora") if getattr(self, key)}
            | (self.options or {})
        )


@dataclass(frozen=True, kw_only=True)
class EncoderPart:
    """The audio encoder.

    Attributes:
        model_type: a name in ENCODERS, or a directory or hub id with a config.json.
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
        """Its name in ENCODERS."""
        return encoder_kind(self.model_type)


@dataclass(frozen=True, kw_only=True)
class LlmPart:
    model_type: str | None
    pretrained_model: str | None
    frozen: bool
    lora: LoraPart | None
    chat_template: Literal["chatml"] | None
    attention: Literal["auto", "sdpa", "flash", "varlen", "flex"] = "auto"

    def __post_init__(self) -> None:
        check_lora("llm", self.lora, frozen=self.frozen)
        if self.attention != "auto" and (reason := backends()[self.attention]):
            raise UserError(
                f"model.llm.attention={self.attention} cannot run here ({reason}): leave it at auto"
            )


def check_lora(part: str, lora: LoraPart | None, *, frozen: bool) -> None:
    if lora is not None and lora.r and not frozen:
        raise UserError(
            f"model.{part}.frozen=false trains all of it, and model.{part}.lora adds adapters: set model.{part}.lora.r=0"
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
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
        return [
            name
            for name, part in (("audio_encoder", self.audio_encoder), ("llm", self.llm))
            if part.frozen
        ]

    def __post_init__(self) -> None:
        for key, part in (("audio_encoder", self.audio_encoder), ("llm", self.llm)):
            if not part.pretrained_model:
                raise UserError(
                    f"model.{key}.pretrained_model is not set: give the directory of a pretrained model"
                )
        for key in ("audio_encoder_projector_ds_rate", "projector_hidden_size"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key}={getattr(self, key)} must be at least 1")
        if not self.audio_token.strip():
            raise UserError(
                "model.audio_token is empty: give a text that no prompt contains, such as <|AUDIO|>"
            )
        for part_name in self.exclude_from_checkpoint:
            if part_name in ("audio_encoder", "llm") and not getattr(self, part_name).frozen:
                raise UserError(
                    f"model.exclude_from_checkpoint=[{part_name}], but model.{part_name}.frozen=false trains it: what it learns would be "
                    "lost; leave it out of the list"
                )
            if part_name not in ("audio_encoder", "llm"):
                raise UserError(
                    f"model.exclude_from_checkpoint: {part_name!r} is not a part: choose from audio_encoder, llm"
                )
