"""Text out: greedy, beam or sampled decoding of a batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from asrllm.audio.waves import as_list, audio_name
from asrllm.collator.batch import pad_left
from asrllm.collator.chat import Messages
from asrllm.data.index import RATE
from asrllm.defaults import MAX_NEW_TOKENS
from asrllm.errors import UserError, nearest
from asrllm.models.asr_llm.greedy_search import (
    DynamicCacheDecoder,
    Recorded,
    can_be_recorded,
    greedy,
)
from asrllm.models.asr_llm.processing import HOP, check_finite

if TYPE_CHECKING:
    from asrllm.models.asr_llm.modeling import AsrLlmModel

LONGEST_LOOP, FEWEST_COPIES = (
    16,
    5,
)  # tokens that repeat themselves, and how often they must to be a loop
# greedy search, said in full: transformers would fill what is None from the LLM's generation_config.json (Qwen's has a temperature and a
# repetition penalty), which is meant for conversation
PLAIN = {
    "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "early_stopping": False,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_scores": False,
    "return_dict_in_generate": False, "use_cache": True,
}  # fmt: skip


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_ids(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(is_whole(i) and i >= 0 for i in value)
    )


Rule = tuple[Callable[[Any], bool], str]
ABOVE_0: Rule = (lambda v: is_number(v) and v > 0, "a number above 0")
COUNT: Rule = (lambda v: is_whole(v) and v >= 0, "a whole number, not below 0")
COUNT_ABOVE_0: Rule = (lambda v: is_whole(v) and v > 0, "a whole number above 0")
SHARE: Rule = (lambda v: is_number(v) and 0 < v <= 1, "a number above 0, 1 at most")
CUTOFF: Rule = (lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
YES_OR_NO: Rule = (lambda v: isinstance(v, bool), "True or False")
IDS: Rule = (is_ids, "a list of token ids")
ID_OR_IDS: Rule = (lambda v: is_ids([v]) or is_ids(v), "a token id or a list of them")
# the options of transformers' GenerationConfig that mean something where the prompt is given as embeddings
OPTIONS: dict[str, Rule] = {
    "num_beams": COUNT_ABOVE_0,
    "length_penalty": (is_number, "a number"),
    "early_stopping": (lambda v: isinstance(v, bool) or v == "never", "True, False or 'never'"),
    "do_sample": YES_OR_NO,
    "temperature": ABOVE_0,
    "top_k": COUNT,
    "top_p": SHARE,
    "min_p": CUTOFF,
    "top_h": SHARE,
    "typical_p": SHARE,
    "epsilon_cutoff": CUTOFF,
    "eta_cutoff": CUTOFF,
    "repetition_penalty": ABOVE_0,
    "no_repeat_ngram_size": COUNT,
    "max_new_tokens": COUNT_ABOVE_0,
    "min_new_tokens": COUNT,
    "max_time": ABOVE_0,
    "stop_strings": (
        lambda v: all(
            isinstance(s, str) and s
            for s in ([v] if isinstance(v, str) else v if isinstance(v, list) and v else [None])
        ),
        "a text or a list of texts",
    ),
    "eos_token_id": ID_OR_IDS,
    "forced_eos_token_id": ID_OR_IDS,
    "suppress_tokens": IDS,
    "begin_suppress_tokens": IDS,
    "bad_words_ids": (
        lambda v: isinstance(v, list) and bool(v) and all(map(is_ids, v)),
        "a list of lists of token ids",
    ),
    "sequence_bias": (
        lambda v: (
            isinstance(v, dict)
            and bool(v)
            and all(is_ids(k) and is_number(x) for k, x in v.items())
        ),
        "{(token id, ...): number}",
    ),
    "exponential_decay_length_penalty": (
        lambda v: (
            isinstance(v, (list, tuple)) and len(v) == 2 and is_whole(v[0]) and is_number(v[1])
        ),
        "(tokens before it begins, factor)",
    ),
    "renormalize_logits": YES_OR_NO,
    "use_cache": YES_OR_NO,
}
# what an LLM's generation_config.json says beside; fixed below, or without a meaning for one text a chat
IGNORED_OPTIONS = ("pad_token_id", "bos_token_id", "transformers_version", "num_return_sequences", "output_attentions",
                  "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate")  # fmt: skip
SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)


@torch.no_grad()
def generate(
    model: AsrLlmModel,
    inputs: Any,
    messages: Sequence[Messages],
    max_new_tokens: int | None,
    generation_config: GenerationConfig | None,
    max_tokens_per_second: float | None,
    repetition_guard: int | None,
    **options: Any,
) -> list[Answer]:
    """See AsrLlmModel.generate."""
    processor = model.require_processor()
    config = decoding_config(
        generation_config, max_new_tokens, processor.renderer.stop_ids, **options
    )
    check_limits(max_tokens_per_second, repetition_guard)
    device = model.llm.get_input_embeddings().weight.device
    if is_features(inputs):
        features, lengths = processor.check_features(*inputs)
        samples = lengths.cpu() * HOP
        counts = processor.share_out(messages, len(samples))
        features, lengths = features.to(device), lengths.to(device)
    else:
        waves, samples = processor.load_waves(inputs)
        counts = processor.share_out(messages, len(samples))
        features, lengths = model.audio_encoder.features(waves.to(device), samples.to(device))
        names = [audio_name(item, i) for i, item in enumerate(as_list(inputs))]
        check_finite(
            features, names, "are not finite: its samples are too large, give floats from -1 to 1"
        )
    prompts = processor.encode_prompts(
        messages, counts, model.config.num_audio_tokens(samples).tolist()
    )
    input_ids, mask = (x.to(device) for x in pad_left(prompts))
    seconds = [float(part.sum()) / RATE for part in samples.split(counts)]
    limits = [token_limit(s, config.max_new_tokens, max_tokens_per_second) for s in seconds]
    with eval_mode(model):
        embeddings = model.embed(input_ids, model.encode(features, lengths))
        rows = decode(
            model,
            embeddings,
            mask,
            config,
            RowEnds(limits, repetition_guard if config.num_beams == 1 else None),
            len(counts),
        )
    ends = config.eos_token_id
    return [
        make_answer(processor.tokenizer, row[:limit], ends, repetition_guard)
        for row, limit in zip(rows, limits, strict=True)
    ]


def decode(
    model: AsrLlmModel,
    embeddings: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    ends: RowEnds,
    chats: int,
) -> list[list[int]]:
    """The new tokens of each chat. Greedy search is our own, but not of a partitioned LLM: there transformers keeps the ranks in step."""
    first, stops = FirstLogits(chats), config.eos_token_id
    partitioned = any(hasattr(p, "ds_id") for p in model.llm.parameters())
    if is_plain(config) and not partitioned and model.causal_lm._supports_default_dynamic_cache():
        llms = model.llm, model.causal_lm
        recorded = model.cuda_graphs and can_be_recorded(model.causal_lm)
        steps = (
            Recorded.fitting(*llms, mask, int(ends.limits.max()))
            if recorded
            else DynamicCacheDecoder(*llms)
        )
        return greedy(steps, embeddings, mask, stops, ends, first.check)
    set_length(config, int(ends.limits.max()), mask.shape[1], model.llm.generation_config)
    return model.llm.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([first]),
        stopping_criteria=StoppingCriteriaList([ends]),
        **({"tokenizer": model.require_processor().tokenizer} if config.stop_strings else {}),
    ).tolist()


def is_plain(config: GenerationConfig) -> bool:
    """Greedy search with no option that changes what is probable."""
    said = {name: value for name in OPTIONS if (value := getattr(config, name, None)) is not None}
    return all(
        value == PLAIN.get(name)
        for name, value in said.items()
        if name not in ("max_new_tokens", "eos_token_id")
    )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the LLM says. end: of what it was: "stop", by itself; "loop", of which one copy is kept; "limit", of its length."""

    text: str
    end: str = "stop"


