"""Whisper's encoder for audio of any length up to 30 s.

Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022). The published
code pads every utterance to 30 s. Here only the true frames are computed: padding within a batch is
masked in the convolutions, and the layers run on one packed row of all utterances' frames. The
state dict has transformers' key names below `model.encoder.`.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asrllm.audio.features import WHISPER_HOP, WhisperFeatures, whisper_frames
from asrllm.audio.waves import ExtractsFeatures
from asrllm.defaults import KEEP_SILENCE, PadTo30s
from asrllm.errors import UserError
from asrllm.models.attention import varlen_attention
from asrllm.models.encoders.whisper_weights import check_sizes, read_whisper
from asrllm.text_files import JsonObject

# mel bins, width, layers and heads
WHISPER_SIZES = {
    "tiny": (80, 384, 4, 6),
    "base": (80, 512, 6, 8),
    "small": (80, 768, 12, 12),
    "medium": (80, 1024, 24, 16),
    "large-v3": (128, 1280, 32, 20),
}
WHISPER_FRAMES = 1500  # of 30 s, at 50 Hz
INITIAL_STD = 0.02  # of the weights, as in transformers
LONGEST_PERIOD = 10000  # of the sinusoidal positions, in frames / (2 pi)


class WhisperEncoder(ExtractsFeatures):
    """Whisper's encoder. Its output is at 50 Hz."""

    whisper_features = True
    unsplit_modules = ("WhisperLayer",)

    def __init__(
        self,
        *,
        num_mel_bins: int,
        d_model: int,
        encoder_layers: int,
        encoder_attention_heads: int,
        encoder_ffn_dim: int,
        max_source_positions: int = 1500,
        pad_to_30s: PadTo30s = False,
    ) -> None:
        """Build an encoder. The arguments are fields of transformers' WhisperConfig.

        Args:
            num_mel_bins: number of features in a frame.
            d_model: width of the layers.
            encoder_layers: number of layers.
            encoder_attention_heads: number of attention heads.
            encoder_ffn_dim: width of the feed-forward layers.
            max_source_positions: maximum number of frames of an utterance.
            pad_to_30s: attend to the silence after an utterance, as the published code does. The
                frames that are returned are the true ones in either case, except that
                "keep_silence" returns those of all 30 s.

        Raises:
            UserError: pad_to_30s is set, and max_source_positions is less than 30 s.
        """
        super().__init__()
        if pad_to_30s and max_source_positions < WHISPER_FRAMES:
            raise UserError(
                f"max_source_positions={max_source_positions} is too small for "
                f"data.pad_to_30s={str(pad_to_30s).lower()}, which needs {WHISPER_FRAMES}. Set "
                "data.pad_to_30s=false."
            )
        self.output_dim = d_model
        self.shortest = WHISPER_HOP
        self.max_frames = max_source_positions
        self.pad_to_30s = pad_to_30s
        self.recompute = False
        self.features = WhisperFeatures(num_mel_bins, bool(pad_to_30s))
        self.conv1 = nn.Conv1d(num_mel_bins, d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(d_model, d_model, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(max_source_positions, d_model)
        self.layers = nn.ModuleList(
            WhisperLayer(d_model, encoder_attention_heads, encoder_ffn_dim)
            for _ in range(encoder_layers)
        )
        self.layer_norm = nn.LayerNorm(d_model)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            features: (N, T, num_mel_bins) at 100 Hz.
            lengths: number of frames of each utterance (N,).

        Returns:
            Frames (N, T', d_model) at 50 Hz, and their numbers (N,) = (lengths + 1) // 2, or T' if
            the silence is kept.

        Raises:
            UserError: an utterance has no frame, or lasts more than 30 s, or the silence is kept
                and the features are not those of 30 s.
        """
        frames = (lengths + 1) // 2
        if int(lengths.min()) < 1 or int(frames.max()) > self.max_frames:
            raise UserError(
                f"Whisper's encoder accepts 10 ms to {self.max_frames / 50:g} s of audio, but the "
                f"batch has {lengths.min() / 100:g} s to {lengths.max() / 100:g} s. Cut longer "
                "recordings, and drop shorter ones."
            )
        if self.pad_to_30s == KEEP_SILENCE:
            _check_padded(features)
        x = self._convolve(features, lengths)
        positions = torch.arange(x.shape[1], device=x.device)
        x = x + self.embed_positions(positions)
        attended = torch.full_like(frames, x.shape[1]) if self.pad_to_30s else frames
        if self.pad_to_30s == KEEP_SILENCE:
            frames = attended
        return self._transform(x, attended), frames

    def _convolve(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Map features (N, T, num_mel_bins) to (N, T', d_model)."""
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        if not self.pad_to_30s:
            valid = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        x = features.to(self.conv1.weight.dtype).mul(valid[..., None])
        x = x.transpose(1, 2)
        # The second convolution sees zeros after the end, as it does for an utterance alone.
        x = F.gelu(self.conv1(x)).mul(valid[:, None])
        return F.gelu(self.conv2(x)).transpose(1, 2)

    def _transform(self, x: Tensor, frames: Tensor) -> Tensor:
        """Apply the layers.

        Args:
            x: (N, T', d_model).
            frames: number of frames of each utterance that are attended to (N,).

        Returns:
            (N, T', d_model), zero after those frames.
        """
        lengths = frames.tolist()
        parts = [part[:length] for part, length in zip(x, lengths, strict=True)]
        row = torch.cat(parts)[None]  # (1, all frames, d_model)
        cu_seqlens = F.pad(frames.cumsum(0), (1, 0)).int()
        for layer in self.layers:
            row = self._run(layer, row, cu_seqlens, max(lengths))
        parts = self.layer_norm(row)[0].split(lengths)
        output = [_pad_frames(part, x.shape[1]) for part in parts]
        return torch.stack(output)

    def _run(self, layer: "WhisperLayer", *inputs: Tensor | int) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def set_batch_count(self, step: int) -> None:
        """Do nothing: this encoder has no training schedules."""

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer's activations in the backward pass."""
        self.recompute = True

    @classmethod
    def from_fields(cls, values: JsonObject, *, pad_to_30s: PadTo30s) -> "WhisperEncoder":
        """See AudioEncoder."""
        encoder = cls(pad_to_30s=pad_to_30s, **values)
        check_sizes(values)
        return encoder

    @staticmethod
    def make_features(values: JsonObject) -> WhisperFeatures:
        """See AudioEncoder."""
        return WhisperFeatures(values["num_mel_bins"], bool(values.get("pad_to_30s")))

    @staticmethod
    def feature_shape(values: JsonObject) -> tuple[int, int]:
        """See AudioEncoder."""
        return values["num_mel_bins"], WHISPER_HOP

    @staticmethod
    def frame_lengths(samples: Any, values: JsonObject) -> Any:
        """See AudioEncoder."""
        frames = (whisper_frames(samples) + 1) // 2
        if values.get("pad_to_30s") == KEEP_SILENCE:
            return frames * 0 + WHISPER_FRAMES
        return frames

    @staticmethod
    def sample_limits(values: JsonObject) -> tuple[int, int]:
        """See AudioEncoder."""
        return WHISPER_HOP, (2 * values["max_source_positions"] + 1) * WHISPER_HOP - 1

    @staticmethod
    def read_pretrained(path: str) -> tuple[JsonObject, dict[str, Tensor]]:
        """Read a Hugging Face Whisper directory or OpenAI's own file. See AudioEncoder."""
        return read_whisper(Path(path))

    @staticmethod
    def sizes() -> dict[str, JsonObject]:
        """See AudioEncoder."""
        sizes: dict[str, JsonObject] = {}
        for name, (bins, width, layers, heads) in WHISPER_SIZES.items():
            sizes[name] = {
                "num_mel_bins": bins,
                "d_model": width,
                "encoder_layers": layers,
                "encoder_attention_heads": heads,
                "encoder_ffn_dim": 4 * width,
                "max_source_positions": 1500,
            }
        return sizes

    @torch.no_grad()
    def start_from_scratch(self) -> None:
        """Draw new weights as transformers does: normal, with sinusoidal positions."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.normal_(module.weight, std=INITIAL_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.embed_positions.weight.copy_(sinusoids(self.max_frames, self.output_dim))


def sinusoids(length: int, width: int) -> Tensor:
    """Return sinusoidal positions (length, width): the sines, then the cosines.

    Raises:
        UserError: the width is not an even number of at least 4.
    """
    if width % 2 or width < 4:
        raise UserError(f"d_model={width} is not an even number of at least 4. Use one.")
    step = math.log(LONGEST_PERIOD) / (width // 2 - 1)
    frequencies = torch.exp(-step * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


def _check_padded(features: Tensor) -> None:
    """Raise UserError unless features (N, T, num_mel_bins) at 100 Hz are those of 30 s."""
    if features.shape[1] != 2 * WHISPER_FRAMES:
        raise UserError(
            f"the features have {features.shape[1]} frames, but data.pad_to_30s={KEEP_SILENCE} "
            f"needs {2 * WHISPER_FRAMES}. Compute them with audio_encoder.extract_feature()."
        )


def _pad_frames(x: Tensor, length: int) -> Tensor:
    """Pad frames (T, C) with zeros to (length, C)."""
    return F.pad(x, (0, 0, 0, length - len(x)))


class WhisperLayer(nn.Module):
    """Self-attention and feed-forward, each with a LayerNorm before it."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = WhisperAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Apply the layer. The arguments are those of WhisperAttention."""
        x = x + self.self_attn(self.self_attn_layer_norm(x), cu_seqlens, longest)
        hidden = F.gelu(self.fc1(self.final_layer_norm(x)))
        return x + self.fc2(hidden)


class WhisperAttention(nn.Module):
    """Self-attention within each utterance of a packed row."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Compute the attention.

        Args:
            x: (1, frames of all utterances, width).
            cu_seqlens: boundaries of the N utterances (N + 1,).
            longest: length of the longest utterance.
        """
        query = self._split_heads(self.q_proj(x))
        key = self._split_heads(self.k_proj(x))
        value = self._split_heads(self.v_proj(x))
        output = varlen_attention(query, key, value, cu_seqlens, causal=False, longest=longest)
        return self.out_proj(output.flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """Map (1, T, width) to (1, heads, T, width / heads)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)
