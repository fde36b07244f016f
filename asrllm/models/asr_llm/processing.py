"""Everything around the weights: tokenizer, chat, features' rate, prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from asrllm.audio.waves import as_list, audio_name, padded, read_wave
from asrllm.collator.chat import CHATML, ChatRenderer, Messages
from asrllm.data.index import RATE
from asrllm.errors import UserError, refuse_unknown
from asrllm.models.asr_llm.checks import read_config
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.hub_files import load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HOP = 160  # samples a feature frame, for Whisper and for Kaldi features
SHOWN = 20  # chats of a message
# keywords of transformers' Auto classes that change nothing in what is read from a local directory without code of its own: _from_auto,
# revision, trust_remote_code, adapter_kwargs and _commit_hash come with every call of them, the others are about downloading
IGNORED_HUB_OPTIONS = ("_from_auto", "_commit_hash", "adapter_kwargs", "trust_remote_code", "code_revision", "revision", "cache_dir",
                  "force_download", "local_files_only", "proxies", "token")  # fmt: skip
Result = TypeVar("Result")


class AsrLlmProcessor:
    """tokenizer: knows the audio token; renderer: the chat of training and decoding; prompts: the first is the default."""

    def __init__(self, tokenizer: Any, config: AsrLlmConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.renderer = ChatRenderer(tokenizer, config.audio_token)

    @property
    def default_prompt(self) -> str:
        return (self.config.prompts or [""])[0]

    @classmethod
    def from_pretrained(cls, path: str | Path, **more: Any) -> "AsrLlmProcessor":
        """From a saved model's directory or a run's exp_dir. more: of transformers' AutoProcessor, see IGNORED_HUB_OPTIONS."""
        refuse_unknown(
            "AsrLlmProcessor.from_pretrained()",
            {k: v for k, v in more.items() if k not in IGNORED_HUB_OPTIONS},
            (),
        )
        config = read_config(path)
        cls.check_files(path)
        return cls(load_tokenizer(path, config=config), config)

    @staticmethod
    def check_files(path: str | Path) -> None:
        """Raises UserError where a file of the tokenizer is missing: transformers would do with what is left, without a word."""
        has_vocabulary = any((Path(path) / name).is_file() for name in TOKENIZER_FILES)
        if not has_vocabulary or not (Path(path) / "tokenizer_config.json").is_file():
            lacking = (
                "tokenizer_config.json"
                if has_vocabulary
                else f"tokenizer (none of {', '.join(TOKENIZER_FILES)})"
            )
            raise UserError(
                f"{str(path)!r} has no {lacking}: copy the tokenizer files that were saved with the model"
            )

    def save_pretrained(self, path: str | Path) -> None:
        self.tokenizer.save_pretrained(path)

    def load_waves(self, audio: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Files, float arrays or tensors at 16 kHz, or pairs (array, rate) -> waves (N, samples), lengths (N,).

        Raises UserError that names the audio by its place in the list, and a file by its name.
        """
        items = as_list(audio)
        return padded(items, [self._wave(item, i) for i, item in enumerate(items)])

    def _wave(self, item: Any, i: int) -> np.ndarray:
        name = audio_name(item, i)
        wave = read_wave(item, i)
        low, high = self.config.sample_limits()
        if len(wave) < low:
            raise UserError(
                f"{name} is too short: {len(wave)} samples at 16 kHz, the model takes {low} ({low / RATE:.3f} s) at least"
            )
        if len(wave) > high:
            raise UserError(
                f"{name} is too long: {len(wave) / RATE:.2f} s, the model takes {high / RATE:.2f} s at most: cut it"
            )
        return wave

    def check_features(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """(x, x_lens) as they are given. Raises UserError for other shapes, lengths beyond x, and NaN."""
        width = feature_width(self.config)
        if x.dim() != 3 or not x.is_floating_point() or x.shape[2] != width:
            raise UserError(
                f"the features have the shape {tuple(x.shape)} and are {x.dtype}: give (N, T, {width}) of floats"
            )
        whole = not (x_lens.is_floating_point() or x_lens.dtype == torch.bool)
        if x_lens.shape != x.shape[:1] or not len(x) or not whole:
            raise UserError(
                f"x_lens has the shape {tuple(x_lens.shape)} and is {x_lens.dtype}: give whole numbers, one for each of {len(x)}"
            )
        low, high = (max(1, round(n / HOP)) for n in self.config.sample_limits())
        for i, length in enumerate(x_lens.tolist()):
            if not 1 <= length <= x.shape[1]:
                raise UserError(
                    f"x_lens[{i}]={length} is not from 1 to {x.shape[1]}, the frames that x has"
                )
            if not low <= length <= high:
                raise UserError(
                    f"x_lens[{i}]={length} is not from {low} to {high}, the frames that the model takes"
                )
        check_finite(x, [f"audio {i}" for i in range(len(x))], "hold NaN or infinite values")
        return x, x_lens

    def share_out(self, messages: Sequence[Messages], audios: int) -> list[int]:
        """How many of the audios each chat takes, in order. Raises UserError where a chat takes none or all take another number."""
        if isinstance(messages, (str, dict)) or (
            isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], dict)
        ):
            raise UserError("messages is one chat: give a list of chats, [messages]")
        if not isinstance(messages, (list, tuple)):
            raise UserError(f"messages is a {type(messages).__name__}: give a list of chats")
        for i, chat in enumerate(messages):
            if not isinstance(chat, (list, tuple)):
                raise UserError(
                    f"chat {i} is a {type(chat).__name__}: give a list of messages, [{{'role': 'user', 'content': ...}}]"
                )
        token = self.renderer.audio_token
        counts = [_of_chat(i, self.renderer.count_audios, chat) for i, chat in enumerate(messages)]
        if 0 in counts:
            raise UserError(
                f"chat {counts.index(0)} has no audio token: write {token} where its audio is to be heard"
            )
        if sum(counts) != audios or not counts:
            shown = ", ".join(map(str, counts[:SHOWN])) + (", ..." if len(counts) > SHOWN else "")
            raise UserError(
                f"{len(counts)} chats for {audios} audios: the chats hold {shown or 0} audio tokens; write {token} once for each audio"
            )
        return counts

    def encode_prompts(
        self, messages: Sequence[Messages], counts: Sequence[int], audio_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Ids of each chat; counts: of share_out; audio_tokens: how many tokens each audio has."""
        lengths = iter(audio_tokens)
        return [
            _of_chat(i, self.renderer.encode_prompt, chat, [next(lengths) for _ in range(count)])
            for i, (chat, count) in enumerate(zip(messages, counts, strict=True))
        ]


def _of_chat(i: int, do: Callable[..., Result], *arguments: Any) -> Result:
    try:
        return do(*arguments)
    except UserError as error:
        raise UserError(f"chat {i}: {error}") from error


def feature_width(config: AsrLlmConfig) -> int:
    """The features a frame has; an encoder whose fields do not say has 80."""
    fields = config.audio_encoder or {}
    return fields.get("num_mel_bins") or fields.get("feature_dim") or 80


def check_finite(features: Tensor, names: Sequence[str], problem: str) -> None:
    """Raises UserError naming the first of the audios whose features (N, T, F) are not finite."""
    if not (finite := torch.isfinite(features).all(2).all(1)).all():
        raise UserError(f"the features of {names[int((~finite).nonzero()[0])]} {problem}")


def load_llm_tokenizer(path: str, *, audio_token: str, chat_template: str | None) -> Any:
    """The LLM's tokenizer with the audio token added; chat_template "chatml" replaces its own template."""
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"model.llm.pretrained_model={path!r} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}): copy the tokenizer files there"
        )
    tokenizer = load_tokenizer(path)
    if audio_token in tokenizer.get_vocab():
        raise UserError(
            f"model.audio_token={audio_token!r} is already a token of {path!r}: choose another text"
        )
    tokenizer.add_tokens([audio_token], special_tokens=True)
    if chat_template == "chatml" or not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    return tokenizer
