"""Zipformer's configuration and the published sizes."""

from dataclasses import dataclass, fields
from typing import Any

from asrllm.errors import UserError, nearest

CORRECT_ENCODER_CONFIG = "Correct the fields of the encoder."
ICEFALL_SIZES = ("small", "medium", "large")
PUBLIC_SIZES: dict[str, dict[str, list[int]]] = {
    "icefall-small": {
        "encoder_dim": [192, 256, 256, 256, 256, 256],
        "encoder_unmasked_dim": [192, 192, 192, 192, 192, 192],
        "num_encoder_layers": [2, 2, 2, 2, 2, 2],
        "feedforward_dim": [512, 768, 768, 768, 768, 768],
    },
    "icefall-medium": {
        "encoder_dim": [192, 256, 384, 512, 384, 256],
        "encoder_unmasked_dim": [192, 192, 256, 256, 256, 192],
        "num_encoder_layers": [2, 2, 3, 4, 3, 2],
        "feedforward_dim": [512, 768, 1024, 1536, 1024, 768],
    },
    "icefall-large": {
        "encoder_dim": [192, 256, 512, 768, 512, 256],
        "encoder_unmasked_dim": [192, 192, 256, 320, 256, 192],
        "num_encoder_layers": [2, 2, 4, 5, 4, 2],
        "feedforward_dim": [512, 768, 1536, 2048, 1536, 768],
    },
    "auden-base": {
        "encoder_dim": [192, 256, 384, 512, 384, 256],
        "encoder_unmasked_dim": [192, 192, 256, 256, 256, 192],
        "num_encoder_layers": [2, 2, 3, 4, 3, 2],
        "feedforward_dim": [576, 768, 1152, 1536, 1152, 768],
    },
    "auden-large": {
        "encoder_dim": [192, 256, 512, 768, 512, 256],
        "encoder_unmasked_dim": [192, 192, 256, 320, 256, 192],
        "num_encoder_layers": [2, 2, 4, 5, 4, 2],
        "feedforward_dim": [576, 768, 1536, 2304, 1536, 768],
    },
}
PER_STACK = (
    "num_encoder_layers",
    "encoder_dim",
    "encoder_unmasked_dim",
    "feedforward_dim",
    "downsampling_factor",
    "cnn_module_kernel",
    "num_heads",
    "query_head_dim",
    "value_head_dim",
    "pos_head_dim",
)


