"""The processor of a saved model as transformers loads it: audio and chats to model inputs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin, SequenceFeatureExtractor
from transformers.audio_utils import load_audio

from asrllm.audio.waves import as_list, padded, read_array
from asrllm.collator.batch import pad_left
from asrllm.collator.chat import ChatRenderer, Messages, plain_messages
from asrllm.collator.hotwords import filled, with_context
from asrllm.data.text import language_tag
from asrllm.defaults import HOTWORDS_TEMPLATE, RATE
from asrllm.models.encoders.registry import encoder_class
from asrllm.models.projectors import count_audio_tokens


class AsrLlmFeatureExtractor(SequenceFeatureExtractor):
    """Computes the features of the audio encoder on the CPU, in float32."""

    model_input_names: ClassVar[list[str]] = ["input_features", "feature_lengths"]

    def __init__(self, audio_encoder: dict[str, Any] | None = None, **more: Any) -> None:
        """
        Args:
            audio_encoder: the fields of AsrLlmConfig.audio_encoder, and pad_to_30s.
            more: arguments of SequenceFeatureExtractor.
        """
        self.audio_encoder = audio_encoder or {}
        sizes = {"feature_size": 80, "sampling_rate": RATE, "padding_value": 0.0}
        super().__init__(**sizes | more)

    def __call__(
        self,
        audio: Any,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        **ignored: Any,
    ) -> BatchFeature:
        """Return the features of one audio or of several.

        Args:
            audio: float samples (samples,), or a list of them.
            sampling_rate: sampling rate of the audio in Hz; None means 16000.
            return_tensors: "pt" for tensors, "np" for arrays.
            ignored: options of other feature extractors, for example padding and truncation: audio
                is never truncated, and padding does not change a result.

        Returns:
            input_features (N, T, F), feature_lengths (N,) in frames, and num_samples (N,).
        """
        if sampling_rate not in (None, RATE):
            raise ValueError(f"the audio has {sampling_rate} Hz. Resample it to {RATE} Hz.")
        is_one = isinstance(audio, (np.ndarray, torch.Tensor)) and audio.ndim == 1
        items = [audio] if is_one else as_list(list(audio))
        waves = [read_array(item, f"audio {i}") for i, item in enumerate(items)]
        batch, samples = padded(waves)
        kind = encoder_class(self.audio_encoder["model_type"])
        with torch.no_grad():
            features, lengths = kind.make_features(self.audio_encoder)(batch, samples)
        values = {
            "input_features": features,
            "feature_lengths": lengths,
            "num_samples": samples,
        }
        if return_tensors == "np":
            values = {name: value.numpy() for name, value in values.items()}
        return BatchFeature(values)


class AsrLlmHubProcessor(ProcessorMixin):
    """Makes the inputs of AsrLlmForConditionalGeneration, and turns its tokens into texts."""

    def __init__(
        self,
        feature_extractor: AsrLlmFeatureExtractor,
        tokenizer: Any,
        chat_template: str | None = None,
        audio_token: str = "<|AUDIO|>",
        frames_per_token: int = 8,
        drop_ragged_frames: bool = False,
        tag_audio_boundary: bool = False,
        prompts: list[str] | None = None,
        prompt_languages: dict[str, str] | None = None,
        hotwords_template: str | None = None,
    ) -> None:
        """Make a processor.

        No argument is keyword-only, because transformers passes those of processor_config.json only
        if they are not.

        Args:
            feature_extractor: computes the features.
            tokenizer: the LLM's tokenizer with the audio token added.
            chat_template: chat template of the tokenizer.
            audio_token: text that marks the place of an audio in a chat.
            frames_per_token: AsrLlmConfig.audio_encoder_projector_ds_rate.
            drop_ragged_frames: as in AsrLlmConfig.
            tag_audio_boundary: as in AsrLlmConfig.
            prompts: as in AsrLlmConfig.
            prompt_languages: as in AsrLlmConfig.
            hotwords_template: as in AsrLlmConfig.
        """
        self.audio_token = audio_token
        self.frames_per_token = frames_per_token
        self.drop_ragged_frames = drop_ragged_frames
        self.tag_audio_boundary = tag_audio_boundary
        self.prompts = prompts
        self.prompt_languages = prompt_languages
        self.hotwords_template = hotwords_template
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        text: Any = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        **ignored: Any,
    ) -> BatchFeature:
        """Return the inputs of the model for prompts with audio.

        Args:
            text: a user's message, or several. Each contains the audio token once per audio.
                Without text, the first prompt of training is used for each audio. An audio in
                place of the text is the audio, as callers of WhisperProcessor pass it.
            audio: float samples (samples,), or a list of them, in the order of the audio tokens.
            sampling_rate: sampling rate of the audio in Hz; None means 16000.
            return_tensors: only "pt".
            ignored: options of other processors, for example padding.
        """
        first = text[0] if isinstance(text, (list, tuple)) and text else text
        if audio is None and not isinstance(first, str):
            audio = text
            text = None
        if text is None:
            return self.apply_transcription_request(audio, sampling_rate=sampling_rate)
        texts = [text] if isinstance(text, str) else list(text)
        chats = [[{"role": "user", "content": content}] for content in texts]
        return self.encode_chats(chats, self.feature_extractor(audio, sampling_rate=sampling_rate))

    def apply_chat_template(
        self,
        conversation: Messages | Sequence[Messages],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = True,
        sampling_rate: int | None = None,
        **ignored: Any,
    ) -> Any:
        """Return chats as text, or as inputs of the model with the audio that they contain.

        Args:
            conversation: a chat or several. A content is a text, or a list of parts: {"type":
                "text", "text": TEXT} and {"type": "audio", "audio": AUDIO}. An audio is float
                samples (samples,), a path or a URL; its key may also be "path" or "url".
            chat_template: only None, which is the one of training.
            tokenize: return token ids instead of texts.
            return_dict: with tokenize: return all inputs of the model.
            add_generation_prompt: only True with tokenize: begin the answer.
            sampling_rate: sampling rate of the audio in Hz; None means 16000.
            ignored: options of other processors, for example return_tensors.

        Raises:
            ValueError: the model was not trained for the options, or a part has no audio.
            UserError: the conversation is not a chat.
        """
        if chat_template is not None or (tokenize and not add_generation_prompt):
            raise ValueError(
                "the chat template of training is used, with the beginning of the answer. "
                "Leave out chat_template and add_generation_prompt."
            )
        is_one = bool(conversation) and isinstance(conversation[0], Mapping)
        chats: list[Any] = [conversation] if is_one else list(conversation)
        if not tokenize:
            texts: list[str] = []
            for chat in chats:
                messages = plain_messages(chat, self.audio_token)
                texts.append(
                    self.tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=add_generation_prompt
                    )
                )
            return texts[0] if is_one else texts
        for chat in chats:
            plain_messages(chat, self.audio_token)  # raises an error if it is not a chat
        audios = [audio for chat in chats for audio in audios_of(chat)]
        features: dict[str, Any] = {"num_samples": torch.zeros(0, dtype=torch.long)}
        if audios:
            features = self.feature_extractor(audios, sampling_rate=sampling_rate)
        inputs = self.encode_chats(chats, features)
        return inputs if return_dict else inputs["input_ids"]

    def encode_chats(self, chats: Sequence[Messages], features: dict[str, Any]) -> BatchFeature:
        """Return the inputs of the model for chats.

        Args:
            chats: lists of messages.
            features: output of the feature extractor, in the order of the audio tokens.

        Returns:
            input_ids and attention_mask (B, L), padded on the left, input_features (N, T, F),
            feature_lengths (N,) and audio_samples, the samples of each chat (B,).
        """
        features = dict(features)
        samples = features.pop("num_samples")
        counts = iter(self.num_audio_tokens(samples).tolist())
        lengths_in_samples = iter(samples.tolist())
        renderer = ChatRenderer(self.tokenizer, self.audio_token)
        prompts: list[list[int]] = []
        audio_samples: list[int] = []
        for chat in chats:
            audios = renderer.count_audios(chat)
            prompts.append(renderer.encode_prompt(chat, [next(counts) for _ in range(audios)]))
            audio_samples.append(sum(next(lengths_in_samples) for _ in range(audios)))
        input_ids, mask = pad_left(prompts)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "audio_samples": torch.tensor(audio_samples),
        }
        return BatchFeature(inputs | features)

    def num_audio_tokens(self, samples: Any) -> Any:
        """Return how many tokens of the LLM a waveform takes, in the type of `samples`."""
        fields = self.feature_extractor.audio_encoder
        return count_audio_tokens(
            encoder_class(fields["model_type"]).frame_lengths(samples, fields),
            self.frames_per_token,
            drop_ragged=self.drop_ragged_frames,
            tag_boundary=self.tag_audio_boundary,
        )

    def apply_transcription_request(
        self,
        audio: Any,
        language: str | None = None,
        prompt: str | None = None,
        hotwords: Sequence[str] | None = None,
        sampling_rate: int | None = None,
        **ignored: Any,
    ) -> BatchFeature:
        """Return the inputs of the model to transcribe audio.

        Args:
            audio: float samples (samples,), or a list of them.
            language: language of the speech, which chooses the prompt of training for it.
            prompt: the prompt; by default the one for the language, else the first one.
            hotwords: words that may occur in the speech.
            sampling_rate: sampling rate of the audio in Hz; None means 16000.
            ignored: options of other processors, for example return_tensors.
        """
        features = self.feature_extractor(audio, sampling_rate=sampling_rate)
        return self.transcription_inputs(features, language, prompt, hotwords)

    def transcription_inputs(
        self,
        features: dict[str, Any],
        language: str | None = None,
        prompt: str | None = None,
        hotwords: Sequence[str] | None = None,
    ) -> BatchFeature:
        """Return the inputs of the model to transcribe audio with these features.

        The other arguments are those of `apply_transcription_request`.
        """
        if prompt is None:
            prompt = self._prompt_of(language)
        context = filled(self.hotwords_template or HOTWORDS_TEMPLATE, list(hotwords or []))
        content = f"{self.audio_token} {with_context(prompt, context)}".strip()
        chats = [[{"role": "user", "content": content}]] * len(features["num_samples"])
        return self.encode_chats(chats, features)

    def _prompt_of(self, language: str | None) -> str:
        """Return the first prompt for a language alone, else the first prompt."""
        if language is not None:
            for text, own in (self.prompt_languages or {}).items():
                if f"{language_tag(language)}-".startswith(f"{language_tag(own)}-"):
                    return text
        return (self.prompts or [""])[0]

    def batch_decode(self, *arguments: Any, **options: Any) -> list[str]:
        """Return the texts of token ids (B, L), by the tokenizer."""
        texts = self.tokenizer.batch_decode(*arguments, **options)
        return [text.strip() for text in texts]

    def decode(self, *arguments: Any, **options: Any) -> str:
        """Return the text of token ids (L,), by the tokenizer."""
        return self.tokenizer.decode(*arguments, **options).strip()


def audios_of(chat: Messages) -> list[Any]:
    """Return the audios in the parts of a chat, read if they are files or URLs.

    Raises:
        ValueError: a part has no audio.
    """
    audios: list[Any] = []
    for message in chat:
        content = message["content"]
        for part in content if isinstance(content, list) else []:
            if part["type"] != "audio":
                continue
            given = (part.get(key) for key in ("audio", "path", "url"))
            audio = next((value for value in given if value is not None), None)
            if audio is None:
                raise ValueError("a part of type 'audio' has no 'audio', 'path' or 'url'. Add it.")
            is_file = isinstance(audio, (str, Path))
            audios.append(load_audio(str(audio), RATE) if is_file else audio)
    return audios
