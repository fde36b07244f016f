"""Zipformer, an encoder whose stacks of layers run at different frame rates (Yao et al., "Zipformer: A faster and better encoder for
automatic speech recognition", ICLR 2024), in PyTorch alone. The state dict has the key names of icefall's and Auden's checkpoints.

Kaldi features at 100 Hz -> convolutions, 50 Hz -> stacks at 50 / downsampling Hz -> 25 Hz.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from asrllm.audio.features import KALDI_HOP, KaldiFeatures, kaldi_frames
from asrllm.audio.waves import ExtractsFeatures
from asrllm.data.index import RATE
from asrllm.errors import UserError
from asrllm.models.encoders.zipformer.configuration import ZipformerConfig
from asrllm.models.encoders.zipformer.layers import (
    DROPOUT,
    POSITION_DROPOUT,
    BiasNorm,
    Bypass,
    Downsample,
    SwooshR,
    ZipformerLayer,
    relative_positions,
    swoosh_l,
)
from asrllm.models.encoders.zipformer.training import (
    Balancer,
    ScaleGradient,
    Schedule,
    Scheduled,
    Whiten,
    dropout_shared_over_time,
    keep_mask,
)
from asrllm.models.encoders.zipformer.weights import read_zipformer, without_dead_keys

MIN_FRAMES = 9  # of features: what the front end's convolutions need for one frame
MAX_SECONDS = 3600  # no limit of the model's, which has none but memory
PRETRAINED_BATCHES = 100_000  # where fine-tuning starts in the schedules: their ends
WARM_UP = 4000  # batches in which the layers stop being skipped, from the first to the last
FEATURE_SKIP = 0.125


class ZipformerEncoder(ExtractsFeatures):
    """isolate: an utterance's frames are what they would be if it were alone in the batch, instead of the published code's, where the
    padding reaches the last ones (through the front end and the downsampling) and by attention all others.
    """

    whisper_features = False
    unsplit_modules = ("ZipformerLayer",)

    def __init__(self, config: ZipformerConfig, *, isolate: bool = False) -> None:
        super().__init__()
        self.config, self.output_dim, self.isolate, self.first_batch = (
            config,
            max(config.encoder_dim),
            isolate,
            0,
        )
        self.features = KaldiFeatures(config.feature_dim)
        self.encoder_embed = FrontEnd(config.feature_dim, config.encoder_dim[0])
        self.encoder = ZipformerStacks(config)

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, T, feature_dim) at 100 Hz, x_lens (N,) -> (N, T', max(encoder_dim)) at 25 Hz, (N,) = (x_lens - 5) // 4.

        T may be more than the longest of x_lens. Raises UserError where an utterance has fewer than 9 frames or more than T.
        """
        self._check_lengths(x, x_lens)
        frames = (x_lens - 7) // 2
        x = self.encoder_embed(x, frames if self.isolate else None)
        padding = torch.arange(x.shape[1], device=x.device) >= frames[:, None]
        return self.encoder(x, padding, self.isolate), (frames + 1) // 2

    def _check_lengths(self, x: Tensor, x_lens: Tensor) -> None:
        shortest, longest = int(x_lens.argmin()), int(x_lens.argmax())
        if (length := int(x_lens[shortest])) < MIN_FRAMES:
            raise UserError(
                f"utterance {shortest} of the batch has {length} frames ({length * 10} ms), and Zipformer takes at least {MIN_FRAMES} "
                f"({MIN_FRAMES * 10} ms): drop it, or pad it with silence"
            )
        if (length := int(x_lens[longest])) > x.shape[1]:
            raise UserError(
                f"utterance {longest} of the batch has {length} frames by x_lens, but x has {x.shape[1]}: correct x_lens"
            )

    def set_batch_count(self, step: int) -> None:
        """Called before each training step with the steps done: sets the schedules, which for pretrained weights start at their ends."""
        for module in self.modules():
            if isinstance(module, Scheduled):
                module.batch_count = self.first_batch + step

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer's activations in the backward pass."""
        for module in self.modules():
            if isinstance(module, ZipformerStack):
                module.recompute = True

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Strict, but for what the public files hold beside the weights; see without_dead_keys."""
        return super().load_state_dict(without_dead_keys(state_dict), strict=strict, assign=assign)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, isolate: bool = False) -> "ZipformerEncoder":
        """An encoder of icefall or Auden from a file or a directory, in eval mode, float32; fine-tuning starts at the schedules' ends."""
        values, state = cls.read_pretrained(str(path))
        encoder = cls(ZipformerConfig(**values), isolate=isolate)
        encoder.load_state_dict(state)
        encoder.start_pretrained()
        return encoder.eval()

    def start_pretrained(self) -> None:
        self.first_batch = PRETRAINED_BATCHES
        self.set_batch_count(0)

    @classmethod
    def from_fields(cls, values: dict[str, Any], *, pad_to_30s: bool) -> "ZipformerEncoder":
        """The encoder of an AsrLlmModel, whose encoders are pretrained and whose utterances are the same alone and in a batch."""
        if pad_to_30s:
            raise UserError(
                "data.pad_to_30s=true is for Whisper: leave it out with model.audio_encoder.model_type=zipformer"
            )
        encoder = cls(ZipformerConfig(**values), isolate=True)
        encoder.start_pretrained()
        return encoder

    @staticmethod
    def frame_lengths(samples: Any) -> Any:
        return (kaldi_frames(samples) - 5) // 4

    @staticmethod
    def sample_limits(values: dict[str, Any]) -> tuple[int, int]:
        return MIN_FRAMES * KALDI_HOP - KALDI_HOP // 2, MAX_SECONDS * RATE

    @staticmethod
    def read_pretrained(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fields and weights of an icefall or Auden file or directory."""
        config, state = read_zipformer(Path(path))
        return {
            name: list(v) if isinstance(v, tuple) else v for name, v in asdict(config).items()
        }, state


class FrontEnd(Scheduled):
    """Convolutions over time and frequency to half the frame rate: 100 Hz -> 50 Hz."""

    def __init__(self, feature_dim: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=(0, 1)), ScaleGradient(0.2), Balancer(1, max_abs=1.0), SwooshR(),
            nn.Conv2d(8, 32, 3, stride=2), Balancer(1, max_abs=4.0), SwooshR(),
            nn.Conv2d(32, 128, 3, stride=(1, 2)), Balancer(1, max_abs=4.0), SwooshR(),
        )  # fmt: skip
        self.convnext = ConvNeXt(128)
        self.out = nn.Linear(128 * (((feature_dim - 1) // 2 - 1) // 2), width)
        self.whiten = Whiten(((0, 4.0), (20000, 8.0)), grad_scale=0.02)
        self.out_norm = BiasNorm(width)

    def forward(self, x: Tensor, frames: Tensor | None) -> Tensor:
        """x (N, T, feature_dim) -> (N, (T - 7) // 2, width). frames (N,): the true ones, beyond which silence is to be seen, or None."""
        x = self.conv(x.to(self.out.weight.dtype)[:, None])  # (N, 128, T', F')
        if frames is not None:
            x = x.masked_fill(
                (torch.arange(x.shape[2], device=x.device) >= frames[:, None])[:, None, :, None], 0
            )
        x = self.convnext(x).transpose(1, 2).flatten(2)
        return dropout_shared_over_time(self.out_norm(self.whiten(self.out(x))), self.now(DROPOUT))


class ConvNeXt(nn.Module):
    """Liu et al., "A ConvNet for the 2020s" (2022), without its normalisation and with SwooshL."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.pointwise_conv1 = nn.Conv2d(width, 3 * width, 1)
        self.pointwise_conv2 = nn.Conv2d(3 * width, width, 1)
        with torch.no_grad():
            self.pointwise_conv2.weight.mul_(0.01)  # starts as the identity, nearly
        self.balance_hidden = Balancer(
            1, min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0
        )
        self.balance_out = Balancer(1, min_positive=0.4, max_positive=0.6, min_abs=1.0, max_abs=6.0)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, T, F) -> the same shape"""
        hidden = swoosh_l(self.balance_hidden(self.pointwise_conv1(self.depthwise_conv(x))))
        return self.balance_out(x + self.pointwise_conv2(hidden))


class ZipformerStacks(Scheduled):
    """All stacks, and the last downsampling."""

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        self.config = config
        stacks = range(len(config.encoder_dim))
        self.encoders = nn.ModuleList(
            ZipformerStack(config, i)
            if config.downsampling_factor[i] == 1
            else DownsampledStack(config, i)
            for i in stacks
        )
        self.downsample_output = Downsample(config.output_downsampling_factor)

    def forward(self, x: Tensor, padding: Tensor, isolate: bool) -> Tensor:
        """x (N, T, first encoder_dim), padding (N, T) -> (N, ceil(T / 2), max(encoder_dim))"""
        chunk, context = self._chunks(x.shape[1], x.device)
        kept = self._feature_masks(x) if self.training else [None] * len(self.encoders)
        ends = tuple((~padding).sum(1).tolist()) if isolate else None
        outputs = []
        for i, (stack, rate) in enumerate(
            zip(self.encoders, self.config.downsampling_factor, strict=True)
        ):
            hidden = padding[:, ::rate][:, None, None]
            if context is not None:
                hidden = hidden | context[::rate, ::rate]
            x = match_width(x, self.config.encoder_dim[i])
            x = stack(x, hidden, padding, chunk // rate if chunk > 0 else -1, kept[i], ends)
            outputs.append(x)
        x = join_outputs(outputs)
        return self.downsample_output(repeat_last_frame(x, padding) if isolate else x)

    def _chunks(self, frames: int, device: torch.device) -> tuple[int, Tensor | None]:
        """The chunk (frames at 50 Hz, -1: all), and (frames, frames) true where query [i] must not see key [j]."""
        chunk, left = (
            (
                _draw(sizes) if self.training else max(sizes, key=lambda n: (n < 0, n))
            )  # the widest; the published code draws here too
            for sizes in (self.config.chunk_size, self.config.left_context_frames)
        )
        if not self.config.causal or chunk < 0:
            return -1, None
        at = torch.arange(frames, device=device) // chunk
        behind = at[:, None] - at  # chunks that the key is behind the query
        hidden = behind < 0
        return chunk, hidden if left < 0 else hidden | (behind > max(1, left // chunk))

    def _feature_masks(self, x: Tensor) -> list[Tensor | None]:
        """For each stack (N, 1, C): in some sequences 0 for the channels above the unmasked ones, in more of them for their upper half."""
        shape = (len(x), 1, 1)
        lower = keep_mask(x, shape, FEATURE_SKIP)
        upper = lower * keep_mask(x, shape, FEATURE_SKIP)
        masks: list[Tensor | None] = []
        for width, free in zip(
            self.config.encoder_dim, self.config.encoder_unmasked_dim, strict=True
        ):
            half = (width - free) // 2
            parts = (torch.ones_like(lower), free), (lower, half), (upper, width - free - half)
            masks.append(torch.cat([mask.expand(-1, -1, n) for mask, n in parts], 2))
        return masks


def _draw(sizes: tuple[int, ...]) -> int:
    return sizes[int(torch.randint(len(sizes), (), device="cpu"))]


def match_width(x: Tensor, width: int) -> Tensor:
    """Cut channels, or add zeros."""
    return F.pad(x, (0, width - x.shape[2]))


def join_outputs(outputs: list[Tensor]) -> Tensor:
    """The last stack's output, and from wider stacks before it, the latest first, the channels above."""
    parts, width = [outputs[-1]], outputs[-1].shape[2]
    for output in reversed(outputs[:-1]):
        if output.shape[2] > width:
            parts.append(output[..., width:])
            width = output.shape[2]
    return torch.cat(parts, 2)


def repeat_last_frame(x: Tensor, padding: Tensor) -> Tensor:
    """x (N, T, C) with every utterance's last true frame in the place of its padding, as downsampling does behind the longest one."""
    last = (~padding).sum(1) - 1
    return torch.where(
        padding[..., None], x[torch.arange(len(x), device=x.device), last][:, None], x
    )


class ZipformerStack(nn.Module):
    """Layers of one width at one frame rate."""

    def __init__(self, config: ZipformerConfig, i: int) -> None:
        super().__init__()
        self.pos_dim, self.recompute = config.pos_dim, False
        heads = {name: getattr(config, name)[i] for name in ("query_head_dim", "pos_head_dim")}
        count = config.num_encoder_layers[i]
        self.layers = nn.ModuleList(
            ZipformerLayer(
                config.encoder_dim[i],
                heads={"heads": config.num_heads[i], "pos_dim": config.pos_dim, **heads},
                value_head_dim=config.value_head_dim[i],
                hidden=config.feedforward_dim[i],
                kernel=config.cnn_module_kernel[i],
                causal=config.causal,
                skip=layer_skip(
                    i + j / count,
                    i + (j + 1) / count,
                    len(config.encoder_dim),
                    config.downsampling_factor[i],
                ),
            )
            for j in range(count)
        )

    def forward(
        self,
        x: Tensor,
        hidden: Tensor,
        padding: Tensor,
        chunk: int,
        kept: Tensor | None,
        ends: tuple[int, ...] | None,
    ) -> Tensor:
        """x (N, T, C), hidden (N, 1, 1 or T, T) and padding (N, T): see ZipformerLayer; kept (N, 1, C): the mask on the channels.
        ends: the N true lengths where utterances are isolated, else None."""
        positions = relative_positions(x.shape[1], self.pos_dim, x.device)
        positions = F.dropout(positions, POSITION_DROPOUT, self.training).to(x.dtype)
        x = x if kept is None else x * kept
        for layer in self.layers:
            inputs = (x, positions, hidden, padding, chunk, ends)
            x = (
                checkpoint(layer, *inputs, use_reentrant=False)
                if self.recompute and self.training
                else layer(*inputs)
            )
            x = x if kept is None else x * kept
        return x


def layer_skip(begin: float, end: float, stacks: int, rate: int) -> Schedule:
    """How often training skips a layer: half the time, then seldom, one layer after the other. begin, end: its place, in stacks."""
    step = WARM_UP / (stacks + 1)
    return (((begin + 1) * step, 0.5), ((end + 1) * step, 0.035 * rate**0.5))


class DownsampledStack(nn.Module):
    """A stack at a lower frame rate, bypassed."""

    def __init__(self, config: ZipformerConfig, i: int) -> None:
        super().__init__()
        self.rate = config.downsampling_factor[i]
        self.downsample = Downsample(self.rate)
        self.encoder = ZipformerStack(config, i)
        self.out_combiner = Bypass(config.encoder_dim[i])

    def forward(
        self,
        x: Tensor,
        hidden: Tensor,
        padding: Tensor,
        chunk: int,
        kept: Tensor | None,
        ends: tuple[int, ...] | None,
    ) -> Tensor:
        """As ZipformerStack; hidden and chunk are of the lower rate, padding and ends are not."""
        slow = self.downsample(x if ends is None else repeat_last_frame(x, padding))
        ends = None if ends is None else tuple(-(-end // self.rate) for end in ends)
        slow = self.encoder(slow, hidden, padding[:, :: self.rate], chunk, kept, ends)
        return self.out_combiner(x, slow.repeat_interleave(self.rate, 1)[:, : x.shape[1]])
