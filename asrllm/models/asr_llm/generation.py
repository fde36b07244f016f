"""Text generation: greedy search, beam search or sampling for a batch of audios."""

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from asrllm.audio.waves import as_list, audio_name
from asrllm.collator.batch import pad_left
from asrllm.collator.chat import Messages
from asrllm.data.index import RATE
from asrllm.errors import UserError
from asrllm.models.asr_llm.decoding_options import AnswerLimits, decoding_config, is_greedy
from asrllm.models.asr_llm.greedy_search import DynamicCacheDecoder, greedy
from asrllm.models.asr_llm.network import AsrLlmNetwork
from asrllm.models.asr_llm.processing import HOP, check_finite
from asrllm.schema import build

MAX_LOOP_TOKENS = 16  # the longest sequence of tokens whose repetition counts as a loop
MIN_LOOP_COPIES = 5  # how often it must be repeated
EXTRA_TOKENS = 10  # added to the limit by duration, so that a short audio can have an answer
# Features (x, x_lens), or a list of audios.
AudioInputs = tuple[Tensor, Tensor] | Sequence[Any]


def token_limit(seconds: float, max_new_tokens: int, max_tokens_per_second: float | None) -> int:
    """Return the maximum number of tokens in the answer to some seconds of audio."""
    if max_tokens_per_second is None:
        return max_new_tokens
    return min(max_new_tokens, round(seconds * max_tokens_per_second) + EXTRA_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The LLM's answer to a chat.

    Attributes:
        text: the text, without special tokens.
        end: why it ended: "stop" at a stop token, "loop" for a repetition of which one copy
            remains, "limit" at its maximum length.
    """

    text: str
    end: str = "stop"


@torch.no_grad()
def generate(
    model: AsrLlmNetwork,
    inputs: AudioInputs,
    messages: Sequence[Messages],
    max_new_tokens: int | None,
    generation_config: GenerationConfig | None,
    max_tokens_per_second: float | None,
    repetition_guard: int | None,
    **options: Any,
) -> list[Answer]:
    """Return the answers of a model. The arguments are those of `AsrLlmModel.generate`."""
    processor = model.require_processor()
    stop_ids = processor.renderer.stop_ids
    config = decoding_config(generation_config, max_new_tokens, stop_ids, **options)
    limits = {
        "max_tokens_per_second": max_tokens_per_second,
        "repetition_guard": repetition_guard,
    }
    build(AnswerLimits, limits)
    device = model.llm.get_input_embeddings().weight.device
    features, lengths, samples, counts = _prepare_audio(model, inputs, messages, device)
    audio_tokens = model.config.num_audio_tokens(samples).tolist()
    prompts = processor.encode_prompts(messages, counts, audio_tokens)
    input_ids, mask = (x.to(device) for x in pad_left(prompts))
    token_limits: list[int] = []
    for part in samples.split(counts):
        seconds = float(part.sum()) / RATE
        token_limits.append(token_limit(seconds, config.max_new_tokens, max_tokens_per_second))
    guard = repetition_guard if config.num_beams == 1 else None
    with eval_mode(model):
        embeddings = model.embed(input_ids, model.encode(features, lengths))
        stopping = RowStopping(token_limits, guard)
        rows = decode(model, embeddings, mask, config, stopping, len(counts))
    return [
        make_answer(processor.tokenizer, row[:limit], config.eos_token_id, repetition_guard)
        for row, limit in zip(rows, token_limits, strict=True)
    ]


def _prepare_audio(
    model: AsrLlmNetwork, inputs: AudioInputs, messages: Sequence[Messages], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Check the inputs and compute features.

    Returns:
        Features (N, T, F) and their lengths in frames (N,) on the device, the lengths in samples
        (N,) on the CPU, and the number of audios in each chat.
    """
    processor = model.require_processor()
    if is_features(inputs):
        features, lengths = processor.check_features(*inputs)
        samples = lengths.cpu() * HOP
        counts = processor.count_audios(messages, len(samples))
        return features.to(device), lengths.to(device), samples, counts
    waves, samples = processor.load_waves(inputs)
    counts = processor.count_audios(messages, len(samples))
    features, lengths = model.audio_encoder.features(waves.to(device), samples.to(device))
    names = [audio_name(item, i) for i, item in enumerate(as_list(inputs))]
    problem = "are not finite, because its samples are too large. Give floats from -1 to 1."
    check_finite(features, names, problem)
    return features, lengths, samples, counts


def decode(
    model: AsrLlmNetwork,
    embeddings: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    stopping: "RowStopping",
    chats: int,
) -> list[list[int]]:
    """Return the new tokens of each chat.

    Greedy search is our own, except for an LLM that ZeRO-3 has partitioned: there transformers
    keeps the ranks in step.

    Args:
        model: the model.
        embeddings: prompts, padded on the left (N, T, LLM width).
        mask: attention mask of the prompts (N, T).
        config: decoding options.
        stopping: when each row ends.
        chats: number of chats.
    """
    first_logits = FirstLogitsCheck(chats)
    max_tokens = int(stopping.limits.max())
    is_partitioned = any(hasattr(p, "ds_id") for p in model.llm.parameters())
    has_cache = model.causal_lm._supports_default_dynamic_cache()
    if is_greedy(config) and not is_partitioned and has_cache:
        decoder = DynamicCacheDecoder(model.llm, model.causal_lm)
        stop_ids = config.eos_token_id
        return greedy(decoder, embeddings, mask, stop_ids, stopping, first_logits.check)
    set_length(config, max_tokens, mask.shape[1], model.llm.generation_config)
    keywords = {}
    if config.stop_strings:
        keywords["tokenizer"] = model.require_processor().tokenizer
    return model.llm.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([first_logits]),
        stopping_criteria=StoppingCriteriaList([stopping]),
        **keywords,
    ).tolist()