def make_answer(tokenizer: Any, row: list[int], stops: Sequence[int], guard: int | None) -> Answer:
    until = next((i for i, token in enumerate(row) if token in stops), len(row))
    kept = cut(row, stops, guard)
    end = "loop" if len(kept) < until else "stop" if until < len(row) else "limit"
    return Answer(text=tokenizer.decode(kept, skip_special_tokens=True).strip(), end=end)


def is_features(inputs: Any) -> bool:
    """A pair of tensors is (x, x_lens); raw audio comes as a list."""
    return (
        isinstance(inputs, tuple)
        and len(inputs) == 2
        and all(isinstance(x, Tensor) for x in inputs)
    )


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; a model in training is put back as it was, module by module."""
    in_training = [module for module in model.modules() if module.training]
    if in_training:
        model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def check_limits(max_tokens_per_second: float | None, repetition_guard: int | None) -> None:
    if max_tokens_per_second is not None and not (
        is_number(max_tokens_per_second) and max_tokens_per_second > 0
    ):
        raise UserError(
            f"max_tokens_per_second={max_tokens_per_second!r} must be a number above 0, or None for no limit by duration"
        )
    if repetition_guard is not None and not (is_whole(repetition_guard) and repetition_guard > 0):
        raise UserError(
            f"repetition_guard={repetition_guard!r} must be a whole number above 0, or None for no guard"
        )


def token_limit(seconds: float, max_new_tokens: int, max_tokens_per_second: float | None) -> int:
    """The longest answer to so much audio: `max_tokens_per_second` of it and ten more, `max_new_tokens` at most."""
    if max_tokens_per_second is None:
        return max_new_tokens
    return min(max_new_tokens, round(seconds * max_tokens_per_second) + 10)


def decoding_config(
    given: GenerationConfig | None, max_new_tokens: int | None, stops: list[int], **options: Any
) -> GenerationConfig:
    """What the caller said, keywords before `given`, and PLAIN for the rest."""
    if given is not None and not isinstance(given, GenerationConfig):
        raise UserError(
            f"generation_config is a {type(given).__name__}: give a GenerationConfig of transformers"
        )
    said = {
        k: v
        for k, v in vars(given or GenerationConfig()).items()
        if v is not None and not k.startswith("_")
    }
    said |= {k: v for k, v in options.items() if v is not None}
    longest = (
        max_new_tokens if max_new_tokens is not None else said.get("max_new_tokens", MAX_NEW_TOKENS)
    )
    if not said.get("do_sample"):
        if wrong := [k for k in SAMPLING if k in options and options[k] is not None]:
            raise UserError(
                f"{wrong[0]}={options[wrong[0]]} is an option of sampling: give do_sample=True with it"
            )
        said = {k: v for k, v in said.items() if k not in SAMPLING}
    check_options(said | {"max_new_tokens": longest})
    given_stops = said.get("eos_token_id", [])
    stops = sorted({*stops, *(given_stops if isinstance(given_stops, list) else [given_stops])})
    said = {k: v for k, v in said.items() if k not in IGNORED_OPTIONS}
    fixed = {"max_new_tokens": longest, "eos_token_id": stops, "pad_token_id": stops[0]}
    try:
        return GenerationConfig(**PLAIN | said | fixed)
    except ValueError as error:
        raise UserError(
            f"the generation options do not fit together: {' '.join(str(error).split())}"
        ) from error


def check_options(said: dict[str, Any]) -> None:
    """Raises UserError for an option that is unknown, not possible or of another value than it may have."""
    if "max_length" in said:
        raise UserError(
            "max_length counts the prompt and the audio's tokens too: give max_new_tokens in its place"
        )
    if said.get("num_return_sequences", 1) != 1:
        raise UserError(
            f"num_return_sequences={said['num_return_sequences']!r} is not possible: generate() gives one text for each chat"
        )
    for name, value in said.items():
        if name in IGNORED_OPTIONS:
            continue
        if name not in OPTIONS and name in vars(GenerationConfig()):
            raise UserError(
                f"{name} is not possible in generate(), whose prompt holds audio: leave it out"
            )
        if name not in OPTIONS:
            raise UserError(f"{name!r} is no option of generate(): {nearest(name, OPTIONS)}")
        fits, what = OPTIONS[name]
        if not fits(value):
            raise UserError(f"{name}={value!r} must be {what}")


def set_length(
    config: GenerationConfig, tokens: int, prompt: int, defaults: GenerationConfig
) -> None:
    """End every row after so many tokens; in the terms of the LLM's defaults, because transformers warns where both are set."""
    if defaults.max_length is None:
        config.max_new_tokens = tokens
    else:
        config.max_new_tokens, config.max_length = None, prompt + tokens


