"""The audio encoders by name.

To add one, write a file like whisper.py, add a line to ENCODERS, and write a test like
tests/models/encoders/test_whisper.py.
"""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from asrllm.defaults import ENCODER_KEY, PadTo30s
from asrllm.errors import UserError, nearest
from asrllm.models.encoders.hf import HfEncoder
from asrllm.models.encoders.hf_families import HF_FAMILIES, HF_PARTS
from asrllm.models.encoders.whisper import WhisperEncoder
from asrllm.models.encoders.zipformer.modeling import ZipformerEncoder
from asrllm.models.fingerprint import is_hub_id, resolve_pretrained
from asrllm.text_files import JsonObject, read_json_object


class AudioEncoder(Protocol):
    """The interface of an encoder, which is an nn.Module.

    Attributes:
        output_dim: width of its frames.
        whisper_features: whether its features are Whisper's, which can be padded to 30 s.
        unsplit_modules: names of the classes of its layers. ZeRO-3 gathers each as a whole.
        features: module that maps waveforms (N, samples) at 16 kHz and lengths (N,) to features
            (N, T, F) and lengths (N,).
    """

    output_dim: int
    whisper_features: bool
    unsplit_modules: tuple[str, ...]
    features: nn.Module

    def __call__(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (N, T, F) and lengths (N,) to frames and lengths.

        Returns:
            Frames (N, T', output_dim), and their numbers (N,).
        """
        ...

    def set_batch_count(self, step: int) -> None:
        """Set the number of completed steps. It is called before every training step."""
        ...

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        ...

    @classmethod
    def from_fields(cls, values: JsonObject, *, pad_to_30s: PadTo30s) -> "AudioEncoder":
        """Return an encoder without its weights.

        Args:
            values: the encoder's fields.
            pad_to_30s: whether features are padded to 30 s, see WhisperEncoder.

        Raises:
            UserError: a field is wrong, or the encoder does not support pad_to_30s.
        """
        ...

    @staticmethod
    def make_features(values: JsonObject) -> nn.Module:
        """Return the module that computes the encoder's features.

        Args:
            values: the encoder's fields, and `pad_to_30s`.
        """
        ...

    @staticmethod
    def feature_shape(values: JsonObject) -> tuple[int, int]:
        """Return the width of a frame of the features, and how many samples there are for each.

        Args:
            values: the encoder's fields.
        """
        ...

    @staticmethod
    def frame_lengths(samples: Any, values: JsonObject) -> Any:
        """Return how many frames the encoder gives for a waveform.

        Args:
            samples: length of the waveform in samples, as an int, an array or a tensor.
            values: the encoder's fields, and `pad_to_30s`.
        """
        ...

    @staticmethod
    def sample_limits(values: JsonObject) -> tuple[int, int]:
        """Return the smallest and largest number of samples at 16 kHz that the encoder accepts.

        Args:
            values: the encoder's fields.
        """
        ...

    @staticmethod
    def read_pretrained(path: str) -> tuple[JsonObject, dict[str, Tensor]]:
        """Return the fields and the state dict in a pretrained model's directory or file."""
        ...

    @staticmethod
    def sizes() -> dict[str, JsonObject]:
        """Return all fields of the published sizes, which train without pretrained weights.

        {}: the encoder needs pretrained weights.
        """
        ...

    def start_from_scratch(self) -> None:
        """Draw new weights, and begin the training schedules."""
        ...


ENCODERS: dict[str, type[AudioEncoder]] = {
    "whisper": WhisperEncoder,
    "zipformer": ZipformerEncoder,
    "hf": HfEncoder,
}


def encoder_sizes(model_type: str) -> dict[str, JsonObject]:
    """Return the fields of an encoder's sizes, or {} if it needs pretrained weights.

    Args:
        model_type: its name in ENCODERS. Any other text has no sizes.
    """
    return ENCODERS[model_type].sizes() if model_type in ENCODERS else {}


def build_encoder(fields: JsonObject, *, pad_to_30s: PadTo30s) -> AudioEncoder:
    """Return an encoder without its weights.

    Args:
        fields: the `audio_encoder` part of AsrLlmConfig.
        pad_to_30s: whether features are padded to 30 s, see WhisperEncoder.
    """
    kind = encoder_class(fields["model_type"])
    values = {name: value for name, value in fields.items() if name != "model_type"}
    return kind.from_fields(values, pad_to_30s=pad_to_30s)


def encoder_kind(model_type: str) -> str:
    """Return the name of an encoder in ENCODERS.

    Args:
        model_type: that name, or a directory or hub id with a config.json that contains it.

    Raises:
        UserError: it is neither.
    """
    if model_type in ENCODERS or not (Path(model_type).is_dir() or is_hub_id(model_type)):
        if "/" in model_type:
            raise UserError(
                f"model.audio_encoder.model_type={model_type!r} was not found, or is not a "
                "directory. Give a directory with a config.json, or the name of an encoder. "
                f"Available: {', '.join(ENCODERS)}."
            )
        encoder_class(model_type)
        return model_type
    config = resolve_pretrained(model_type) / "config.json"
    stated = read_json_object(config, "the encoder's configuration").get("model_type")
    kind = _known_kind(stated)
    if kind is None:
        raise UserError(
            f"{str(config)!r} has model_type={stated!r}, which is not supported. "
            f"Available: {', '.join([*ENCODERS, *HF_FAMILIES, *HF_PARTS])}."
        )
    return kind


def _known_kind(stated: object) -> str | None:
    """Return the name in ENCODERS for the model_type of a config.json, or None if unknown."""
    if not isinstance(stated, str):
        return None
    if stated in HF_FAMILIES or stated in HF_PARTS:
        return "hf"
    return stated if stated in ENCODERS else None


def check_encoder_kind(kind: str, path: Path) -> None:
    """Check that the encoder at a path is of the configured kind, if its config.json names one.

    Args:
        kind: name in ENCODERS.
        path: directory or checkpoint file.

    Raises:
        UserError: the config.json names another encoder.
    """
    config = path / "config.json"
    if not config.is_file():
        return
    found = _known_kind(read_json_object(config, "the encoder's configuration").get("model_type"))
    if found not in (None, kind):
        raise UserError(
            f"model.audio_encoder.model_type={kind} does not match {ENCODER_KEY}={str(path)!r}. "
            f"Set model.audio_encoder.model_type={found}."
        )


def encoder_class(model_type: str) -> type[AudioEncoder]:
    """Return the class of an encoder by its name in ENCODERS."""
    if model_type not in ENCODERS:
        hint = nearest(model_type, ENCODERS)
        raise UserError(f"model.audio_encoder.model_type={model_type!r} is unknown. {hint}")
    return ENCODERS[model_type]