def make_answer(
    tokenizer: PreTrainedTokenizerBase, row: list[int], stop_ids: Sequence[int], guard: int | None
) -> Answer:
    """Return the answer in the new tokens of a row."""
    length = first_stop(row, stop_ids)
    tokens = answer_tokens(row, stop_ids, guard)
    end = "limit"
    if len(tokens) < length:
        end = "loop"
    elif length < len(row):
        end = "stop"
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return Answer(text=text.strip(), end=end)


def is_features(inputs: AudioInputs) -> bool:
    """Return whether the inputs are features (x, x_lens). Raw audio is a list."""
    is_pair = isinstance(inputs, tuple) and len(inputs) == 2
    return is_pair and all(isinstance(x, Tensor) for x in inputs)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode inside the block, and restore the mode of each module after it."""
    in_training = [module for module in model.modules() if module.training]
    if in_training:
        model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def set_length(
    config: GenerationConfig, tokens: int, prompt: int, defaults: GenerationConfig
) -> None:
    """Limit every row to some new tokens.

    The limit is set by the option that the LLM's defaults use, because transformers warns if both
    are set.

    Args:
        config: decoding options; changed in place.
        tokens: maximum number of new tokens.
        prompt: number of tokens in the prompt.
        defaults: the LLM's own generation settings.
    """
    if defaults.max_length is None:
        config.max_new_tokens = tokens
    else:
        config.max_new_tokens = None
        config.max_length = prompt + tokens


class FirstLogitsCheck(LogitsProcessor):
    """Raise UserError if an answer's first token has no probabilities.

    Otherwise the answer would be an empty text, as if nothing had been spoken.
    """

    def __init__(self, chats: int) -> None:
        self.chats = chats
        self.is_checked = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (rows, vocabulary) unchanged. Beam search has several rows per chat."""
        if not self.is_checked:
            self.check(scores)
        self.is_checked = True
        return scores

    def check(self, scores: Tensor) -> None:
        """Raise UserError if a row of the scores contains NaN."""
        is_nan = scores.isnan().any(1)
        if not is_nan.any():
            return
        row = int(is_nan.nonzero()[0])
        chat = row // (len(is_nan) // self.chats)
        dtype = str(scores.dtype).removeprefix("torch.")
        raise UserError(
            f"the model's logits for chat {chat} are NaN: its weights contain NaN, or numbers too "
            f"large for {dtype}. Load other weights, or use dtype='float32'."
        )


class RowStopping(StoppingCriteria):
    """Stop each row at its own limit, or when it has begun to loop.

    A batch ends with the last of its rows.

    Attributes:
        limits: maximum number of new tokens of each row.
        guard: as in `first_loop`. It is None with beam search, where a looping hypothesis that
            was stopped would win over correct ones that continue.
    """

    def __init__(self, limits: Sequence[int], guard: int | None) -> None:
        self.limits = torch.tensor(limits)
        self.guard = guard

    def keep(self, rows: Tensor) -> None:
        """Continue with some of the rows, given by their indices."""
        self.limits = self.limits[rows]

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        """Return which rows are done.

        Args:
            input_ids: (rows, new tokens). Beam search has several rows for each answer.
            scores: not used.

        Returns:
            (rows,) bool.
        """
        length = input_ids.shape[1]
        self.limits = self.limits.to(input_ids.device)
        rows_per_answer = len(input_ids) // len(self.limits)
        done = (self.limits <= length).repeat_interleave(rows_per_answer)
        if not self.guard:
            return done
        for n in range(1, MAX_LOOP_TOKENS + 1):
            start = length - n * copies_of_loop(n, self.guard)
            if start >= 0:
                is_loop = input_ids[:, start + n :] == input_ids[:, start : length - n]
                done |= is_loop.all(1)
        return done


def copies_of_loop(n: int, guard: int) -> int:
    """Return how many consecutive copies of n tokens are a loop.

    They must have more than `guard` tokens together, and be at least MIN_LOOP_COPIES.
    """
    return max(MIN_LOOP_COPIES, guard // n + 1)


def first_loop(row: Sequence[Hashable], guard: int) -> int | None:
    """Return where the second copy of the first loop begins, or None if there is no loop.

    A loop is the same 1 to MAX_LOOP_TOKENS tokens at least MIN_LOOP_COPIES times in a row, with
    more than `guard` tokens together. For guard=32 it is one token 33 times, two tokens 17 times,
    or seven or more tokens 5 times. Laughter, "no no no" and rows of digits are shorter.
    """
    found: list[tuple[int, int]] = []  # (where the loop is complete, where its second copy begins)
    for n in range(1, MAX_LOOP_TOKENS + 1):
        needed = n * (copies_of_loop(n, guard) - 1)
        run = 0
        for i in range(n, len(row)):
            run = run + 1 if row[i] == row[i - n] else 0
            if run >= needed:
                found.append((i, i - run + 1))
                break
    return min(found)[1] if found else None


def first_stop(row: Sequence[int], stop_ids: Sequence[int]) -> int:
    """Return the position of the first stop token, or the length of the row if it has none."""
    for i, token in enumerate(row):
        if token in stop_ids:
            return i
    return len(row)


def answer_tokens(row: list[int], stop_ids: Sequence[int], guard: int | None) -> list[int]:
    """Return the tokens of an answer: those before the first stop token and before a loop.

    The first copy of a loop is part of the answer. What follows a loop is not reliable either.
    """
    row = row[: first_stop(row, stop_ids)]
    if not guard:
        return row
    return row[: first_loop(row, guard)]
