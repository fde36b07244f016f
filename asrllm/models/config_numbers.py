"""Ranges of the numbers in the config.json of an LLM or of an audio encoder.

transformers accepts any of them: heads of a billion channels seem to contradict the weights, and
rotary embeddings with a base of 0 give NaN.
"""

import math
import re
from typing import NamedTuple

from asrllm.errors import UserError
from asrllm.schema import shown
from asrllm.text_files import JsonObject

# Limits far above any model, so that a corrupted size does not take all memory or run for hours.
MAX_LAYERS = 1000
MAX_WIDTH = 1 << 20  # also of heads and channels
MAX_VOCABULARY = 1 << 28
MAX_LLM_NUMBER = 1 << 40  # rope_theta has ten digits in some models
MAX_ENCODER_NUMBER = 1 << 20
MAX_FACTOR = 1 << 20
STEP_LIMITS = "time_step_"  # fields of state-space models, which may be infinite


class Range(NamedTuple):
    """What the fields whose names match a pattern may be.

    Attributes:
        pattern: pattern of the whole name.
        is_integer: whether the numbers are integers.
        low: the smallest value.
        high: the largest value.
        is_open: whether `low` itself is not allowed.
        is_required: whether null is not allowed.
    """

    pattern: str
    is_integer: bool
    low: float
    high: float
    is_open: bool = False
    is_required: bool = False


# the first one that matches a name applies
RANGES = (
    Range(r"vocab_size", True, 1, MAX_VOCABULARY, is_required=True),
    Range(r"num_hidden_layers|encoder_layers|num_encoder_layers|n_layer", True, 1, MAX_LAYERS),
    Range(r"hidden_size|num_attention_heads|d_model", True, 1, MAX_WIDTH, is_required=True),
    Range(r"intermediate_size|num_key_value_heads|head_dim|\w+_head_dim", True, 1, MAX_WIDTH),
    Range(r"encoder_attention_heads|num_heads|n_head|n_embd|num_mel_bins", True, 1, MAX_WIDTH),
    Range(r"encoder_ffn_dim|feedforward_dim|encoder_(unmasked_)?dim", True, 1, MAX_WIDTH),
    Range(r"pos_dim|feature_dim|max_source_positions", True, 1, MAX_WIDTH),
    Range(r"downsampling_factor|cnn_module_kernel", True, 1, MAX_WIDTH),
    Range(r"(original_)?max_position_embeddings", True, 1, MAX_LLM_NUMBER),
    Range(r"sliding_window", True, 0, MAX_LLM_NUMBER),  # Qwen2-MoE has 0, which it does not use
    Range(r"(bos|eos|pad)_token_id", True, -1, MAX_VOCABULARY),
    Range(r"rope_theta|rope_local_base_freq", False, 0, MAX_LLM_NUMBER, is_open=True),
    Range(r"partial_rotary_factor|(rms_|layer_)?norm_eps(ilon)?", False, 0, 1, is_open=True),
    Range(r"factor|(low|high)_freq_factor|attention_factor", False, 0, MAX_FACTOR, is_open=True),
    Range(r"query_pre_attn_scalar", False, 0, MAX_FACTOR, is_open=True),
    Range(r"\w+_softcapping", False, 0, MAX_FACTOR),
    Range(r"(embedding|attention|residual)_multiplier", False, 0, MAX_FACTOR, is_open=True),
    Range(r"logits_scaling", False, 0, MAX_FACTOR, is_open=True),
    Range(r"initializer_range", False, 0, MAX_FACTOR),
    Range(r"\w*dropout|\w+_pdrop", False, 0, 1),
)


def check_numbers(fields: JsonObject, limit: int, prefix: str, fix: str) -> None:
    """Check the numbers of a part of a model, also in nested fields.

    Args:
        fields: fields of the part.
        limit: largest absolute value of a number that RANGES does not name.
        prefix: the file and the part, which precede a field's name in the error message.
        fix: the last sentence of the error message.

    Raises:
        UserError: a number is outside its range or not finite, or is a value of another type.
    """
    # names in messages, names of fields, and values
    remaining: list[tuple[str, str, object]] = [
        (prefix + key, key, value) for key, value in fields.items()
    ]
    while remaining:
        name, field, value = remaining.pop()
        if isinstance(value, dict):
            remaining += [(f"{name}.{key}", key, inner) for key, inner in value.items()]
        elif isinstance(value, list):
            remaining += [(f"{name}[{i}]", field, inner) for i, inner in enumerate(value)]
        else:
            problem = _number_problem(str(field), value, limit)
            if problem:
                raise UserError(f"{name}={shown(value)} is {problem} {fix}")
    _check_heads(fields, prefix, fix)


def _number_problem(field: str, value: object, limit: int) -> str:
    """Return what is wrong with a value, and what to use instead, or "" if nothing is."""
    allowed = next((entry for entry in RANGES if re.fullmatch(entry.pattern, field)), None)
    if allowed is not None:
        return _problem_in(allowed, value, limit)
    if isinstance(value, float) and not math.isfinite(value) and STEP_LIMITS not in field:
        return "not a finite number. Use one."
    if field.endswith(("layer", "layers")):
        limit = min(limit, MAX_LAYERS)
    if isinstance(value, int | float) and math.isfinite(value) and abs(value) > limit:
        return f"out of range. Use a value of at most {limit}."
    return ""


def _problem_in(allowed: Range, value: object, limit: int) -> str:
    if value is None:
        return "not a number. Use one." if allowed.is_required else ""
    kinds = int if allowed.is_integer else int | float
    if isinstance(value, bool) or not isinstance(value, kinds):
        return f"not {'an integer' if allowed.is_integer else 'a number'}. Use one."
    high = min(allowed.high, limit)
    is_below = value <= allowed.low if allowed.is_open else value < allowed.low
    if is_below or not value <= high:  # also NaN
        least = f"above {allowed.low:g}" if allowed.is_open else f"of at least {allowed.low:g}"
        return f"out of range. Use a value {least} and at most {high}."
    return ""


def _check_heads(fields: JsonObject, prefix: str, fix: str) -> None:
    """Raise UserError if the numbers of heads do not fit, or the padding has no embedding."""
    heads = fields.get("num_attention_heads")
    groups = fields.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise UserError(
            f"{prefix}num_key_value_heads={groups} does not divide num_attention_heads={heads}. "
            f"{fix}"
        )
    padding, words = fields.get("pad_token_id"), fields.get("vocab_size")
    if isinstance(padding, int) and isinstance(words, int) and padding >= words:
        raise UserError(f"{prefix}pad_token_id={padding} is not below vocab_size={words}. {fix}")
