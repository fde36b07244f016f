"""Audio encoders of Hugging Face's transformers, in float32 or bfloat16.

An utterance's frames do not depend on its batch: utterances of one length are encoded together, and
others one after the other, without padding. Several published models need that. wav2vec 2.0's group
norm averages over the padding, and positional convolutions and Moonshine's group norm see it too.
"""

import bisect
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig
from transformers.integrations import deepspeed

from asrllm.audio.waves import ExtractsFeatures
from asrllm.defaults import RATE, PadTo30s
from asrllm.errors import UserError
from asrllm.models.encoders.hf_families import (
    WHISPER_30S,
    feature_frames,
    feature_sizes,
    hf_family,
    hf_features,
    output_width,
)
from asrllm.models.encoders.hf_weights import UNUSED_WEIGHT, read_hf
from asrllm.text_files import JsonObject

LONGEST_SECONDS = 3600  # most models have no limit but memory
SHORTEST_FEATURES = 2  # the fewest whose variance is defined


class HfEncoder(ExtractsFeatures):
    """An encoder of transformers, with the names of its weights below `model.`.

    Dropout is that of its config.json. Its own masking and the dropping of layers are off. Batch
    norms always use their stored statistics, so that an utterance does not depend on its batch.
    """

    whisper_features = False
    # ZeRO-3 gathers the encoder as a whole, because ranks run it a different number of times.
    unsplit_modules = ("HfEncoder",)

    def __init__(self, *, config: JsonObject, preprocessor: JsonObject) -> None:
        """Build an encoder.

        Args:
            config: the encoder's config.json.
            preprocessor: its preprocessor_config.json.
        """
        super().__init__()
        self.config = config
        self.family = hf_family(config)
        self.not_called = self.family.not_called
        self.output_dim = output_width(config)
        self.shortest, _ = self.sample_limits({"config": config})
        self.pad_to_30s = self.family.features == "mel of 30 s"
        self.max_frames = self.family.count_frames(WHISPER_30S, config)
        self.features = hf_features(config, preprocessor)
        own = AutoConfig.for_model(**config)
        with _unpartitioned():
            model = MODEL_MAPPING[type(own)](own)
        self.model: nn.Module = model.get_submodule(self.family.submodule)
        if hasattr(self.model, UNUSED_WEIGHT):
            delattr(self.model, UNUSED_WEIGHT)
        if hasattr(self.model, "feature_extractor"):
            # Else it requires a gradient of its input, which fails if ZeRO-3 has required one.
            self.model.feature_extractor._requires_grad = False

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            features: (N, T, F).
            lengths: number of features of each utterance (N,).

        Returns:
            Frames (N, T', output_dim), zero after the end, and their numbers (N,).
        """
        frames = self.family.count_frames(lengths, self.config)
        features = features.to(next(self.model.parameters()).dtype)
        longest = int(frames.max())
        rows: list[Tensor | None] = [None] * len(features)
        for length, places in self._groups(lengths).items():
            x = features[places, :length]
            output = self._run(x, lengths[places])
            for place, row, count in zip(places, output, frames[places].tolist(), strict=True):
                assert self.pad_to_30s or len(row) == count, (len(row), count)
                rows[place] = nn.functional.pad(row[:count], (0, 0, 0, longest - count))
        return torch.stack([row for row in rows if row is not None]), frames

    def run_one(self, features: Tensor) -> Tensor:
        """Return the frames (T', output_dim) of the features (T, F) of an utterance.

        They include the silence after it if the features always last 30 s.
        """
        length = torch.tensor([len(features)], device=features.device)
        return self._run(features[None], length)[0]

    def _groups(self, lengths: Tensor) -> dict[int, list[int]]:
        """Return the places of the utterances that are encoded together, by their length."""
        groups: dict[int, list[int]] = {}
        for place, length in enumerate(lengths.tolist()):
            key = WHISPER_30S if self.pad_to_30s else length
            groups.setdefault(key, []).append(place)
        return groups

    def _run(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Return the frames (N, T', output_dim) of features (N, T, F) of one length."""
        if self.family.features == "wave":
            return self.model(x[..., 0]).last_hidden_state
        if self.family.features == "mel":
            return self._run_chunks(x)
        if not self.pad_to_30s:
            return self.model(x).last_hidden_state
        options: dict[str, Tensor] = {}
        if self.family.masks_silence:
            # after the convolutions, before pairs of frames are averaged
            positions = torch.arange(WHISPER_30S // 2, device=x.device)
            silent = positions >= ((lengths + 1) // 2)[:, None]
            mask = torch.zeros(silent.shape, dtype=x.dtype, device=x.device)
            mask = mask.masked_fill(silent, torch.finfo(x.dtype).min)
            options["attention_mask"] = mask[:, None, None].expand(-1, -1, WHISPER_30S // 2, -1)
        return self.model(x.transpose(1, 2), **options).last_hidden_state

    def _run_chunks(self, x: Tensor) -> Tensor:
        """Return the frames of an encoder whose convolutions see chunks of the features."""
        count, length, _ = x.shape
        missing = -length % (2 * self.config["n_window"])
        mask = torch.ones(count, length, dtype=torch.long, device=x.device)
        row = self.model(
            nn.functional.pad(x.transpose(1, 2), (0, missing)),
            input_features_mask=nn.functional.pad(mask, (0, missing)),
        ).last_hidden_state
        return row.unflatten(0, (count, -1))

    def train(self, mode: bool = True) -> "HfEncoder":
        """Set the mode, but keep batch norms in eval mode."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def set_batch_count(self, step: int) -> None:
        """Do nothing: this encoder has no training schedules."""

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer's activations in the backward pass, if there is one."""
        if any(parameter.requires_grad for parameter in self.parameters()):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    @classmethod
    def from_fields(cls, values: JsonObject, *, pad_to_30s: PadTo30s) -> "HfEncoder":
        """See AudioEncoder."""
        if pad_to_30s:
            raise UserError(
                "data.pad_to_30s=true is for Whisper only, but model.audio_encoder.model_type is "
                "hf. Set data.pad_to_30s=false."
            )
        for name in ("config", "preprocessor"):
            if not isinstance(values.get(name), dict):
                raise UserError(f"{name}={values.get(name)!r} is not an object. Copy it again.")
        return cls(config=values["config"], preprocessor=values["preprocessor"])

    @staticmethod
    def make_features(values: JsonObject) -> nn.Module:
        """See AudioEncoder."""
        return hf_features(values["config"], values["preprocessor"])

    @staticmethod
    def feature_shape(values: JsonObject) -> tuple[int, int]:
        """See AudioEncoder."""
        return feature_sizes(values["config"])

    @staticmethod
    def frame_lengths(samples: Any, values: JsonObject) -> Any:
        """See AudioEncoder."""
        config = values["config"]
        return hf_family(config).count_frames(feature_frames(samples, config), config)

    @staticmethod
    def sample_limits(values: JsonObject) -> tuple[int, int]:
        """See AudioEncoder."""
        config = values["config"]

        def is_enough(samples: int) -> bool:
            features = feature_frames(samples, config)
            frames = hf_family(config).count_frames(features, config)
            return features >= SHORTEST_FEATURES and frames >= 1

        shortest = bisect.bisect_left(range(RATE), True, key=is_enough)
        longest = LONGEST_SECONDS
        if hf_family(config).features == "mel of 30 s":
            longest = WHISPER_30S // 100
        return shortest, longest * RATE

    @staticmethod
    def read_pretrained(path: str) -> tuple[JsonObject, dict[str, Tensor]]:
        """Read a Hugging Face directory. See AudioEncoder."""
        return read_hf(path)

    @staticmethod
    def sizes() -> dict[str, JsonObject]:
        """Return {}: the encoder needs pretrained weights. See AudioEncoder."""
        return {}

    def start_from_scratch(self) -> None:
        """Do nothing: the constructor has drawn the weights."""


@contextlib.contextmanager
def _unpartitioned() -> Iterator[None]:
    """Let transformers build a model as it does without ZeRO-3.

    With ZeRO-3, its positional convolutions register their weights as partitioned ones, which they
    are not before deepspeed.initialize().
    """
    configured = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = configured
