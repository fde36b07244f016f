"""The `model` part of the run's configuration."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from asrllm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EncoderPart:
    model_type: Literal["whisper", "zipformer"]
    pretrained_model: str | None
    frozen: bool


@dataclass(frozen=True, kw_only=True)
class LoraPart:
    """PEFT's LoraConfig: https://huggingface.co/docs/peft, Hu et al., "LoRA" (2021)."""

    r: int
    lora_alpha: int
    lora_dropout: float
    target_modules: list[str]

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"model.llm.lora.r={self.r} must be at least 1; model.llm.lora=null trains without adapters")
        if not 0 <= self.lora_dropout < 1 or self.lora_alpha < 1:
            raise UserError(
                f"model.llm.lora: lora_dropout={self.lora_dropout} must be 0 to below 1, lora_alpha={self.lora_alpha} at least 1"
            )
        if not self.target_modules:
            raise UserError("model.llm.lora.target_modules=[] names no layer: name some, such as [q_proj,v_proj]")

    def as_peft(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class LlmPart:
    model_type: str | None
    pretrained_model: str | None
    frozen: bool
    lora: LoraPart | None
    chat_template: Literal["chatml"] | None

    def __post_init__(self) -> None:
        if self.lora is not None and not self.frozen:
            raise UserError("model.llm.frozen=false trains the whole LLM, and model.llm.lora adds adapters: set model.llm.lora=null")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    audio_encoder: EncoderPart
    llm: LlmPart
    projector: Literal["mlp", "normed"]
    projector_hidden_size: int
    audio_encoder_projector_ds_rate: int
    audio_token: str
    tag_audio_boundary: bool
    exclude_from_checkpoint: list[str]

    def __post_init__(self) -> None:
        for key, part in (("audio_encoder", self.audio_encoder), ("llm", self.llm)):
            if not part.pretrained_model:
                raise UserError(f"model.{key}.pretrained_model is not set: give the directory of a pretrained model")
        for key in ("audio_encoder_projector_ds_rate", "projector_hidden_size"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key}={getattr(self, key)} must be at least 1")
        if not self.audio_token.strip():
            raise UserError("model.audio_token is empty: give a text that no prompt contains, such as <|AUDIO|>")
        for part_name in self.exclude_from_checkpoint:
            if part_name not in ("audio_encoder", "llm"):
                raise UserError(f"model.exclude_from_checkpoint: {part_name!r} is not a part: choose from audio_encoder, llm")
