"""The audio encoders by name.

To add one, write a file like whisper.py, a line in ENCODERS and a test like
tests/models/encoders/test_whisper.py.
"""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from asrllm.errors import UserError, nearest
from asrllm.models.encoders.whisper import WhisperEncoder
from asrllm.models.encoders.zipformer.modeling import ZipformerEncoder
from asrllm.models.fingerprint import is_hub_id, resolve_pretrained
from asrllm.text_files import read_json_object


class AudioEncoder(Protocol):
    """What the model asks of an encoder, an nn.Module.

    features: module, waveforms (N, samples) at 16 kHz and lengths (N,) -> features (N, T, F) and lengths (N,).
    whisper_features: whether those are Whisper's, which may be padded to 30 s.
    unsplit_modules: names of the classes of its layers, each gathered as a whole under ZeRO-3.
    frame_lengths: samples of a waveform -> frames that forward() gives, as arithmetic on ints, arrays or tensors.
    """

    output_dim: int
    whisper_features: bool
    unsplit_modules: tuple[str, ...]
    features: nn.Module

    def __call__(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(N, T, F), (N,) -> (N, T', output_dim), (N,)"""
        ...

    def set_batch_count(self, step: int) -> None:
        """Called before every training step with the steps done, for what depends on it."""
        ...

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        ...

    @classmethod
    def from_fields(cls, values: dict[str, Any], *, pad_to_30s: bool) -> "AudioEncoder":
        """An encoder without its weights. Raises UserError where pad_to_30s is not for it."""
        ...

    @staticmethod
    def frame_lengths(samples: Any) -> Any: ...

    @staticmethod
    def sample_limits(values: dict[str, Any]) -> tuple[int, int]:
        """The fewest and the most samples at 16 kHz that an encoder of these fields takes."""
        ...

    @staticmethod
    def read_pretrained(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(the fields of the encoder, its state dict) from a pretrained model's directory or file."""
        ...


ENCODERS: dict[str, type[AudioEncoder]] = {"whisper": WhisperEncoder, "zipformer": ZipformerEncoder}


def build_encoder(fields: dict[str, Any], *, pad_to_30s: bool) -> AudioEncoder:
    """An encoder without its weights, from the `audio_encoder` part of AsrLlmConfig."""
    kind = encoder_class(fields["model_type"])
    return kind.from_fields(
        {k: v for k, v in fields.items() if k != "model_type"}, pad_to_30s=pad_to_30s
    )


def encoder_kind(model_type: str) -> str:
    """Return the name of an encoder in ENCODERS.

    Args:
        model_type: that name, or a directory or hub id with a config.json that says it.

    Raises:
        UserError: it is neither.
    """
    if model_type in ENCODERS or not (Path(model_type).is_dir() or is_hub_id(model_type)):
        encoder_class(model_type)
        return model_type
    config = resolve_pretrained(model_type) / "config.json"
    kind = read_json_object(config, "the encoder's configuration").get("model_type")
    if kind not in ENCODERS:
        raise UserError(
            f"{str(config)!r} has model_type={kind!r}, which is none of {', '.join(ENCODERS)}. Give another encoder."
        )
    return str(kind)


def encoder_class(model_type: str) -> type[AudioEncoder]:
    if model_type not in ENCODERS:
        raise UserError(
            f"model.audio_encoder.model_type={model_type!r} is unknown: {nearest(model_type, ENCODERS)}"
        )
    return ENCODERS[model_type]
