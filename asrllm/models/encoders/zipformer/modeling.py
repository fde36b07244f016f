"""Zipformer, an encoder whose stacks of layers run at different frame rates, in plain PyTorch.

Yao et al., "Zipformer: A faster and better encoder for automatic speech recognition" (ICLR 2024).
The state dict has the key names of icefall's and Auden's checkpoints.

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
from asrllm.defaults import RATE, PadTo30s
from asrllm.errors import UserError
from asrllm.models.encoders.zipformer.configuration import ICEFALL_SIZES, ZipformerConfig
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
from asrllm.text_files import JsonObject

MIN_FRAMES = 9  # feature frames that the front end's convolutions need for one frame of output
SHORTEST_INPUT = MIN_FRAMES * KALDI_HOP - KALDI_HOP // 2  # samples
MAX_SECONDS = 3600  # the model itself has no limit but memory
PRETRAINED_BATCHES = 100_000  # beyond the end of all schedules, which is where fine-tuning starts
WARM_UP = 4000  # batches during which layers cease to be skipped, from the first layer to the last
FEATURE_SKIP = 0.125
CONVNEXT_SCALE = 0.01  # of the initial weights of a ConvNeXt block's output


class ZipformerEncoder(ExtractsFeatures):
    """A Zipformer encoder."""

    whisper_features = False
    unsplit_modules = ("ZipformerLayer",)

    def __init__(self, config: ZipformerConfig, *, isolate: bool = False) -> None:
        """Build an encoder.

        Args:
            config: its configuration.
            isolate: compute the same frames for an utterance as if it were alone in the batch. In
                the published code, padding changes the last frames (through the front end and the
                downsampling) and, through attention, all others.
        """
        super().__init__()
        self.config = config
        self.output_dim = max(config.encoder_dim)
        self.shortest = SHORTEST_INPUT
        self.isolate = isolate
        self.first_batch = 0
        self.features = KaldiFeatures(config.feature_dim)
        self.encoder_embed = FrontEnd(config.feature_dim, config.encoder_dim[0])
        self.encoder = ZipformerStacks(config)

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            x: features (N, T, feature_dim) at 100 Hz. T may be more than the longest of `x_lens`.
            x_lens: number of frames of each utterance (N,).

        Returns:
            Frames (N, T', max(encoder_dim)) at 25 Hz, and their numbers (N,) = (x_lens - 5) // 4.

        Raises:
            UserError: an utterance has fewer than 9 frames, or more than T.
        """
        self._check_lengths(x, x_lens)
        frames = (x_lens - 7) // 2
        x = self.encoder_embed(x, frames if self.isolate else None)
        padding = torch.arange(x.shape[1], device=x.device) >= frames[:, None]
        return self.encoder(x, padding, self.isolate), (frames + 1) // 2

    def _check_lengths(self, x: Tensor, x_lens: Tensor) -> None:
        shortest = int(x_lens.argmin())
        length = int(x_lens[shortest])
        if length < MIN_FRAMES:
            raise UserError(
                f"utterance {shortest} of the batch has {length} frames ({length * 10} ms), but "
                f"Zipformer needs at least {MIN_FRAMES} ({MIN_FRAMES * 10} ms). Drop it, or pad it "
                "with silence."
            )
        longest = int(x_lens.argmax())
        length = int(x_lens[longest])
        if length > x.shape[1]:
            raise UserError(
                f"utterance {longest} of the batch has {length} frames by x_lens, but x has only "
                f"{x.shape[1]}. Correct x_lens."
            )

    def set_batch_count(self, step: int) -> None:
        """Set the number of completed steps, from which the schedules are computed.

        It is called before each training step. With pretrained weights the schedules start at
        their ends.
        """
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
        """Load weights. Unused entries of public files are ignored (see without_dead_keys)."""
        return super().load_state_dict(without_dead_keys(state_dict), strict=strict, assign=assign)

    @classmethod
    def from_pretrained(cls, path: str | Path, *, isolate: bool = False) -> "ZipformerEncoder":
        """Return an encoder of icefall or Auden, float32 and in eval mode.

        Fine-tuning it starts at the ends of the schedules.

        Args:
            path: a file or a directory.
            isolate: as in the constructor.
        """
        values, state = cls.read_pretrained(str(path))
        encoder = cls(ZipformerConfig(**values), isolate=isolate)
        encoder.load_state_dict(state)
        encoder.start_pretrained()
        return encoder.eval()

    def start_pretrained(self) -> None:
        """Move all schedules to their ends."""
        self.first_batch = PRETRAINED_BATCHES
        self.set_batch_count(0)

    @classmethod
    def from_fields(cls, values: JsonObject, *, pad_to_30s: PadTo30s) -> "ZipformerEncoder":
        """Return the encoder of an AsrLlmModel. See AudioEncoder.

        It encodes an utterance alone as in a batch, and its schedules are at their ends.
        """
        if pad_to_30s:
            raise UserError(
                "data.pad_to_30s=true is for Whisper only, but model.audio_encoder.model_type is "
                "zipformer. Set data.pad_to_30s=false."
            )
        encoder = cls(ZipformerConfig(**values), isolate=True)
        encoder.start_pretrained()
        return encoder

    @staticmethod
    def make_features(values: JsonObject) -> KaldiFeatures:
        """See AudioEncoder."""
        return KaldiFeatures(values.get("feature_dim", 80))

    @staticmethod
    def feature_shape(values: JsonObject) -> tuple[int, int]:
        """See AudioEncoder."""
        return values.get("feature_dim", 80), KALDI_HOP

    @staticmethod
    def frame_lengths(samples: Any, values: JsonObject) -> Any:
        """See AudioEncoder."""
        return (kaldi_frames(samples) - 5) // 4

    @staticmethod
    def sample_limits(values: JsonObject) -> tuple[int, int]:
        """See AudioEncoder."""
        return SHORTEST_INPUT, MAX_SECONDS * RATE

    @staticmethod
    def read_pretrained(path: str) -> tuple[JsonObject, dict[str, Tensor]]:
        """Read an icefall or Auden file or directory. See AudioEncoder."""
        config, state = read_zipformer(Path(path))
        return plain_fields(config), state

    @staticmethod
    def sizes() -> dict[str, JsonObject]:
        """See AudioEncoder."""
        sizes: dict[str, JsonObject] = {}
        for name in ICEFALL_SIZES:
            sizes[name] = plain_fields(ZipformerConfig.public(f"icefall-{name}"))
        return sizes

    def start_from_scratch(self) -> None:
        """Begin the schedules. The constructor has drawn the weights, except one bias.

        The published code draws that bias from a smaller range than PyTorch.
        """
        bias = self.encoder_embed.convnext.pointwise_conv2.bias
        assert bias is not None
        nn.init.uniform_(bias, -0.1 * CONVNEXT_SCALE, 0.1 * CONVNEXT_SCALE)
        self.first_batch = 0
        self.set_batch_count(0)


