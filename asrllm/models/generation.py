"""Text out: greedy, beam or sampled decoding of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from asrllm.collator.batch import pad_left
from asrllm.collator.chat import Messages
from asrllm.data.index import RATE
from asrllm.errors import UserError
from asrllm.models.processor import HOP

if TYPE_CHECKING:
    from asrllm.models.model import AsrLlmModel

MAX_NEW_TOKENS = 200
MAX_TOKENS_PER_SECOND = 15.0
REPETITION_GUARD = 32
LONGEST_LOOP, FEWEST_COPIES = 16, 5  # tokens that repeat themselves, and how often they must to be a loop
# greedy search, said in full: transformers would fill what is None from the LLM's generation_config.json (Qwen's has a temperature and a
# repetition penalty), which is meant for conversation
PLAIN = {
    "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "early_stopping": False,
    "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False, "output_scores": False,
    "return_dict_in_generate": False, "use_cache": True,
}  # fmt: skip
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


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
) -> list[str]:
    """See AsrLlmModel.generate."""
    processor = model.require_processor()
    stops = processor.renderer.stop_ids
    config = decoding_config(generation_config, max_new_tokens, stops, **options)
    if repetition_guard is not None and (not isinstance(repetition_guard, int) or repetition_guard < 1):
        raise UserError(f"repetition_guard={repetition_guard!r} must be a whole number above 0, or None for no guard")
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
    prompts = processor.encode_prompts(messages, counts, model.config.num_audio_tokens(samples).tolist())
    input_ids, mask = (x.to(device) for x in pad_left(prompts))
    seconds = [float(part.sum()) / RATE for part in samples.split(counts)]
    limits = [token_limit(s, config.max_new_tokens, max_tokens_per_second) for s in seconds]
    set_length(config, max(limits), input_ids.shape[1], model.llm.generation_config)
    ends = RowEnds(limits, repetition_guard if config.num_beams == 1 else None)
    rows = model.llm.generate(
        inputs_embeds=model.embed(input_ids, model.encode(features, lengths)),
        attention_mask=mask,
        generation_config=config,
        stopping_criteria=StoppingCriteriaList([ends]),
    ).tolist()
    rows = [cut(row[:limit], stops, repetition_guard) for row, limit in zip(rows, limits, strict=True)]
    return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def is_features(inputs: Any) -> bool:
    """A pair of tensors is (x, x_lens); raw audio comes as a list."""
    return isinstance(inputs, tuple) and len(inputs) == 2 and all(isinstance(x, Tensor) for x in inputs)


def token_limit(seconds: float, max_new_tokens: int, max_tokens_per_second: float | None) -> int:
    """The longest answer to so much audio: `max_tokens_per_second` of it and ten more, `max_new_tokens` at most."""
    if max_tokens_per_second is None:
        return max_new_tokens
    if not 0 < max_tokens_per_second < float("inf"):
        raise UserError(f"max_tokens_per_second={max_tokens_per_second} must be a number above 0, or None for no limit by duration")
    return min(max_new_tokens, round(seconds * max_tokens_per_second) + 10)


def decoding_config(given: GenerationConfig | None, max_new_tokens: int | None, stops: list[int], **options: Any) -> GenerationConfig:
    """What the caller said, keywords before `given`, and PLAIN for the rest."""
    said = {k: v for k, v in vars(given or GenerationConfig()).items() if v is not None and not k.startswith("_")}
    if unknown := [k for k in options if k not in vars(GenerationConfig())]:
        raise UserError(f"{unknown[0]!r} is no option of generate() nor of transformers' GenerationConfig: correct its name")
    said |= {k: v for k, v in options.items() if v is not None}
    longest = max_new_tokens if max_new_tokens is not None else said.get("max_new_tokens", MAX_NEW_TOKENS)
    if not isinstance(longest, int) or longest < 1:
        raise UserError(f"max_new_tokens={longest!r} must be a whole number above 0")
    if "max_length" in said:
        raise UserError("max_length counts the prompt and the audio's tokens too: give max_new_tokens in its place")
    if said.get("num_return_sequences", 1) != 1:
        raise UserError(f"num_return_sequences={said['num_return_sequences']} is not possible: generate() gives one text for each chat")
    if not said.get("do_sample"):
        if wrong := [k for k in SAMPLING if k in options and options[k] is not None]:
            raise UserError(f"{wrong[0]}={options[wrong[0]]} is an option of sampling: give do_sample=True with it")
        said = {k: v for k, v in said.items() if k not in SAMPLING}
    given_stops = said.get("eos_token_id", [])
    stops = sorted({*stops, *(given_stops if isinstance(given_stops, list) else [given_stops])})
    outputs = {k: PLAIN[k] for k in PLAIN if k.startswith(("output_", "return_"))}  # rows of ids are what is read here
    fixed = {"max_new_tokens": longest, "eos_token_id": stops, "pad_token_id": stops[0]}
    try:
        return GenerationConfig(**PLAIN | said | outputs | fixed)
    except ValueError as error:
        raise UserError(f"the generation options do not fit together: {' '.join(str(error).split())}") from error


def set_length(config: GenerationConfig, tokens: int, prompt: int, defaults: GenerationConfig) -> None:
    """End every row after so many tokens; in the terms of the LLM's defaults, because transformers warns where both are set."""
    if defaults.max_length is None:
        config.max_new_tokens = tokens
    else:
        config.max_new_tokens, config.max_length = None, prompt + tokens


class RowEnds(StoppingCriteria):
    """Ends each row at its own limit, or where it has begun to loop: the batch ends with the last of its rows.

    guard: as in first_loop; None with beam search, where a looping hypothesis that was ended would win over honest ones that go on.
    """

    def __init__(self, limits: Sequence[int], guard: int | None) -> None:
        self.limits, self.guard = torch.tensor(limits), guard

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """input_ids (rows, new tokens), of which beam search has several for each answer -> (rows,) bool"""
        length = input_ids.shape[1]
        self.limits = self.limits.to(input_ids.device)
        done = (self.limits <= length).repeat_interleave(len(input_ids) // len(self.limits))
        for n in range(1, LONGEST_LOOP + 1) if self.guard else ():
            stretch = n * copies_of_loop(n, self.guard or 0)
            if stretch <= length:
                done |= (input_ids[:, length - stretch + n :] == input_ids[:, length - stretch : length - n]).all(1)
        return done


def copies_of_loop(n: int, guard: int) -> int:
    """How many copies of n tokens in a row are a loop: more than `guard` tokens, and FEWEST_COPIES at least."""
    return max(FEWEST_COPIES, guard // n + 1)


def first_loop(row: Sequence[int], guard: int) -> int | None:
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
