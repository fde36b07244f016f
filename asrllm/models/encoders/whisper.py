"""Whisper's encoder (Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022) on audio of any length to 30 s.

The published code pads every utterance to 30 s. Here the frames are the true ones: padding within a batch is masked in the convolutions,
and the layers run on one row of all utterances' frames without any. The state dict has transformers' key names below `model.encoder.`.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asrllm.audio.features import WHISPER_HOP, WhisperFeatures, whisper_frames
from asrllm.audio.waves import ExtractsFeatures
from asrllm.errors import UserError
from asrllm.models.attention import packed
from asrllm.models.encoders.whisper_weights import read_whisper


class WhisperEncoder(ExtractsFeatures):
    """pad_to_30s: attend to the silence after an utterance, as in the published code; the frames given out are the true ones either way."""

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
        pad_to_30s: bool = False,
    ) -> None:
        super().__init__()
        self.output_dim, self.max_frames, self.pad_to_30s = (
            d_model,
            max_source_positions,
            pad_to_30s,
        )
        self.recompute = False
        self.features = WhisperFeatures(num_mel_bins, pad_to_30s)
        self.conv1 = nn.Conv1d(num_mel_bins, d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(d_model, d_model, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(max_source_positions, d_model)
        self.layers = nn.ModuleList(
            WhisperLayer(d_model, encoder_attention_heads, encoder_ffn_dim)
            for _ in range(encoder_layers)
        )
        self.layer_norm = nn.LayerNorm(d_model)

    def forward(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """features (N, T, num_mel_bins) at 100 Hz, lengths (N,) -> (N, T', d_model) at 50 Hz, (N,) = (lengths + 1) // 2.

        Raises UserError where an utterance has no frame or more than 30 s.
        """
        frames = (lengths + 1) // 2
        if int(lengths.min()) < 1 or int(frames.max()) > self.max_frames:
            raise UserError(
                f"Whisper's encoder takes 10 ms to {self.max_frames / 50:g} s of audio, the batch has {lengths.min() / 100:g} s to "
                f"{lengths.max() / 100:g} s: cut longer recordings, drop shorter ones"
            )
        valid = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
        if not self.pad_to_30s:
            valid = torch.arange(features.shape[1], device=features.device) < lengths[:, None]
        x = features.to(self.conv1.weight.dtype).mul(valid[..., None]).transpose(1, 2)
        x = F.gelu(self.conv1(x)).mul(
            valid[:, None]
        )  # what the second convolution sees past the end is zero, as for one alone
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.embed_positions(torch.arange(x.shape[1], device=x.device))
        return self.transform(
            x, torch.full_like(frames, x.shape[1]) if self.pad_to_30s else frames
        ), frames

    def transform(self, x: Tensor, frames: Tensor) -> Tensor:
        """The layers. x (N, T', d_model), frames (N,): how many of each are attended to -> (N, T', d_model), zero after those."""
        lengths = frames.tolist()
        row = torch.cat([part[:length] for part, length in zip(x, lengths, strict=True)])[
            None
        ]  # (1, all frames, d_model)
        cu_seqlens = F.pad(frames.cumsum(0), (1, 0)).int()
        for layer in self.layers:
            args = (row, cu_seqlens, max(lengths))
            row = (
                checkpoint(layer, *args, use_reentrant=False)
                if self.recompute and self.training
                else layer(*args)
            )
        parts = self.layer_norm(row)[0].split(lengths)
        return torch.stack([F.pad(part, (0, 0, 0, x.shape[1] - len(part))) for part in parts])

    def set_batch_count(self, step: int) -> None:
        """Nothing here changes in the course of training."""

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer's activations in the backward pass."""
        self.recompute = True

    @classmethod
    def from_fields(cls, values: dict[str, Any], *, pad_to_30s: bool) -> "WhisperEncoder":
        return cls(pad_to_30s=pad_to_30s, **values)

    @staticmethod
    def frame_lengths(samples: Any) -> Any:
        return (whisper_frames(samples) + 1) // 2

    @staticmethod
    def sample_limits(values: dict[str, Any]) -> tuple[int, int]:
        return WHISPER_HOP, (2 * values["max_source_positions"] + 1) * WHISPER_HOP - 1

    @staticmethod
    def read_pretrained(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fields and encoder weights of a Hugging Face Whisper directory or of OpenAI's own file."""
        return read_whisper(Path(path))


class WhisperLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = WhisperAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), cu_seqlens, longest)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """x (1, frames of all utterances, width), cu_seqlens (N + 1,)"""
        q, k, v = (
            proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(packed(q, k, v, cu_seqlens, causal=False, longest=longest).flatten(2))
