"""What distinguishes the families of Hugging Face's audio encoders: features and lengths."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from asrllm.audio.features import WHISPER_HOP, WhisperFeatures, whisper_frames
from asrllm.audio.hf_features import (
    PARAKEET_HOP,
    SEAMLESS_STACK,
    ParakeetFeatures,
    SeamlessFeatures,
    WaveFeatures,
    seamless_frames,
)
from asrllm.errors import UserError
from asrllm.text_files import JsonObject

Features = Literal["wave", "seamless", "parakeet", "mel", "mel of 30 s"]
WHISPER_30S = 3000  # frames of the features


@dataclass(frozen=True, kw_only=True)
class HfFamily:
    """A family of encoders.

    Attributes:
        features: kind of its features.
        count_frames: maps a number of features, and the encoder's config.json, to the number of
            frames.
        width: name of the field with the width of the frames.
        prefixes: how the names of its weights may begin in a model that contains it.
        submodule: name of the encoder in transformers' base model; "" if it is that model.
        masks_silence: whether a mask excludes the silence after an utterance, for encoders whose
            features always last 30 s.
        not_called: names of layers whose weights are read by another layer, so that adapters on
            them have no effect.
    """

    features: Features
    count_frames: Callable[[Any, JsonObject], Any]
    width: str = "hidden_size"
    prefixes: tuple[str, ...]
    submodule: str = ""
    masks_silence: bool = False
    not_called: tuple[str, ...] = ()


def convolved(length: Any, kernel: int, stride: int, padding: int = 0) -> Any:
    """Return the length of a convolution's output, for an int, an array or a tensor."""
    return (length + 2 * padding - kernel) // stride + 1


def wave_frames(samples: Any, config: JsonObject) -> Any:
    """Return the frames of the convolutions and the optional adapter of wav2vec 2.0."""
    for kernel, stride in zip(config["conv_kernel"], config["conv_stride"], strict=True):
        samples = convolved(samples, kernel, stride)
    if config.get("add_adapter"):
        for _ in range(config["num_adapter_layers"]):
            samples = convolved(samples, config["adapter_kernel_size"], config["adapter_stride"], 1)
    return samples