@dataclass(frozen=True, kw_only=True)
class ZipformerConfig:
    """Configuration of a Zipformer encoder.

    The fields in PER_STACK have one value per stack. A list of one value, or a plain number,
    applies to all stacks. The defaults are those that the public sizes have in common.

    Attributes:
        num_encoder_layers: number of layers.
        encoder_dim: width.
        encoder_unmasked_dim: number of channels that training never masks.
        feedforward_dim: width of the second feed-forward module. The first has 3/4 and the third
            5/4 of it.
        downsampling_factor: 50 Hz divided by the frame rate.
        cnn_module_kernel: kernel size of the convolutions, odd.
        num_heads: number of attention heads.
        query_head_dim: width of a head's queries and keys.
        value_head_dim: width of a head's values.
        pos_head_dim: width of a head's position queries.
        pos_dim: width of the position encodings, even.
        feature_dim: number of features in a frame.
        output_downsampling_factor: 50 Hz divided by the output's frame rate; always 2.
        causal: whether the encoder attends only to past chunks and the current one.
        chunk_size: chunk sizes of a causal encoder in frames at 50 Hz; -1 means everything.
            Training draws from them, and evaluation uses the largest.
        left_context_frames: left contexts of a causal encoder in frames at 50 Hz, used in
            the same way.
    """

    num_encoder_layers: tuple[int, ...]
    encoder_dim: tuple[int, ...]
    encoder_unmasked_dim: tuple[int, ...]
    feedforward_dim: tuple[int, ...]
    downsampling_factor: tuple[int, ...] = (1, 2, 4, 8, 4, 2)
    cnn_module_kernel: tuple[int, ...] = (31, 31, 15, 15, 15, 31)
    num_heads: tuple[int, ...] = (4, 4, 4, 8, 4, 4)
    query_head_dim: tuple[int, ...] = (32,)
    value_head_dim: tuple[int, ...] = (12,)
    pos_head_dim: tuple[int, ...] = (4,)
    pos_dim: int = 48
    feature_dim: int = 80
    output_downsampling_factor: int = 2
    causal: bool = False
    chunk_size: tuple[int, ...] = (-1,)
    left_context_frames: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        for name in PER_STACK:
            object.__setattr__(self, name, self._for_each_stack(name))
        for name in ("chunk_size", "left_context_frames"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        self._check_sizes()
        self._check_stacks()
        # icefall's and Auden's defaults set chunks for other encoders too, and do not use them
        if self.causal:
            self._check_chunks()

    def _check_sizes(self) -> None:
        for name in ("pos_dim", "feature_dim", *PER_STACK):
            for size in _as_tuple(getattr(self, name)):
                if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                    raise UserError(
                        f"zipformer: {name}={size!r} is not an integer above 0. "
                        f"{CORRECT_ENCODER_CONFIG}"
                    )
        if self.pos_dim % 2:
            raise UserError(
                f"zipformer: pos_dim={self.pos_dim} is not even. {CORRECT_ENCODER_CONFIG}"
            )
        if self.output_downsampling_factor != 2:
            raise UserError(
                "zipformer: output_downsampling_factor="
                f"{self.output_downsampling_factor} is not 2. {CORRECT_ENCODER_CONFIG}"
            )

    def _check_stacks(self) -> None:
        for kernel in self.cnn_module_kernel:
            if kernel % 2 == 0:
                raise UserError(
                    f"zipformer: cnn_module_kernel={kernel} is not odd. {CORRECT_ENCODER_CONFIG}"
                )
        for unmasked, width in zip(self.encoder_unmasked_dim, self.encoder_dim, strict=True):
            if unmasked > width:
                raise UserError(
                    f"zipformer: encoder_unmasked_dim={unmasked} is above encoder_dim={width}. "
                    f"{CORRECT_ENCODER_CONFIG}"
                )

    def _for_each_stack(self, name: str) -> tuple[int, ...]:
        values = _as_tuple(getattr(self, name))
        stacks = len(tuple(self.encoder_dim))
        if len(values) not in (1, stacks) or not stacks:
            raise UserError(
                f"zipformer: {name} has {len(values)} values, but encoder_dim has {stacks} stacks. "
                "Give one value, or one for each stack."
            )
        return values * stacks if len(values) == 1 else values

    def _check_chunks(self) -> None:
        is_valid = all(size == -1 or size >= 1 for size in self.chunk_size)
        if not self.chunk_size or not self.left_context_frames or not is_valid:
            raise UserError(
                f"zipformer: chunk_size={list(self.chunk_size)} and left_context_frames="
                f"{list(self.left_context_frames)} are not valid. Use numbers above 0, or -1 for "
                "no limit."
            )
        for chunk in self.chunk_size:
            if chunk == -1:
                continue
            for factor, kernel in zip(
                self.downsampling_factor, self.cnn_module_kernel, strict=True
            ):
                self._check_chunk(chunk, factor, kernel)

    def _check_chunk(self, chunk: int, factor: int, kernel: int) -> None:
        """Check a chunk size against a stack's downsampling factor and kernel size."""
        if chunk % factor:
            raise UserError(
                f"zipformer: chunk_size={chunk} is not a multiple of downsampling_factor={factor}. "
                "Use a multiple."
            )
        needed = kernel // 2 * factor
        for left in self.left_context_frames:
            if left >= 0 and chunk * max(1, left // chunk) < needed:
                raise UserError(
                    f"zipformer: left_context_frames={left} with chunk_size={chunk} is less than "
                    f"the {needed} frames of left context of the convolution with "
                    f"cnn_module_kernel={kernel} at downsampling_factor={factor}. Use a larger "
                    "value."
                )

    @classmethod
    def public(
        cls,
        size: str,
        **changes: Any,
    ) -> "ZipformerConfig":
        """Return the configuration of a published size.

        Args:
            size: icefall-small, icefall-medium, icefall-large, auden-base or auden-large.
            changes: further fields, for example causal=True.

        Raises:
            UserError: the size is unknown, or a field is wrong.
        """
        if size not in PUBLIC_SIZES:
            hint = nearest(size, PUBLIC_SIZES)
            raise UserError(f"the zipformer size {size!r} is unknown. {hint}")
        return cls(**PUBLIC_SIZES[size] | changes)


def _as_tuple(value: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


ZIPFORMER_FIELDS = tuple(field.name for field in fields(ZipformerConfig))
