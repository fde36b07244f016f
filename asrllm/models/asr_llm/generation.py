"""Text generation: greedy search, beam search or sampling for a batch of audios."""

import contextlib
import copy
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from asrllm.audio.waves import audio_name, padded
from asrllm.collator.batch import pad_left
from asrllm.collator.chat import Messages
from asrllm.defaults import RATE, WHISPER_WINDOW
from asrllm.errors import UserError
from asrllm.models.asr_llm.answers import RowStopping, answer_tokens, first_stop, token_limit
from asrllm.models.asr_llm.decoding_options import AnswerLimits, decoding_config, is_greedy
from asrllm.models.asr_llm.greedy_search import AnswerRow, DynamicCacheDecoder, greedy
from asrllm.models.asr_llm.network import AsrLlmNetwork
from asrllm.models.asr_llm.parallel_batches import map_batches, parallel_batches
from asrllm.models.asr_llm.processing import check_finite_features, feature_shape
from asrllm.models.partitioning import is_partitioned
from asrllm.schema import build

# Features (x, x_lens), or a list of audios.
AudioInputs = tuple[Tensor, Tensor] | Sequence[Any]
FeatureBatch = tuple[Tensor, Tensor]  # features (N, T, F), and their lengths in frames (N,)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The LLM's answer to a chat.

    Attributes:
        text: the text, without special tokens.
        end: why it ended: "stop" at a stop token, "loop" for a repetition of which one copy
            remains, "limit" at its maximum length.
        tokens: tokens of the text.
        logprob: mean natural logarithm of the probabilities of these tokens, and of the stop token
            if one ended them; None if it was not computed or the text has no token.
    """

    text: str
    end: str = "stop"
    tokens: Sequence[int] = ()
    logprob: float | None = field(default=None, compare=False)  # its last digits vary with a batch


@dataclass(frozen=True, kw_only=True)
class Request:
    """A chat to answer.

    Attributes:
        number: index of the chat in its list, from 0.
        prompt: its tokens.
        audios: numbers of its audios.
        seconds: duration of all its audios.
        limit: maximum number of tokens of the answer.
    """

    number: int
    prompt: list[int]
    audios: range
    seconds: float
    limit: int


@torch.no_grad()
def generate(
    model: AsrLlmNetwork,
    inputs: AudioInputs,
    messages: Sequence[Messages],
    max_new_tokens: int | None,
    generation_config: GenerationConfig | None,
    max_tokens_per_second: float | None,
    repetition_guard: int | None,
    batch_seconds: float | None = None,
    **options: Any,
) -> list[Answer]:
    """Return the answers of a model. The arguments are those of `AsrLlmModel.generate`."""
    processor = model.require_processor()
    config = decoding_config(
        generation_config, max_new_tokens, processor.renderer.stop_ids, **options
    )
    limits = {
        "max_tokens_per_second": max_tokens_per_second,
        "repetition_guard": repetition_guard,
        "batch_seconds": batch_seconds,
    }
    build(AnswerLimits, limits)
    features: FeatureBatch | None = None
    waves: list[np.ndarray] = []
    if is_features(inputs):
        features = processor.check_features(*inputs)
        samples = features[1].cpu() * feature_shape(model.config)[1]
    else:
        waves = processor.read_waves(inputs)
        samples = torch.tensor([len(wave) for wave in waves])
    requests = make_requests(model, messages, samples, config, max_tokens_per_second)
    batches = [requests]
    if waves and batch_seconds is not None:
        batches = _divide(model, requests, batch_seconds)
    answers: dict[int, Answer] = {}

    @torch.no_grad()
    def answer(batch: Sequence[Request]) -> list[list[int]]:
        audios = [i for request in batch for i in request.audios]
        own = features or make_features(model, [waves[i] for i in audios], inputs, audios)
        return _answer(model, own, batch, config, repetition_guard)

    parallel = parallel_batches(device_of(model), samples=config.do_sample)
    with eval_mode(model):
        found = map_batches(answer, batches, min(parallel, len(batches)))
        for batch, rows in zip(batches, found, strict=True):
            for request, row in zip(batch, rows, strict=True):
                answers[request.number] = make_answer(
                    processor.tokenizer, row[: request.limit], config.eos_token_id, repetition_guard
                )
    return [answers[request.number] for request in requests]


def make_requests(
    model: AsrLlmNetwork,
    messages: Sequence[Messages],
    samples: Tensor,
    config: GenerationConfig,
    max_tokens_per_second: float | None,
) -> list[Request]:
    """Check chats and tokenize them.

    Args:
        model: the model.
        messages: the chats.
        samples: length of each audio in samples (N,).
        config: decoding options.
        max_tokens_per_second: see `AsrLlmModel.generate`.
    """
    processor = model.require_processor()
    counts = processor.count_audios(messages, len(samples))
    audio_tokens = model.config.num_audio_tokens(samples).tolist()
    prompts = processor.encode_prompts(messages, counts, audio_tokens)
    requests: list[Request] = []
    begin = 0
    for number, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        audios = range(begin, begin + count)
        begin += count
        seconds = float(samples[audios.start : audios.stop].sum()) / RATE
        limit = token_limit(seconds, config.max_new_tokens, max_tokens_per_second)
        requests.append(
            Request(number=number, prompt=prompt, audios=audios, seconds=seconds, limit=limit)
        )
    return requests


def _divide(
    model: AsrLlmNetwork, requests: Sequence[Request], batch_seconds: float
) -> list[list[Request]]:
    """Divide requests into batches of similar length."""
    if has_partitions(model):  # all ranks must have equally many batches
        return [list(requests)]
    shortest = WHISPER_WINDOW if model.config.pad_to_30s else 0.0
    seconds = np.array([max(request.seconds, shortest) for request in requests])
    batches: list[list[Request]] = []
    for rows in make_batches(seconds, batch_seconds):
        batches.append([requests[i] for i in sorted(rows)])
    return batches


def make_features(
    model: AsrLlmNetwork, waves: Sequence[np.ndarray], inputs: AudioInputs, audios: Sequence[int]
) -> FeatureBatch:
    """Return the features of some audios.

    Args:
        model: the model.
        waves: samples of each.
        inputs: all audios, as the caller passed them.
        audios: numbers of the waves in `inputs`.
    """
    device = device_of(model)
    batch, samples = padded(waves)
    features, lengths = model.audio_encoder.features(batch.to(device), samples.to(device))
    names = [audio_name(inputs[i], i) for i in audios]
    problem = "are not finite, because its samples are too large. Give floats from -1 to 1."
    check_finite_features(features, names, problem)
    return features, lengths


def _answer(
    model: AsrLlmNetwork,
    features: FeatureBatch,
    batch: Sequence[Request],
    config: GenerationConfig,
    repetition_guard: int | None,
) -> list[list[int]]:
    """Return the new tokens of each chat of a batch."""
    embeddings, mask = embed_prompts(model, features, batch)
    # With beams, a stopped loop would win over correct hypotheses that continue.
    guard = repetition_guard if config.num_beams == 1 else None
    stopping = RowStopping([request.limit for request in batch], guard)
    numbers = [request.number for request in batch]
    return decode(model, embeddings, mask, config, stopping, numbers)


def embed_prompts(
    model: AsrLlmNetwork, features: FeatureBatch, batch: Sequence[Request]
) -> tuple[Tensor, Tensor]:
    """Return the prompts of chats with their audios.

    Returns:
        Embeddings, padded on the left (N, T, LLM width), and their attention mask (N, T).
    """
    device = device_of(model)
    input_ids, mask = pad_left([request.prompt for request in batch])
    frames, lengths = features
    encoded = model.encode(frames.to(device), lengths.to(device))
    return model.embed(input_ids.to(device), encoded), mask.to(device)


def device_of(model: AsrLlmNetwork) -> torch.device:
    """Return the device of the LLM's embeddings, where the prompts begin."""
    return model.llm.get_input_embeddings().weight.device


