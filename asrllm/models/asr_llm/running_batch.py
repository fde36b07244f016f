"""A batch that chats join and leave while it is decoded."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import GenerationConfig

from asrllm.models.asr_llm.generation import (
    Answer,
    FirstLogitsCheck,
    embed_prompts,
    make_answer,
    make_features,
    make_requests,
)
from asrllm.models.asr_llm.greedy_search import AnswerRow, DynamicCacheDecoder, GreedyBatch
from asrllm.models.asr_llm.network import AsrLlmNetwork


class RunningBatch:
    """Decodes chats by greedy search. Each is answered as if it were alone.

    A chat that joins has its audio encoded and its prompt read while the others wait; from then on
    every step decodes one token of each.
    """

    def __init__(
        self,
        model: AsrLlmNetwork,
        config: GenerationConfig,
        *,
        max_tokens_per_second: float | None,
        repetition_guard: int | None,
    ) -> None:
        """
        Args:
            model: the model, in eval mode.
            config: decoding options of a greedy search.
            max_tokens_per_second: see `AsrLlmModel.generate`.
            repetition_guard: see `AsrLlmModel.generate`.
        """
        self.model = model
        self.config = config
        self.max_tokens_per_second = max_tokens_per_second
        self.repetition_guard = repetition_guard
        decoder = DynamicCacheDecoder(model.llm, model.causal_lm)
        self.batch = GreedyBatch(decoder, config.eos_token_id)

    @property
    def can_join(self) -> bool:
        """Whether chats can join now. Some LLMs have caches that only one batch can use."""
        return not self.batch.rows or self.batch.decoder.can_append

    @torch.no_grad()
    def join(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[AnswerRow]:
        """Add prompts about one audio each, and return their rows, which `step` fills.

        Args:
            waves: (samples,) float32 at 16 kHz each.
            prompts: one per waveform.

        Raises:
            UserError: the features or logits of an audio are not finite.
        """
        renderer = self.model.require_processor().renderer
        messages = [renderer.user_messages(prompt) for prompt in prompts]
        samples = torch.tensor([len(wave) for wave in waves])
        requests = make_requests(
            self.model, messages, samples, self.config, self.max_tokens_per_second
        )
        features = make_features(self.model, waves, waves, range(len(waves)))
        embeddings, mask = embed_prompts(self.model, features, requests)
        rows = [AnswerRow(request.limit, self.repetition_guard) for request in requests]
        check = FirstLogitsCheck(range(len(rows))).check
        self.batch.join(embeddings, mask, rows, check)
        return rows

    @torch.no_grad()
    def step(self) -> list[tuple[AnswerRow, Answer]]:
        """Decode one token of each chat, and return the rows that this finished."""
        unfinished = [row for row in self.batch.rows if not row.is_done]
        self.batch.step()
        return [(row, self._answer(row)) for row in unfinished if row.is_done]

    def _answer(self, row: AnswerRow) -> Answer:
        tokenizer = self.model.require_processor().tokenizer
        return make_answer(
            tokenizer, row.tokens, self.config.eos_token_id, self.repetition_guard, row.logprobs
        )
