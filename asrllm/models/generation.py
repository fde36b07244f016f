"""Text out: greedy, beam or sampled decoding of a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from asrllm.collator.batch import pad_left
from asrllm.collator.chat import Messages
from asrllm.models.model import AsrLlmModel

HOP = 160  # samples a feature frame, for Whisper and for Kaldi features


@torch.no_grad()
def generate(
    model: AsrLlmModel, inputs: Any, messages: Sequence[Messages], max_new_tokens: int | Sequence[int], **generation: Any
) -> list[str]:
    """See AsrLlmModel.generate."""
    processor = model.require_processor()
    device = model.llm.get_input_embeddings().weight.device
    if isinstance(inputs, tuple):
        features, lengths = (x.to(device) for x in inputs)
        counts = tokens_of_features(model, lengths)
    else:
        waves, wave_lengths = processor.load_waves(inputs)
        features, lengths = model.audio_encoder.features(waves.to(device), wave_lengths.to(device))
        counts = model.config.num_audio_tokens(wave_lengths).tolist()
    prompts = processor.encode_prompts(messages, counts)
    input_ids, mask = (x.to(device) for x in pad_left(prompts))
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    output = model.llm.generate(
        inputs_embeds=model.embed(input_ids, model.encode(features, lengths)),
        attention_mask=mask,
        max_new_tokens=max(limits),
        eos_token_id=processor.renderer.stop_ids,
        pad_token_id=processor.renderer.stop_ids[0],
        **({"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | generation),
    )
    rows = [row[:limit] for row, limit in zip(output, limits, strict=True)]
    return [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


def tokens_of_features(model: AsrLlmModel, lengths: Tensor) -> list[int]:
    return model.config.num_audio_tokens(lengths.cpu() * HOP).tolist()