def plain_fields(config: ZipformerConfig) -> JsonObject:
    """Return the fields of a configuration, with lists instead of tuples as in JSON."""
    fields = asdict(config)
    for name, value in fields.items():
        if isinstance(value, tuple):
            fields[name] = list(value)
    return fields


class FrontEnd(Scheduled):
    """Convolutions over time and frequency to half the frame rate: 100 Hz -> 50 Hz."""

    def __init__(self, feature_dim: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=(0, 1)),
            ScaleGradient(0.2),
            Balancer(1, max_abs=1.0),
            SwooshR(),
            nn.Conv2d(8, 32, 3, stride=2),
            Balancer(1, max_abs=4.0),
            SwooshR(),
            nn.Conv2d(32, 128, 3, stride=(1, 2)),
            Balancer(1, max_abs=4.0),
            SwooshR(),
        )
        self.convnext = ConvNeXt(128)
        bins = ((feature_dim - 1) // 2 - 1) // 2
        self.out = nn.Linear(128 * bins, width)
        self.whiten = Whiten(((0, 4.0), (20000, 8.0)), grad_scale=0.02)
        self.out_norm = BiasNorm(width)

    def forward(self, x: Tensor, frames: Tensor | None) -> Tensor:
        """Map features to frames of half the rate.

        Args:
            x: (N, T, feature_dim).
            frames: number of true frames of the output (N,), after which the last convolutions see
                zeros; None for no masking.

        Returns:
            (N, (T - 7) // 2, width).
        """
        x = self.conv(x.to(self.out.weight.dtype)[:, None])  # (N, 128, T', F')
        if frames is not None:
            padding = torch.arange(x.shape[2], device=x.device) >= frames[:, None]
            x = x.masked_fill(padding[:, None, :, None], 0)
        x = self.convnext(x).transpose(1, 2).flatten(2)
        x = self.out_norm(self.whiten(self.out(x)))
        return dropout_shared_over_time(x, self.now(DROPOUT))


class ConvNeXt(nn.Module):
    """The block of Liu et al., "A ConvNet for the 2020s" (2022).

    It has SwooshL and no normalization.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.pointwise_conv1 = nn.Conv2d(width, 3 * width, 1)
        self.pointwise_conv2 = nn.Conv2d(3 * width, width, 1)
        with torch.no_grad():
            self.pointwise_conv2.weight.mul_(CONVNEXT_SCALE)  # starts near the identity
        self.balance_hidden = Balancer(
            1, min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0
        )
        self.balance_out = Balancer(1, min_positive=0.4, max_positive=0.6, min_abs=1.0, max_abs=6.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (N, C, T, F) to the same shape."""
        hidden = self.pointwise_conv1(self.depthwise_conv(x))
        hidden = swoosh_l(self.balance_hidden(hidden))
        return self.balance_out(x + self.pointwise_conv2(hidden))


class ZipformerStacks(Scheduled):
    """All stacks, and the downsampling of their output."""

    def __init__(self, config: ZipformerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoders = nn.ModuleList()
        for i, factor in enumerate(config.downsampling_factor):
            kind = ZipformerStack if factor == 1 else DownsampledStack
            self.encoders.append(kind(config, i))
        self.downsample_output = Downsample(config.output_downsampling_factor)

    def forward(self, x: Tensor, padding: Tensor, isolate: bool) -> Tensor:
        """Apply all stacks.

        Args:
            x: (N, T, first encoder_dim).
            padding: true after the end of an utterance (N, T).
            isolate: as in ZipformerEncoder.

        Returns:
            (N, ceil(T / 2), max(encoder_dim)).
        """
        chunk, context_mask = self._chunks(x.shape[1], x.device)
        channel_masks: list[Tensor | None] = [None] * len(self.encoders)
        if self.training:
            channel_masks = self._channel_masks(x)
        ends: tuple[int, ...] | None = None
        if isolate:
            ends = tuple((~padding).sum(1).tolist())
        outputs: list[Tensor] = []
        for i, stack in enumerate(self.encoders):
            rate = self.config.downsampling_factor[i]
            mask = padding[:, ::rate][:, None, None]
            if context_mask is not None:
                mask = mask | context_mask[::rate, ::rate]
            stack_chunk = chunk // rate if chunk > 0 else -1
            x = match_width(x, self.config.encoder_dim[i])
            x = stack(x, mask, padding, stack_chunk, channel_masks[i], ends)
            outputs.append(x)
        x = join_outputs(outputs)
        if isolate:
            x = repeat_last_frame(x, padding)
        return self.downsample_output(x)

    def _chunks(self, frames: int, device: torch.device) -> tuple[int, Tensor | None]:
        """Choose a chunk size and a left context.

        Returns:
            The chunk size in frames at 50 Hz, -1 for everything, and a mask (frames, frames) that
            is true where query [i] does not attend to key [j].
        """
        chunk = self._choose(self.config.chunk_size)
        left = self._choose(self.config.left_context_frames)
        if not self.config.causal or chunk < 0:
            return -1, None
        chunk_index = torch.arange(frames, device=device) // chunk
        distance = chunk_index[:, None] - chunk_index  # chunks by which the key is before the query
        mask = distance < 0
        if left >= 0:
            mask = mask | (distance > max(1, left // chunk))
        return chunk, mask

    def _choose(self, sizes: tuple[int, ...]) -> int:
        """Draw a size in training, else return the largest. The published code always draws."""
        if self.training:
            return _draw(sizes)
        return max(sizes, key=lambda size: (size < 0, size))

    def _channel_masks(self, x: Tensor) -> list[Tensor | None]:
        """Draw a mask (N, 1, C) for each stack.

        In some sequences it is 0 for the channels above the unmasked ones, and in more of them for
        the upper half of those.
        """
        shape = (len(x), 1, 1)
        lower = keep_mask(x, shape, FEATURE_SKIP)
        upper = lower * keep_mask(x, shape, FEATURE_SKIP)
        ones = torch.ones_like(lower)
        masks: list[Tensor | None] = []
        for width, unmasked in zip(
            self.config.encoder_dim, self.config.encoder_unmasked_dim, strict=True
        ):
            half = (width - unmasked) // 2
            parts = (
                ones.expand(-1, -1, unmasked),
                lower.expand(-1, -1, half),
                upper.expand(-1, -1, width - unmasked - half),
            )
            masks.append(torch.cat(parts, 2))
        return masks


def _draw(sizes: tuple[int, ...]) -> int:
    return sizes[int(torch.randint(len(sizes), (), device="cpu"))]


def match_width(x: Tensor, width: int) -> Tensor:
    """Return x (N, T, C) with `width` channels: the last ones are removed, or zeros are added."""
    return F.pad(x, (0, width - x.shape[2]))


def join_outputs(outputs: list[Tensor]) -> Tensor:
    """Concatenate the stacks' outputs (N, T, C) to one with the largest C.

    It is the output of the last stack, and for its missing channels those of wider stacks before
    it, the latest first.
    """
    parts = [outputs[-1]]
    width = outputs[-1].shape[2]
    for output in reversed(outputs[:-1]):
        if output.shape[2] > width:
            parts.append(output[..., width:])
            width = output.shape[2]
    return torch.cat(parts, 2)


def repeat_last_frame(x: Tensor, padding: Tensor) -> Tensor:
    """Replace the padding of each utterance by its last true frame.

    Downsampling does this after the longest utterance.

    Args:
        x: (N, T, C).
        padding: true after the end of an utterance (N, T).
    """
    last = (~padding).sum(1) - 1
    rows = torch.arange(len(x), device=x.device)
    last_frames = x[rows, last]
    return torch.where(padding[..., None], last_frames[:, None], x)


class ZipformerStack(nn.Module):
    """Layers of one width at one frame rate."""

    def __init__(self, config: ZipformerConfig, i: int) -> None:
        super().__init__()
        self.pos_dim = config.pos_dim
        self.recompute = False
        stacks = len(config.encoder_dim)
        count = config.num_encoder_layers[i]
        self.layers = nn.ModuleList()
        for j in range(count):
            begin = i + j / count
            end = i + (j + 1) / count
            skip = layer_skip(begin, end, stacks, config.downsampling_factor[i])
            self.layers.append(_layer(config, i, skip))

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        padding: Tensor,
        chunk: int,
        channel_mask: Tensor | None,
        ends: tuple[int, ...] | None,
    ) -> Tensor:
        """Map x (N, T, C) to the same shape.

        Args:
            x: (N, T, C).
            mask: as in ZipformerLayer (N, 1, 1 or T, T).
            padding: true after the end of an utterance (N, T).
            chunk: size of a causal encoder's chunks in frames, or -1 for everything.
            channel_mask: random mask of the channels (N, 1, C), or None.
            ends: the N true lengths if utterances are isolated, else None.
        """
        positions = relative_positions(x.shape[1], self.pos_dim, x.device)
        positions = F.dropout(positions, POSITION_DROPOUT, self.training).to(x.dtype)
        if channel_mask is not None:
            x = x * channel_mask
        for layer in self.layers:
            x = self._run(layer, x, positions, mask, padding, chunk, ends)
            if channel_mask is not None:
                x = x * channel_mask
        return x

    def _run(self, layer: ZipformerLayer, *inputs: Tensor | int | tuple[int, ...] | None) -> Tensor:
        if self.recompute and self.training:
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def _layer(config: ZipformerConfig, i: int, skip: Schedule) -> ZipformerLayer:
    """Return a layer of stack i."""
    return ZipformerLayer(
        config.encoder_dim[i],
        heads={
            "heads": config.num_heads[i],
            "query_head_dim": config.query_head_dim[i],
            "pos_head_dim": config.pos_head_dim[i],
            "pos_dim": config.pos_dim,
        },
        value_head_dim=config.value_head_dim[i],
        hidden=config.feedforward_dim[i],
        kernel=config.cnn_module_kernel[i],
        causal=config.causal,
        skip=skip,
    )


def layer_skip(
    begin: float,
    end: float,
    stacks: int,
    rate: int,
) -> Schedule:
    """Return how often training skips a layer: at first half the time, then seldom.

    Args:
        begin: position of the layer's input, counted in stacks.
        end: position of its output. The deeper a layer, the later it ceases to be skipped.
        stacks: number of stacks.
        rate: downsampling factor of its stack.
    """
    step = WARM_UP / (stacks + 1)
    first_corner = ((begin + 1) * step, 0.5)
    last_corner = ((end + 1) * step, 0.035 * rate**0.5)
    return (first_corner, last_corner)


class DownsampledStack(nn.Module):
    """A stack at a lower frame rate, with a bypass around it."""

    def __init__(self, config: ZipformerConfig, i: int) -> None:
        super().__init__()
        self.rate = config.downsampling_factor[i]
        self.downsample = Downsample(self.rate)
        self.encoder = ZipformerStack(config, i)
        self.out_combiner = Bypass(config.encoder_dim[i])

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        padding: Tensor,
        chunk: int,
        channel_mask: Tensor | None,
        ends: tuple[int, ...] | None,
    ) -> Tensor:
        """Map x (N, T, C) to the same shape. The arguments are those of ZipformerStack.

        `mask` and `chunk` are at the lower frame rate; `padding` and `ends` are not.
        """
        filled = x
        if ends is not None:
            filled = repeat_last_frame(x, padding)
            ends = tuple(-(-end // self.rate) for end in ends)
        slow = self.downsample(filled)
        slow_padding = padding[:, :: self.rate]
        slow = self.encoder(slow, mask, slow_padding, chunk, channel_mask, ends)
        after = slow.repeat_interleave(self.rate, 1)
        return self.out_combiner(x, after[:, : x.shape[1]])