def has_partitions(model: AsrLlmNetwork) -> bool:
    """Return whether ZeRO-3 partitions the LLM."""
    return any(is_partitioned(parameter) for parameter in model.llm.parameters())


def make_batches(
    seconds: np.ndarray, max_duration: float, skip: Container[int] = ()
) -> list[list[int]]:
    """Divide utterances into batches, longest utterances first.

    Args:
        seconds: (utterances,) length of each.
        max_duration: seconds of a batch, padding included; a longer utterance is alone.
        skip: utterances to leave out.
    """
    batches: list[list[int]] = []
    longest = 0.0
    for i in (-seconds).argsort(kind="stable"):
        if int(i) in skip:
            continue
        if not batches or longest * (len(batches[-1]) + 1) > max_duration:
            batches.append([])
            longest = float(seconds[i])
        batches[-1].append(int(i))
    return batches


def decode(
    model: AsrLlmNetwork,
    embeddings: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    stopping: RowStopping,
    chats: Sequence[int],
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
        chats: number of each chat, for the error message.
    """
    first_logits = FirstLogitsCheck(chats)
    max_tokens = int(stopping.limits.max())
    if uses_own_search(model, config):
        decoder = DynamicCacheDecoder(model.llm, model.causal_lm)
        rows = [AnswerRow(limit, stopping.guard) for limit in stopping.limits.tolist()]
        return greedy(decoder, embeddings, mask, config.eos_token_id, rows, first_logits.check)
    config = copy.deepcopy(config)  # batches that are decoded at the same time share it
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


def uses_own_search(model: AsrLlmNetwork, config: GenerationConfig) -> bool:
    """Return whether our greedy search can decode these options with this LLM."""
    has_cache = model.causal_lm._supports_default_dynamic_cache()
    return is_greedy(config) and not has_partitions(model) and has_cache


def make_answer(
    tokenizer: PreTrainedTokenizerBase,
    row: list[int],
    stop_ids: Sequence[int],
    guard: int | None,
    logprobs: Sequence[float] = (),
) -> Answer:
    """Return the answer in the new tokens of a row.

    Args:
        tokenizer: decodes the tokens.
        row: the new tokens.
        stop_ids: tokens that end an answer.
        guard: as in `answers.LoopDetector`.
        logprobs: logarithm of the probability of each token, if it is known.
    """
    length = first_stop(row, stop_ids)
    tokens = answer_tokens(row, stop_ids, guard)
    end = "limit"
    if len(tokens) < length:
        end = "loop"
    elif length < len(row):
        end = "stop"
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    counted = logprobs[: len(tokens) + (end == "stop")]
    return Answer(
        text=text.strip(),
        end=end,
        tokens=tokens,
        logprob=sum(counted) / len(counted) if counted else None,
    )


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

    def __init__(self, chats: Sequence[int]) -> None:
        """
        Args:
            chats: number of each chat, for the error message.
        """
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
        # Beam search has the same number of consecutive rows for each chat.
        row = int(is_nan.nonzero()[0])
        chat = self.chats[row // (len(is_nan) // len(self.chats))]
        dtype = str(scores.dtype).removeprefix("torch.")
        raise UserError(
            f"the model's logits for chat {chat} are NaN: its weights contain NaN, or numbers too "
            f"large for {dtype}. Load other weights, or use dtype='float32'."
        )
