"""Text generation: greedy search, beam search or sampling for a batch of audios."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from asrllm.audio.waves import as_list, audio_name
from asrllm.collator.batch import pad_left
from asrllm.collator.chat import Messages
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.models.asr_llm.answers import RowStopping, answer_tokens, first_stop, token_limit
from asrllm.models.asr_llm.decoding_options import AnswerLimits, decoding_config, is_greedy
from asrllm.models.asr_llm.greedy_search import DynamicCacheDecoder, greedy
from asrllm.models.asr_llm.network import AsrLlmNetwork
from asrllm.models.asr_llm.processing import HOP, check_finite_features
from asrllm.schema import build

# Features (x, x_lens), or a list of audios.
AudioInputs = tuple[Tensor, Tensor] | Sequence[Any]


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
    check_finite_features(features, names, problem)
    return features, lengths, samples, counts


def decode(
    model: AsrLlmNetwork,
    embeddings: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    stopping: RowStopping,
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
