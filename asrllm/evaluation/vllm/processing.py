"""The inputs of a model in vLLM: prompts with audio, and requests for transcripts."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from asrllm.audio.waves import read_array
from asrllm.collator.chat import ChatRenderer
from asrllm.defaults import RATE
from asrllm.errors import UserError
from asrllm.evaluation.vllm.limits import longest_samples
from asrllm.models.portable.configuration import AsrLlmHubConfig

PLACEHOLDER = "<|AUDIO|>"  # what vLLM writes into a chat for an audio; the default audio token


@functools.lru_cache(maxsize=8)
def renderer_of(tokenizer: Any, audio_token: str) -> ChatRenderer:
    """Return the renderer of a tokenizer."""
    return ChatRenderer(tokenizer, audio_token)


class AsrLlmProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about a model before it loads."""

    def get_hf_config(self) -> AsrLlmHubConfig:
        """Return the configuration of the model."""
        return self.ctx.get_hf_config(AsrLlmHubConfig)

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return the limits: a prompt may have any number of audios."""
        return {"audio": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        """Return the number of tokens of the longest audio. The arguments are not used."""
        config = self.get_hf_config()
        return {"audio": config.num_audio_tokens(longest_samples(config))}

    def get_data_parser(self) -> MultiModalDataParser:
        """Return the parser of audios, which resamples them to 16 kHz in mono."""
        return MultiModalDataParser(target_sr=RATE, target_channels=1, audio_resample_method="soxr")


class AsrLlmDummyInputs(BaseDummyInputsBuilder):
    """Inputs of the largest size, for which vLLM reserves memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return a prompt with some audios."""
        return self.info.get_hf_config().audio_token * mm_counts.get("audio", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return some audios of the largest length. Other arguments are not used."""
        audio: np.ndarray = np.zeros(longest_samples(self.info.get_hf_config()), dtype=np.float32)
        return {"audio": [audio] * mm_counts.get("audio", 0)}


class AsrLlmMultiModalProcessor(BaseMultiModalProcessor):
    """Repeats the audio token in a prompt for each embedding of its audio.

    The model computes features from the samples itself.
    """

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]
    ) -> BatchFeature:
        """Return the samples of each audio (samples,), and their numbers.

        Raises:
            ValueError: an audio has no samples, infinite ones, or is too short or too long.
        """
        waves = [self._checked(audio, i) for i, audio in enumerate(hf_data["audio"])]
        lengths = torch.tensor([len(wave) for wave in waves])
        return BatchFeature({"waves": waves, "wave_lengths": lengths})

    def _checked(self, audio: Any, number: int) -> torch.Tensor:
        config = self.info.get_hf_config()
        try:
            wave = read_array(audio, f"audio {number}")
        except UserError as error:
            raise ValueError(str(error)) from error
        shortest = config.sample_limits()[0]
        longest = longest_samples(config)
        if not shortest <= len(wave) <= longest:
            raise ValueError(
                f"audio {number} lasts {len(wave) / RATE:.2f} s, but the model takes "
                f"{shortest / RATE:.2f} to {longest / RATE:g} s. Cut longer audio at pauses."
            )
        return torch.from_numpy(wave)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "waves": MultiModalFieldConfig.batched("audio"),
            "wave_lengths": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        samples = out_mm_kwargs.get_data().get("wave_lengths", ())

        def repeated(number: int) -> list[int]:
            count = config.num_audio_tokens(int(samples[number]))
            return [config.audio_token_id] * count

        return [
            PromptReplacement(
                modality="audio", target=[config.audio_token_id], replacement=repeated
            )
        ]

    def _postprocess_prompt(self, prompt: list[int]) -> list[int]:
        """Return a prompt with the space of training between an audio and the text after it.

        vLLM joins the parts of a chat's message by line breaks.
        """
        config = self.info.get_hf_config()
        tokenizer = self.info.get_tokenizer()
        audio = config.audio_token_id
        ends = {audio, *tokenizer.get_added_vocab().values()}
        result: list[int] = []
        i = 0
        while i < len(prompt):
            result.append(prompt[i])
            i += 1
            if result[-1] != audio:
                continue
            end = next((j for j in range(i, len(prompt)) if prompt[j] in ends), len(prompt))
            text = tokenizer.decode(prompt[i:end])
            if text.startswith("\n"):
                result += tokenizer.encode(" " + text[1:], add_special_tokens=False)
                i = end
        return result
