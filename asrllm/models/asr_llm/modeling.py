"""The Hugging Face model class: text generation and files on top of the network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from asrllm.audio.waves import as_list
from asrllm.collator.chat import Messages
from asrllm.defaults import BATCH_SECONDS, MAX_SHARD_SIZE, MAX_TOKENS_PER_SECOND, REPETITION_GUARD
from asrllm.errors import reject_unknown
from asrllm.models.asr_llm.checks import check_given_config
from asrllm.models.asr_llm.generation import AudioInputs, generate
from asrllm.models.asr_llm.loading import load_directory
from asrllm.models.asr_llm.network import AsrLlmNetwork
from asrllm.models.asr_llm.placement import DeviceMap, device_of_map
from asrllm.models.asr_llm.processing import IGNORED_HUB_OPTIONS
from asrllm.models.asr_llm.saving import check_shard_size, save_model
from asrllm.models.base_models import BasePaths


class AsrLlmModel(AsrLlmNetwork):
    """An audio-to-text model in the conventions of transformers.

    Its attributes are those of AsrLlmNetwork.
    """

    # --- text generation ---

    def generate(
        self,
        inputs: AudioInputs,
        messages: Sequence[Messages],
        max_new_tokens: int | None = None,
        *,
        generation_config: GenerationConfig | None = None,
        max_tokens_per_second: float | None = None,
        repetition_guard: int | None = None,
        batch_seconds: float | None = BATCH_SECONDS,
        **generation: Any,
    ) -> list[str]:
        """Return one text for each chat.

        Args:
            inputs: features (x (N, T, F), x_lens (N,)); or a list of files, of float arrays or
                tensors at 16 kHz, and of pairs (array, rate in Hz). The order is that of the audio
                tokens in the chats.
            messages: chats. Each contains the audio token once per audio.
            max_new_tokens: maximum number of tokens in an answer. By default the value in
                `generation_config`, else 200.
            generation_config: options of transformers. Keywords override them.
            max_tokens_per_second: limits an answer to this many tokens per second of its audio,
                plus ten.
            repetition_guard: stops an answer that repeats the same few tokens for more than this
                many tokens, and removes all copies but one (see `answers.LoopDetector`).
            batch_seconds: seconds of audio that are decoded at a time, padding included. A longer
                list of audios is sorted by length and divided into batches; None decodes all at
                once. Features are never divided, nor are audios for an LLM that ZeRO-3 partitions.
            generation: options of transformers' GenerationConfig, for example `num_beams`. The
                default is greedy search; the LLM's own generation_config.json is not used.

        Raises:
            UserError: an audio, a chat or an option is wrong. Audios and chats are counted from 0.
        """
        answers = generate(
            self,
            inputs,
            messages,
            max_new_tokens,
            generation_config,
            max_tokens_per_second,
            repetition_guard,
            batch_seconds,
            **generation,
        )
        return [answer.text for answer in answers]

    def transcribe(
        self,
        audio: Sequence[Any],
        max_new_tokens: int | None = None,
        *,
        max_tokens_per_second: float | None = MAX_TOKENS_PER_SECOND,
        repetition_guard: int | None = REPETITION_GUARD,
        batch_seconds: float | None = BATCH_SECONDS,
        **generation: Any,
    ) -> list[str]:
        """Return the text of each audio, with the checkpoint's default prompt.

        The arguments are those of `generate`. By default the answers are limited by the duration
        of the audio and guarded against loops.
        """
        processor = self.require_processor()
        audio = as_list(audio)
        messages = [processor.renderer.user_messages(processor.default_prompt)] * len(audio)
        return self.generate(
            audio,
            messages,
            max_new_tokens,
            max_tokens_per_second=max_tokens_per_second,
            repetition_guard=repetition_guard,
            batch_seconds=batch_seconds,
            **generation,
        )

    # --- files ---

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        merge_adapter: bool = False,
        separate_adapter: bool = False,
        max_shard_size: int | str = MAX_SHARD_SIZE,
        **unknown: Any,
    ) -> None:
        """Write a self-contained directory.

        It contains the weights (safetensors), the configuration, the tokenizer, the chat template
        and the generation settings. Parts in `config.exclude_from_checkpoint` are not written;
        loading reads them from the paths in `config.base_models`.

        Args:
            save_directory: the directory.
            merge_adapter: write the model with its adapters merged into its layers, as a model
                without adapters. This model does not change. Merging needs memory for one layer.
            separate_adapter: write the LLM without its adapter, and the adapter to the subdirectory
                `adapter` in PEFT's format, for vLLM and PEFT. The adapter of the encoder is merged.
            max_shard_size: maximum size of a weight file in bytes, or a text like "5GB".

        Raises:
            UserError: the adapters cannot be merged, or a keyword is unknown.
        """
        known = ("merge_adapter", "separate_adapter", "max_shard_size")
        reject_unknown("save_pretrained()", unknown, known)
        check_shard_size(max_shard_size)
        save_model(
            self,
            Path(save_directory),
            merge_adapter=merge_adapter,
            separate_adapter=separate_adapter,
            max_shard_size=max_shard_size,
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: DeviceMap = None,
        config: PreTrainedConfig | None = None,
        base_models: BasePaths | None = None,
        **more: Any,
    ) -> "AsrLlmModel":
        """Return the model in a directory that `save_pretrained` wrote, in eval mode.

        Args:
            path: the directory.
            dtype: dtype of the weights. None or "auto" means as saved.
            torch_dtype: the old name of `dtype`.
            device_map: see asrllm.AutoModel.from_pretrained.
            config: the configuration that transformers' AutoModel has read from the directory.
            base_models: current paths of the base models of parts that the directory omits,
                {"audio_encoder" or "llm": path}.
            more: keywords that transformers' AutoModel passes (see IGNORED_HUB_OPTIONS).

        Raises:
            UserError: a keyword is unknown, or the configuration or a base model does not match.
        """
        device = device_of_map(device_map)
        if config is not None:
            check_given_config(config, path)
        unknown = {name: value for name, value in more.items() if name not in IGNORED_HUB_OPTIONS}
        reject_unknown("from_pretrained()", unknown, ("dtype", "device_map", "base_models"))
        dtype = torch_dtype if dtype is None else dtype
        return load_directory(cls, path, dtype=dtype, base_models=base_models).to(device)
