"""Zipformer's configuration and the published sizes."""

from dataclasses import dataclass, fields
from typing import Any

from asrllm.errors import UserError, nearest

PUBLIC_SIZES: dict[str, dict[str, Any]] = {
    "icefall-small": {"encoder_dim": [192, 256, 256, 256, 256, 256], "encoder_unmasked_dim": [192] * 6,
                      "num_encoder_layers": [2] * 6, "feedforward_dim": [512, 768, 768, 768, 768, 768]},
    "icefall-medium": {"encoder_dim": [192, 256, 384, 512, 384, 256], "encoder_unmasked_dim": [192, 192, 256, 256, 256, 192],
                       "num_encoder_layers": [2, 2, 3, 4, 3, 2], "feedforward_dim": [512, 768, 1024, 1536, 1024, 768]},
    "icefall-large": {"encoder_dim": [192, 256, 512, 768, 512, 256], "encoder_unmasked_dim": [192, 192, 256, 320, 256, 192],
                      "num_encoder_layers": [2, 2, 4, 5, 4, 2], "feedforward_dim": [512, 768, 1536, 2048, 1536, 768]},
}  # fmt: skip
PUBLIC_SIZES["auden-base"] = PUBLIC_SIZES["icefall-medium"] | {
    "feedforward_dim": [576, 768, 1152, 1536, 1152, 768]
}
PUBLIC_SIZES["auden-large"] = PUBLIC_SIZES["icefall-large"] | {
    "feedforward_dim": [576, 768, 1536, 2304, 1536, 768]
}


@dataclass(frozen=True, kw_only=True)
class ZipformerConfig:
    """One value for each stack; a list of one, or a plain number, is for all of them. The defaults are what the public sizes share.

    encoder_unmasked_dim: channels that training never masks. chunk_size (frames at 50 Hz, -1: everything) and left_context_frames are
    for causal models: training draws from them, evaluation takes the widest of each.
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
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, int) else tuple(value))
        numbers = [
            *(n for name in PER_STACK for n in getattr(self, name)),
            self.pos_dim,
            self.feature_dim,
        ]
        if (
            not all(isinstance(n, int) and n > 0 for n in numbers)
            or self.pos_dim % 2
            or self.output_downsampling_factor != 2
        ):
            raise UserError(
                "zipformer: sizes must be whole numbers above 0, pos_dim even, output_downsampling_factor 2: correct its config"
            )
        if even := [k for k in self.cnn_module_kernel if k % 2 == 0]:
            raise UserError(
                f"zipformer: cnn_module_kernel={even[0]} must be odd: correct its config"
            )
        if wide := [
            (u, d)
            for u, d in zip(self.encoder_unmasked_dim, self.encoder_dim, strict=True)
            if u > d
        ]:
            raise UserError(
                f"zipformer: encoder_unmasked_dim={wide[0][0]} must not be above encoder_dim={wide[0][1]}: correct its config"
            )
        self._check_chunks()

    def _for_each_stack(self, name: str) -> tuple[int, ...]:
        value, stacks = getattr(self, name), len(tuple(self.encoder_dim))
        value = (value,) if isinstance(value, int) else tuple(value)
        if len(value) not in (1, stacks) or not stacks:
            raise UserError(
                f"zipformer: {name} has {len(value)} values for the {stacks} stacks of encoder_dim: give one, or one for each"
            )
        return value * stacks if len(value) == 1 else value

    def _check_chunks(self) -> None:
        if not self.causal:
            return  # icefall's and Auden's own defaults name chunks here too, and do not use them
        if (
            not self.chunk_size
            or not self.left_context_frames
            or any(c < 1 and c != -1 for c in self.chunk_size)
        ):
            raise UserError(
                f"zipformer: chunk_size={list(self.chunk_size)} must hold numbers above 0, or -1 for no chunks"
            )
        for chunk in (c for c in self.chunk_size if c > 0):
            for ds, kernel in zip(self.downsampling_factor, self.cnn_module_kernel, strict=True):
                if chunk % ds:
                    raise UserError(
                        f"zipformer: chunk_size={chunk} is no multiple of downsampling_factor={ds}: choose one that is"
                    )
                for left in (n for n in self.left_context_frames if n >= 0):
                    if chunk * max(1, left // chunk) < kernel // 2 * ds:
                        raise UserError(
                            f"zipformer: left_context_frames={left} with chunk_size={chunk} is less than the {kernel // 2 * ds} frames "
                            f"that the convolution of width {kernel} at downsampling_factor={ds} looks back: enlarge it"
                        )

    @classmethod
    def public(cls, size: str, **changes: Any) -> "ZipformerConfig":
        """A published size: icefall-small, -medium, -large, auden-base, -large. changes: further fields, such as causal."""
        if size not in PUBLIC_SIZES:
            raise UserError(
                f"the zipformer size {size!r} is unknown: {nearest(size, PUBLIC_SIZES)}"
            )
        return cls(**PUBLIC_SIZES[size] | changes)


PER_STACK = ("num_encoder_layers", "encoder_dim", "encoder_unmasked_dim", "feedforward_dim", "downsampling_factor", "cnn_module_kernel",
             "num_heads", "query_head_dim", "value_head_dim", "pos_head_dim")  # fmt: skip
FIELDS = tuple(field.name for field in fields(ZipformerConfig))