def seamless_outputs(pairs: Any, config: JsonObject) -> Any:
    """Return the frames of wav2vec2-bert, which may have an adapter."""
    if config.get("add_adapter"):
        stride = config["adapter_stride"]
        for _ in range(config["num_adapter_layers"]):
            pairs = convolved(pairs, config["adapter_kernel_size"], stride, stride // 2)
    return pairs


def parakeet_frames(frames: Any, config: JsonObject) -> Any:
    """Return the frames of the subsampling convolutions of a FastConformer."""
    kernel = config["subsampling_conv_kernel_size"]
    for _ in range(round(math.log2(config["subsampling_factor"]))):
        frames = convolved(frames, kernel, config["subsampling_conv_stride"], (kernel - 1) // 2)
    return frames


def moonshine_frames(samples: Any, config: JsonObject) -> Any:
    """Return the frames of Moonshine's convolutions, whose sizes are fixed."""
    return convolved(convolved(convolved(samples, 127, 64), 7, 3), 3, 2)


def halved(frames: Any, config: JsonObject) -> Any:
    """Return the frames of Whisper's convolutions: 50 Hz."""
    return convolved(frames, 3, 2, 1)


def quartered(frames: Any, config: JsonObject) -> Any:
    """Return the frames of Whisper's convolutions and an average of pairs: 25 Hz."""
    return convolved(frames, 3, 2, 1) // 2


def chunked_frames(frames: Any, config: JsonObject) -> Any:
    """Return the frames of Qwen3-ASR's convolutions, which see chunks of about a second."""
    chunk = 2 * config["n_window"]
    of_chunk, of_rest = chunk, frames % chunk
    for _ in range(3):
        of_chunk, of_rest = -(-of_chunk // 2), -(-of_rest // 2)
    return frames // chunk * of_chunk + of_rest


def _wave_family(prefix: str, not_called: tuple[str, ...] = ()) -> HfFamily:
    return HfFamily(
        features="wave", count_frames=wave_frames, prefixes=(prefix,), not_called=not_called
    )


# by model_type of the encoder's own config.json
HF_FAMILIES: dict[str, HfFamily] = {
    "wav2vec2": _wave_family("wav2vec2."),
    "wav2vec2-conformer": _wave_family("wav2vec2_conformer."),
    "hubert": _wave_family("hubert."),
    # Its attention passes the weights to a function of torch.
    "wavlm": _wave_family("wavlm.", ("q_proj", "k_proj", "v_proj", "out_proj")),
    "unispeech-sat": _wave_family("unispeech_sat."),
    "data2vec-audio": _wave_family("data2vec_audio."),
    "wav2vec2-bert": HfFamily(
        features="seamless", count_frames=seamless_outputs, prefixes=("wav2vec2_bert.",)
    ),
    "parakeet_encoder": HfFamily(
        features="parakeet", count_frames=parakeet_frames, prefixes=("encoder.", "model.encoder.")
    ),
    "moonshine": HfFamily(
        features="wave",
        count_frames=moonshine_frames,
        prefixes=("model.encoder.", "encoder."),
        submodule="encoder",
    ),
    "qwen3_asr_encoder": HfFamily(
        features="mel",
        count_frames=chunked_frames,
        width="d_model",
        prefixes=("audio_tower.", "model.audio_tower."),
    ),
    "qwen2_audio_encoder": HfFamily(
        features="mel of 30 s",
        count_frames=quartered,
        width="d_model",
        prefixes=("audio_tower.", "model.audio_tower."),
        masks_silence=True,
    ),
    "voxtral_encoder": HfFamily(
        features="mel of 30 s",
        count_frames=halved,
        prefixes=("audio_tower.", "model.audio_tower."),
    ),
}
# models that contain an encoder, by model_type, and the field of config.json that describes it
HF_PARTS = {
    "parakeet_ctc": "encoder_config",
    "parakeet_rnnt": "encoder_config",
    "parakeet_tdt": "encoder_config",
    "qwen2_audio": "audio_config",
    "qwen3_asr": "audio_config",
    "voxtral": "audio_config",
}


def hf_family(config: JsonObject) -> HfFamily:
    """Return the family of an encoder.

    Args:
        config: the encoder's config.json.

    Raises:
        UserError: the family is not supported.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in HF_FAMILIES:
        raise UserError(
            f"model_type={kind!r} is not a supported audio encoder: it has no formula for the "
            f"number of its frames. Available: {', '.join([*HF_FAMILIES, *HF_PARTS])}."
        )
    return HF_FAMILIES[kind]


def output_width(config: JsonObject) -> int:
    """Return the width of an encoder's frames."""
    if config.get("add_adapter"):
        return config["output_hidden_size"]
    return config[hf_family(config).width]


def feature_frames(samples: Any, config: JsonObject) -> Any:
    """Return the number of features of a waveform."""
    kind = hf_family(config).features
    if kind == "seamless":
        return seamless_frames(samples) // SEAMLESS_STACK
    if kind == "parakeet":
        return samples // PARAKEET_HOP
    if kind in ("mel", "mel of 30 s"):
        return whisper_frames(samples)
    return samples


def feature_sizes(config: JsonObject) -> tuple[int, int]:
    """Return the width of a feature, and how many samples there are for each."""
    kind = hf_family(config).features
    if kind == "seamless":
        return config["feature_projection_input_dim"], SEAMLESS_STACK * PARAKEET_HOP
    if kind in ("parakeet", "mel", "mel of 30 s"):
        return config["num_mel_bins"], WHISPER_HOP
    return 1, 1


def hf_features(config: JsonObject, preprocessor: JsonObject) -> nn.Module:
    """Return the module that computes an encoder's features.

    Args:
        config: the encoder's config.json.
        preprocessor: its preprocessor_config.json.
    """
    kind = hf_family(config).features
    width, _ = feature_sizes(config)
    if kind == "seamless":
        return SeamlessFeatures(width // SEAMLESS_STACK)
    if kind == "parakeet":
        return ParakeetFeatures(width)
    if kind in ("mel", "mel of 30 s"):
        return WhisperFeatures(width, pad_to_30s=kind == "mel of 30 s")
    return WaveFeatures(preprocessor.get("do_normalize", True))
