"""A saved model as transformers loads it: its forward pass and text generation."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
)

from asrllm.defaults import MAX_TOKENS_PER_SECOND, RATE, REPETITION_GUARD
from asrllm.models.asr_llm.answers import RowStopping, answer_tokens, token_limit
from asrllm.models.cpu_linear import use_onednn
from asrllm.models.encoders.registry import build_encoder
from asrllm.models.portable.configuration import AsrLlmHubConfig
from asrllm.models.projectors import AudioProjector


class AsrLlmForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Audio encoder, projector and causal LLM. The projected audio replaces the audio tokens.

    The inputs are those of AsrLlmHubProcessor.
    """

    config_class = AsrLlmHubConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: AsrLlmHubConfig) -> None:
        super().__init__(config)
        config.check_code()
        fields = config.audio_encoder or {}
        text_config = config.get_text_config()
        self.audio_encoder = build_encoder(fields, pad_to_30s=config.pad_to_30s)
        self.llm = AutoModelForCausalLM.from_config(text_config)
        self.projector = AudioProjector.from_config(
            config,
            input_size=self.audio_encoder.output_dim,
            output_size=text_config.hidden_size,
        )
        use_onednn(self)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the LLM's embeddings."""
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module:
        """Return the LLM's head."""
        return self.llm.get_output_embeddings()

    def get_audio_features(self, input_features: Tensor, feature_lengths: Tensor) -> Tensor:
        """Return the embeddings of audios, one audio after the other.

        Args:
            input_features: (N, T, F).
            feature_lengths: number of frames of each audio (N,).

        Returns:
            (audio tokens of all audios, LLM width).
        """
        frames, lengths = self.audio_encoder(input_features, feature_lengths)
        return self.projector(frames, lengths)

    def forward(
        self,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_lengths: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        audio_samples: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """Return the output of the LLM.

        Args:
            input_ids: tokens with one audio token for each embedding of an audio (B, L).
            input_features: features of the audios in the order of their tokens (N, T, F).
            feature_lengths: number of frames of each audio (N,).
            attention_mask: 0 at padding, 1 elsewhere (B, L).
            inputs_embeds: embeddings instead of input_ids (B, L, LLM width).
            audio_samples: output of the processor that only `generate` uses.
            more: further arguments of the LLM, for example its cache and labels.
        """
        if inputs_embeds is None:
            assert input_ids is not None
            is_audio = input_ids == self.config.audio_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_audio, 0))
            if input_features is not None and is_audio.any():
                audio = self.get_audio_features(input_features, feature_lengths)
                if len(audio) != int(is_audio.sum()):
                    raise ValueError(
                        f"input_ids has {int(is_audio.sum())} audio tokens, but the audios have "
                        f"{len(audio)}. Make both with the processor."
                    )
                audio = audio.to(inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(is_audio[..., None], audio)
        return self.llm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **more)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        *,
        audio_samples: Tensor | None = None,
        max_tokens_per_second: float | None = MAX_TOKENS_PER_SECOND,
        repetition_guard: int | None = REPETITION_GUARD,
        stopping_criteria: StoppingCriteriaList | None = None,
        **more: Any,
    ) -> Tensor:
        """Return the tokens of the answers, without the prompts (B, new tokens).

        Args:
            input_ids: the prompts, padded on the left (B, L).
            audio_samples: number of samples of each chat's audio (B,), from the processor.
            max_tokens_per_second: limits an answer to this many tokens per second of audio, plus
                ten; None for no limit. Without audio_samples there is none.
            repetition_guard: ends an answer that repeats a few tokens for more than this many
                tokens; None for no guard.
            stopping_criteria: further reasons to end an answer.
            more: further arguments of transformers' generate().
        """
        limit = more.get("max_new_tokens") or self.generation_config.max_new_tokens
        limits = [limit] * len(input_ids)
        if audio_samples is not None:
            limits = [
                token_limit(samples / RATE, limit, max_tokens_per_second)
                for samples in audio_samples.tolist()
            ]
        prompt = input_ids.shape[1]
        guard = repetition_guard if more.get("num_beams", 1) == 1 else None
        stopping = RowStopping(limits, guard, prompt=prompt)
        rows = super().generate(
            input_ids,
            stopping_criteria=StoppingCriteriaList([*(stopping_criteria or []), stopping]),
            **more,
        )
        if not isinstance(rows, Tensor):  # return_dict_in_generate
            return rows
        rows = rows[:, prompt:]
        stop_ids = self.generation_config.eos_token_id or []
        stop_ids = stop_ids if isinstance(stop_ids, list) else [stop_ids]
        padding = self.generation_config.pad_token_id or 0
        for row, own_limit in zip(rows, limits, strict=True):
            answer = answer_tokens(row[:own_limit].tolist(), stop_ids, guard)
            row[len(answer) :] = padding
        return rows