class FirstLogits(LogitsProcessor):
    """Raises UserError where an answer's first token has no probabilities: it would be an empty text, as if nothing had been said."""

    def __init__(self, chats: int) -> None:
        self.chats, self.seen = chats, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (rows, vocabulary), of which beam search has several rows for each chat; given out as they are"""
        if not self.seen:
            self.check(scores)
        self.seen = True
        return scores

    def check(self, scores: Tensor) -> None:
        if (bad := scores.isnan().any(1)).any():
            raise UserError(
                f"the model answers chat {int(bad.nonzero()[0]) // (len(bad) // self.chats)} with NaN: its weights hold NaN, or numbers "
                f"too large for {str(scores.dtype).removeprefix('torch.')}: load other weights, or with dtype='float32'"
            )


class RowEnds(StoppingCriteria):
    """Ends each row at its own limit, or where it has begun to loop: the batch ends with the last of its rows.

    guard: as in first_loop; None with beam search, where a looping hypothesis that was ended would win over honest ones that go on.
    """

    def __init__(self, limits: Sequence[int], guard: int | None) -> None:
        self.limits, self.guard = torch.tensor(limits), guard

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.limits = self.limits[rows]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """input_ids (rows, new tokens), of which beam search has several for each answer -> (rows,) bool"""
        length = input_ids.shape[1]
        self.limits = self.limits.to(input_ids.device)
        done = (self.limits <= length).repeat_interleave(len(input_ids) // len(self.limits))
        for n in range(1, LONGEST_LOOP + 1) if self.guard else ():
            stretch = n * copies_of_loop(n, self.guard or 0)
            if stretch <= length:
                done |= (
                    input_ids[:, length - stretch + n :]
                    == input_ids[:, length - stretch : length - n]
                ).all(1)
        return done


def copies_of_loop(n: int, guard: int) -> int:
    """How many copies of n tokens in a row are a loop: more than `guard` tokens, and FEWEST_COPIES at least."""
    return max(FEWEST_COPIES, guard // n + 1)


def first_loop(row: Sequence[Hashable], guard: int) -> int | None:
    """Where the first loop's second copy begins.

    A loop is the same 1 to LONGEST_LOOP tokens at least FEWEST_COPIES times in a row, which together are more than `guard` tokens. With
    32: one token 33 times, two tokens 17 times, seven or more tokens 5 times. Laughter, "no no no" and rows of digits are shorter.
    """
    found: list[tuple[int, int]] = []  # where the loop is complete, where its second copy begins
    for n in range(1, LONGEST_LOOP + 1):
        needed, run = n * (copies_of_loop(n, guard) - 1), 0
        for i in range(n, len(row)):
            run = run + 1 if row[i] == row[i - n] else 0
            if run >= needed:
                found.append((i, i - run + 1))
                break
    return min(found)[1] if found else None


def cut(row: list[int], stops: Sequence[int], guard: int | None) -> list[int]:
    """The answer without its end and what stands behind it; one copy of a loop, and nothing after it, which would be no better."""
    row = row[: next((i for i, token in enumerate(row) if token in stops), len(row))]
    return row[: first_loop(row, guard)] if guard else row
