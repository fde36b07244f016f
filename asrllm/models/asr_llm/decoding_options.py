"""The options of `generate`, their bounds, and a complete GenerationConfig."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, Strict
from transformers import GenerationConfig

from asrllm.defaults import MAX_NEW_TOKENS
from asrllm.errors import UserError, nearest
from asrllm.schema import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RatioBelowOne,
    Text,
    build,
    component,
)
from asrllm.text_files import first_words

Probability = Annotated[float, Field(gt=0, le=1)]
TokenIds = list[NonNegativeInt]
BiasedTokens = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]


@component
class DecodingOptions:
    """The options of transformers' GenerationConfig that work with a prompt given as embeddings.

    The defaults are those of greedy search. Every option has one, because transformers fills an
    option that is None from the LLM's generation_config.json, which is meant for conversation:
    Qwen's has a temperature and a repetition penalty.

    Attributes:
        num_beams: number of hypotheses that beam search keeps for each chat. 1 means greedy search
            or sampling.
        length_penalty: exponent of the length in tokens by which beam search divides a
            hypothesis's log-probability. Values above 0 favour long texts.
        early_stopping: whether beam search ends when `num_beams` hypotheses are complete. False
            ends it when a better one is unlikely, "never" when a better one is impossible.
        do_sample: whether tokens are drawn at random instead of taking the most probable one.
        temperature: divisor of the logits when sampling.
        top_k: number of most probable tokens to sample from. 0 admits all tokens.
        top_p: probability mass of the most probable tokens to sample from.
        min_p: smallest probability to sample, as a ratio to that of the most probable token.
        top_h: fraction of the distribution's entropy that the tokens to sample from may have.
        typical_p: probability mass of the locally typical tokens to sample from.
        epsilon_cutoff: smallest probability of a token to sample.
        eta_cutoff: the same, lowered when the distribution has a high entropy.
        repetition_penalty: divisor of the positive logits, and factor of the negative logits, of
            tokens in the text so far. 1 means no penalty.
        no_repeat_ngram_size: length in tokens of the n-grams that may occur only once. 0 allows
            repetitions.
        max_new_tokens: maximum number of tokens of a text.
        min_new_tokens: minimum number of tokens of a text.
        max_time: seconds after which generation of a batch ends.
        stop_strings: texts that end generation.
        eos_token_id: ids of tokens that end generation, in addition to those of the LLM.
        forced_eos_token_id: ids of the last token if a text reaches `max_new_tokens`.
        suppress_tokens: ids of tokens that are never generated.
        begin_suppress_tokens: ids of tokens that are not generated first.
        bad_words_ids: sequences of token ids that are never generated.
        sequence_bias: number to add to the logit of the last token of a sequence, by the token ids
            of the sequence.
        exponential_decay_length_penalty: number of tokens after which the logit of the end token
            grows, and the factor of its exponential growth per token.
        renormalize_logits: whether log-probabilities are normalized again after all options have
            changed them.
        use_cache: whether keys and values of earlier positions are kept rather than recomputed.
    """

    num_beams: PositiveInt = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    do_sample: bool = False
    temperature: PositiveFloat = 1.0
    top_k: NonNegativeInt = 50
    top_p: Probability = 1.0
    min_p: RatioBelowOne | None = None
    top_h: Probability | None = None
    typical_p: Probability = 1.0
    epsilon_cutoff: RatioBelowOne = 0.0
    eta_cutoff: RatioBelowOne = 0.0
    repetition_penalty: PositiveFloat = 1.0
    no_repeat_ngram_size: NonNegativeInt = 0
    max_new_tokens: PositiveInt = MAX_NEW_TOKENS
    min_new_tokens: NonNegativeInt | None = None
    max_time: PositiveFloat | None = None
    stop_strings: Text | list[Text] | None = None
    eos_token_id: NonNegativeInt | TokenIds | None = None
    forced_eos_token_id: NonNegativeInt | TokenIds | None = None
    suppress_tokens: TokenIds | None = None
    begin_suppress_tokens: TokenIds | None = None
    bad_words_ids: list[TokenIds] | None = Field(default=None, min_length=1)
    sequence_bias: dict[BiasedTokens, float] | None = Field(default=None, min_length=1)
    exponential_decay_length_penalty: Annotated[tuple[int, float], Strict(False)] | None = None
    renormalize_logits: bool | None = None
    use_cache: bool = True


@component
class AnswerLimits:
    """Limits of an answer and of a batch that transformers does not have."""

    max_tokens_per_second: PositiveFloat | None = None
    """tokens per second of audio, plus ten"""
    repetition_guard: PositiveInt | None = None
    """tokens of a repetition before the answer ends"""
    batch_seconds: PositiveFloat | None = None
    """seconds of audio in a batch, padding included"""


OPTIONS = tuple(field.name for field in dataclasses.fields(DecodingOptions))
SAMPLING_OPTIONS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
# generate() returns one text per chat and nothing else
FIXED_OPTIONS = {
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "return_dict_in_generate": False,
}
# further entries of a GenerationConfig that have no meaning here
IGNORED_OPTIONS = (
    *FIXED_OPTIONS,
    "output_logits",
    "pad_token_id",
    "bos_token_id",
    "transformers_version",
)


def decoding_config(
    given: GenerationConfig | None,
    max_new_tokens: int | None,
    stop_ids: Sequence[int],
    **options: Any,
) -> GenerationConfig:
    """Return the complete decoding options of a call of `generate`.

    Args:
        given: the caller's GenerationConfig, if any.
        max_new_tokens: maximum number of tokens in an answer; None leaves it to `given`.
        stop_ids: token ids that end an answer.
        options: the caller's keywords, which override `given`.

    Raises:
        UserError: an option is unknown, unsupported, or has a wrong value.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise UserError(
            f"generation_config is a {type(given).__name__}. Give a GenerationConfig of "
            "transformers."
        )
    chosen = _without_none(vars(given or GenerationConfig()))
    keywords = _without_none(options)
    chosen |= keywords
    if max_new_tokens is not None:
        chosen["max_new_tokens"] = max_new_tokens
    if not chosen.get("do_sample"):
        for name in SAMPLING_OPTIONS:
            if name in keywords:
                raise UserError(
                    f"{name}={keywords[name]} has no effect without do_sample=True. Add it."
                )
            chosen.pop(name, None)
    complete = _without_none(vars(check_options(chosen)))
    further_stops = complete.get("eos_token_id", [])
    if not isinstance(further_stops, list):
        further_stops = [further_stops]
    all_stops = sorted({*stop_ids, *further_stops})
    # transformers warns without a padding token. Rows are cut at their first stop token anyway.
    complete |= {"eos_token_id": all_stops, "pad_token_id": all_stops[0]}
    try:
        return GenerationConfig(**complete, **FIXED_OPTIONS)
    except ValueError as error:
        raise UserError(
            f"the generation options contradict each other: {first_words(error)}. "
            "Change one of them."
        ) from error


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that are set, without private ones."""
    return {
        name: value
        for name, value in values.items()
        if value is not None and not name.startswith("_")
    }


def check_options(options: Mapping[str, Any]) -> DecodingOptions:
    """Return the options with defaults for those that are missing.

    Raises:
        UserError: an option is unknown, unsupported, or has a wrong value.
    """
    _check_output(options)
    known_to_transformers = vars(GenerationConfig())
    supported: dict[str, Any] = {}
    for name, value in options.items():
        if name in IGNORED_OPTIONS:
            continue
        if name not in OPTIONS and name in known_to_transformers:
            raise UserError(
                f"{name} is not supported in generate(), because the prompt contains audio. "
                "Leave it out."
            )
        if name not in OPTIONS:
            raise UserError(f"{name!r} is not an option of generate(). {nearest(name, OPTIONS)}")
        supported[name] = value
    return build(DecodingOptions, supported)


def _check_output(options: Mapping[str, Any]) -> None:
    """Raise UserError if options ask for another length or number of texts than supported."""
    if "max_length" in options:
        raise UserError(
            "max_length counts the tokens of the prompt and of the audio too. Use max_new_tokens."
        )
    if options.get("num_return_sequences", 1) != 1:
        raise UserError(
            f"num_return_sequences={options['num_return_sequences']!r} is not supported: "
            "generate() returns one text for each chat. Leave it out."
        )


def is_greedy(config: GenerationConfig) -> bool:
    """Return whether decoding is greedy search without an option that changes probabilities."""
    for field in dataclasses.fields(DecodingOptions):
        value = getattr(config, field.name, None)
        if value is None or field.name in ("max_new_tokens", "eos_token_id"):
            continue
        if value != field.default:
            return False
    return True
