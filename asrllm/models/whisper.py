"""Whisper's encoder (Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022) on audio of any length to 30 s.

The published code pads every utterance to 30 s. Here the frames are the true ones, padding within a batch is masked in the convolutions
and in attention, and the state dict has transformers' key names below `model.encoder.`.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asrllm.audio.features import WHISPER_HOP, WhisperFeatures, whisper_frames
from asrllm.errors import UserError

FIELDS = ("num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "max_source_positions")


class WhisperEncoder(nn.Module):
    """pad_to_30s: attend to the silence after an utterance, as in the published code; the frames given out are the true ones either way."""

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
        self.output_dim, self.max_frames, self.pad_to_30s = d_model, max_source_positions, pad_to_30s
        self.recompute = False
        self.features = WhisperFeatures(num_mel_bins, pad_to_30s)
        self.conv1 = nn.Conv1d(num_mel_bins, d_model, 3, padding=1)
        self.conv2 = nn.Conv1d(d_model, d_model, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(max_source_positions, d_model)
        self.layers = nn.ModuleList(WhisperLayer(d_model, encoder_attention_heads, encoder_ffn_dim) for _ in range(encoder_layers))
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
        x = F.gelu(self.conv1(x)).mul(valid[:, None])  # what the second convolution sees past the end is zero, as for one alone
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        x = x + self.embed_positions(torch.arange(x.shape[1], device=x.device))
        mask = None
        if not self.pad_to_30s:
            mask = (torch.arange(x.shape[1], device=x.device) < frames[:, None])[:, None, None]  # (N, 1, 1, T')
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=False) if self.recompute and self.training else layer(x, mask)
        return self.layer_norm(x), frames

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
        """Fields and encoder weights of a Hugging Face Whisper directory."""
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise UserError(f"model.audio_encoder.pretrained_model={path!r} has no config.json: give a Hugging Face Whisper directory")
        config = json.loads((folder / "config.json").read_text())
        if config.get("model_type") != "whisper":
            raise UserError(
                f"model.audio_encoder.pretrained_model={path!r} is a {config.get('model_type')!r} model, not whisper: "
                "set model.audio_encoder.model_type to match"
            )
        state = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                    head, found, name = key.partition("encoder.")
                    if found and head in ("", "model."):
                        state[name] = tensors.get_tensor(key)
        if not state:
            raise UserError(
                f"model.audio_encoder.pretrained_model={path!r} has no *.safetensors with encoder weights: save it as safetensors"
            )
        return {field: config[field] for field in FIELDS}, state


class WhisperLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = WhisperAttention(width, heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), mask)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (N, T, width), mask (N, 1, 1, T) bool or None"""
        q, k, v = (proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))
