"""Everything around the weights: tokenizer, chat, features' rate, prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from asrllm.audio.reader import read_audio
from asrllm.collator.chat import CHATML, ChatRenderer, Messages
from asrllm.errors import UserError
from asrllm.models.configuration import AsrLlmConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class AsrLlmProcessor:
    """tokenizer: knows the audio token; renderer: the chat of training and decoding; prompts: the first is the default."""

    def __init__(self, tokenizer: Any, config: AsrLlmConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.renderer = ChatRenderer(tokenizer, config.audio_token)

    @property
    def default_prompt(self) -> str:
        return (self.config.prompts or [""])[0]

    @classmethod
    def from_pretrained(cls, path: str | Path, **_: Any) -> "AsrLlmProcessor":
        """From a saved model's directory or a run's exp_dir."""
        cls.check_files(path)
        return cls(AutoTokenizer.from_pretrained(path), AsrLlmConfig.from_pretrained(path))

    @staticmethod
    def check_files(path: str | Path) -> None:
        """Raises UserError where a file of the tokenizer is missing: transformers would do with what is left, without a word."""
        has_vocabulary = any((Path(path) / name).is_file() for name in TOKENIZER_FILES)
        if not has_vocabulary or not (Path(path) / "tokenizer_config.json").is_file():
            lacking = "tokenizer_config.json" if has_vocabulary else f"tokenizer (none of {', '.join(TOKENIZER_FILES)})"
            raise UserError(f"{str(path)!r} has no {lacking}: copy the tokenizer files that were saved with the model")

    def save_pretrained(self, path: str | Path) -> None:
        self.tokenizer.save_pretrained(path)

    def load_waves(self, audio: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Files, or float arrays at 16 kHz -> waves (N, samples), lengths (N,)."""
        waves = [torch.as_tensor(self._wave(item, i)) for i, item in enumerate(audio)]
        return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor([len(w) for w in waves])

    def _wave(self, item: Any, i: int) -> np.ndarray:
        wave = read_audio(item) if isinstance(item, (str, Path)) else np.asarray(item, dtype=np.float32)
        if wave.ndim != 1:
            raise UserError(f"audio {i} has the shape {wave.shape}: give one channel of samples at 16 kHz")
        if not np.isfinite(wave).all():
            raise UserError(f"audio {i} holds NaN or infinite values")
        if self.config.num_audio_tokens(len(wave)) < 1 or not len(wave):
            raise UserError(f"audio {i} is too short: {len(wave)} samples at 16 kHz")
        return wave

    def encode_prompts(self, messages: Sequence[Messages], audio_tokens: Sequence[int]) -> list[list[int]]:
        if len(messages) != len(audio_tokens):
            raise UserError(f"{len(messages)} chats for {len(audio_tokens)} audios: give one chat for each")
        return [self.renderer.encode_prompt(m, [n]) for m, n in zip(messages, audio_tokens, strict=True)]


def load_llm_tokenizer(path: str, *, audio_token: str, chat_template: str | None) -> Any:
    """The LLM's tokenizer with the audio token added; chat_template "chatml" replaces its own template."""
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"model.llm.pretrained_model={path!r} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): copy the tokenizer files there"
        )
    tokenizer = AutoTokenizer.from_pretrained(path)
    if audio_token in tokenizer.get_vocab():
        raise UserError(f"model.audio_token={audio_token!r} is already a token of {path!r}: choose another text")
    tokenizer.add_tokens([audio_token], special_tokens=True)
    if chat_template == "chatml" or not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    return tokenizer
