"""The processor of a model: its tokenizer, chat template and prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from asrllm.audio.waves import as_list, audio_name, padded, read_wave
from asrllm.collator.chat import CHATML, ChatRenderer, Messages
from asrllm.data.prompts import for_transcripts
from asrllm.defaults import RATE
from asrllm.errors import UserError, reject_unknown
from asrllm.models.asr_llm.checks import read_config
from asrllm.models.asr_llm.configuration import COPY_TOKENIZER, AsrLlmConfig
from asrllm.models.encoders.registry import encoder_class
from asrllm.models.hub_files import load_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
MAX_SHOWN_COUNTS = 20
# Keywords of transformers' Auto classes that do not change what is read from a local directory
# without code. Every call of an Auto class passes _from_auto, _commit_hash, adapter_kwargs,
# trust_remote_code and revision; the others control downloads.
IGNORED_HUB_OPTIONS = (
    "_from_auto",
    "_commit_hash",
    "adapter_kwargs",
    "trust_remote_code",
    "code_revision",
    "revision",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "token",
)
Result = TypeVar("Result")


class AsrLlmProcessor:
    """Tokenizer, chat template and prompts of a model.

    Attributes:
        tokenizer: the LLM's tokenizer with the audio token added.
        renderer: writes the chats of training and of decoding.
        config: the model's configuration.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: AsrLlmConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.renderer = ChatRenderer(tokenizer, config.audio_token)

    @property
    def default_prompt(self) -> str:
        """The prompt of `transcribe`: the first one of training that is not for translations."""
        return [*for_transcripts(self.config.prompts or [], self.config.prompt_tasks), ""][0]

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        **more: Any,
    ) -> "AsrLlmProcessor":
        """Return the processor in a saved model's directory or in a run's exp_dir.

        Args:
            path: the directory.
            more: keywords that transformers' AutoProcessor passes (see IGNORED_HUB_OPTIONS).
        """
        unknown = {k: v for k, v in more.items() if k not in IGNORED_HUB_OPTIONS}
        reject_unknown("AsrLlmProcessor.from_pretrained()", unknown, ())
        config = read_config(path)
        cls.check_files(path)
        return cls(load_tokenizer(path, config=config), config)

    @staticmethod
    def check_files(path: str | Path) -> None:
        """Raise UserError if a file of the tokenizer is missing.

        transformers would silently build a different tokenizer from the files that remain.
        """
        folder = Path(path)
        missing = ""
        if not _has_tokenizer(folder):
            missing = f"tokenizer (none of {', '.join(TOKENIZER_FILES)})"
        elif not (folder / "tokenizer_config.json").exists():
            missing = "tokenizer_config.json"
        if missing:
            raise UserError(f"{str(path)!r} has no {missing}. {COPY_TOKENIZER}")

    def save_pretrained(self, path: str | Path) -> None:
        """Write the tokenizer's files and the chat template to a directory."""
        self.tokenizer.save_pretrained(path)

    def load_waves(self, audio: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Read a batch of audios.

        Args:
            audio: files, float arrays or tensors at 16 kHz, or pairs (array, rate in Hz).

        Returns:
            Waveforms (N, samples) and their lengths in samples (N,).

        Raises:
            UserError: an audio cannot be read, or is too short or too long. The message has its
                position in the list and, for a file, its path.
        """
        return padded(self.read_waves(audio))

    def read_waves(self, audio: Sequence[Any]) -> list[np.ndarray]:
        """Return the samples of each audio. Arguments and errors are those of `load_waves`."""
        return [self._wave(item, i) for i, item in enumerate(as_list(audio))]

    def _wave(self, item: Any, i: int) -> np.ndarray:
        name = audio_name(item, i)
        wave = read_wave(item, i)
        low, high = self.config.sample_limits()
        if len(wave) < low:
            raise UserError(
                f"{name} is too short: it has {len(wave)} samples at 16 kHz, but the model needs "
                f"{low} ({low / RATE:.3f} s). Give a longer recording."
            )
        if len(wave) > high:
            raise UserError(
                f"{name} is too long: it lasts {len(wave) / RATE:.2f} s, but the model accepts at "
                f"most {high / RATE:.2f} s. Cut it into shorter pieces."
            )
        return wave

    def check_features(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Check features that a caller has computed, and return them unchanged.

        Args:
            x: features (N, T, F).
            x_lens: number of frames of each utterance (N,).

        Raises:
            UserError: a shape or dtype is wrong, a length is beyond x or beyond the limits of the
                model, or a feature is not finite.
        """
        self._check_feature_shapes(x, x_lens)
        self._check_feature_lengths(x, x_lens)
        names = [f"audio {i}" for i in range(len(x))]
        check_finite_features(x, names, "contain NaN or infinite values. Compute them again.")
        return x, x_lens

    def _check_feature_lengths(self, x: Tensor, x_lens: Tensor) -> None:
        _, hop = feature_shape(self.config)
        low, high = (max(1, round(n / hop)) for n in self.config.sample_limits())
        for i, length in enumerate(x_lens.tolist()):
            if not 1 <= length <= x.shape[1]:
                raise UserError(
                    f"x_lens[{i}]={length} is not between 1 and {x.shape[1]}, the number of frames "
                    "in x. Correct it."
                )
            if not low <= length <= high:
                raise UserError(
                    f"x_lens[{i}]={length} is not between {low} and {high}, the numbers of frames "
                    "that the model accepts. Use a longer or shorter recording."
                )

    def _check_feature_shapes(self, x: Tensor, x_lens: Tensor) -> None:
        width, _ = feature_shape(self.config)
        if x.dim() != 3 or not x.is_floating_point() or x.shape[2] != width:
            raise UserError(
                f"the features have the shape {tuple(x.shape)} and the dtype {x.dtype}. Give a "
                f"floating-point tensor of the shape (N, T, {width})."
            )
        is_integer = not (x_lens.is_floating_point() or x_lens.dtype == torch.bool)
        if x_lens.shape != x.shape[:1] or not len(x) or not is_integer:
            raise UserError(
                f"x_lens has the shape {tuple(x_lens.shape)} and the dtype {x_lens.dtype}. Give "
                f"one integer for each of the {len(x)} utterances."
            )

    def count_audios(self, messages: Sequence[Messages], audios: int) -> list[int]:
        """Return how many of the audios each chat contains, in order.

        Args:
            messages: chats.
            audios: number of audios.

        Raises:
            UserError: `messages` is not a list of chats, a chat contains no audio token, or the
                number of audio tokens is not that of the audios.
        """
        _check_chats(messages)
        token = self.renderer.audio_token
        counts = [_in_chat(i, self.renderer.count_audios, chat) for i, chat in enumerate(messages)]
        if 0 in counts:
            raise UserError(
                f"chat {counts.index(0)} contains no audio token. Write {token} where its audio "
                "belongs."
            )
        if sum(counts) != audios or not counts:
            raise UserError(
                f"{len(counts)} chats contain {_list_counts(counts)} audio tokens, but there are "
                f"{audios} audios. Write {token} once for each audio."
            )
        return counts

    def encode_prompts(
        self, messages: Sequence[Messages], counts: Sequence[int], audio_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Return the token ids of each chat.

        Args:
            messages: chats.
            counts: number of audios in each chat, from `count_audios`.
            audio_tokens: number of tokens of each audio.
        """
        lengths = iter(audio_tokens)
        prompts: list[list[int]] = []
        for i, (chat, count) in enumerate(zip(messages, counts, strict=True)):
            own_lengths = [next(lengths) for _ in range(count)]
            prompts.append(_in_chat(i, self.renderer.encode_prompt, chat, own_lengths))
        return prompts


def _list_counts(counts: Sequence[int]) -> str:
    shown = ", ".join(map(str, counts[:MAX_SHOWN_COUNTS]))
    if len(counts) > MAX_SHOWN_COUNTS:
        shown += ", ..."
    return shown or "0"


def _check_chats(messages: Sequence[Messages]) -> None:
    """Raise UserError unless `messages` is a list of chats, and each chat a list of messages."""
    is_sequence = isinstance(messages, (list, tuple))
    is_one_chat = is_sequence and len(messages) > 0 and isinstance(messages[0], dict)
    if isinstance(messages, (str, dict)) or is_one_chat:
        raise UserError("messages is one chat. Give a list of chats: [messages].")
    if not is_sequence:
        raise UserError(f"messages is a {type(messages).__name__}. Give a list of chats.")
    for i, chat in enumerate(messages):
        if not isinstance(chat, (list, tuple)):
            raise UserError(
                f"chat {i} is a {type(chat).__name__}. Give a list of messages: "
                "[{'role': 'user', 'content': ...}]."
            )


def _in_chat(
    i: int,
    do: Callable[..., Result],
    *arguments: Any,
) -> Result:
    """Call a function, and prefix its UserError with the number of the chat."""
    try:
        return do(*arguments)
    except UserError as error:
        raise UserError(f"chat {i}: {error}") from error


def feature_shape(config: AsrLlmConfig) -> tuple[int, int]:
    """Return the width of a frame of the features, and how many samples there are for each."""
    fields = config.audio_encoder or {}
    return encoder_class(fields["model_type"]).feature_shape(fields)


def check_finite_features(features: Tensor, names: Sequence[str], problem: str) -> None:
    """Raise UserError for the first audio whose features are not finite.

    Args:
        features: (N, T, F).
        names: what to call the N audios.
        problem: the end of the message.
    """
    finite = torch.isfinite(features).all(2).all(1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise UserError(f"the features of {names[first]} {problem}")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def load_llm_tokenizer(
    path: str, *, audio_token: str, chat_template: str | None
) -> PreTrainedTokenizerBase:
    """Return an LLM's tokenizer with the audio token added.

    Args:
        path: the LLM's directory.
        audio_token: text of the audio token.
        chat_template: "chatml" replaces the tokenizer's own chat template.

    Raises:
        UserError: there is no tokenizer, it already has the audio token, or all ids are in use.
    """
    if Path(path).is_dir() and not _has_tokenizer(Path(path)):
        raise UserError(
            f"model.llm.pretrained_model={path!r} has no tokenizer (none of "
            f"{', '.join(TOKENIZER_FILES)}). Copy the tokenizer files there."
        )
    tokenizer = load_tokenizer(path)
    if audio_token in tokenizer.get_vocab():
        raise UserError(
            f"model.audio_token={audio_token!r} is already a token of {path!r}. Choose another "
            "text."
        )
    tokenizer.add_tokens([audio_token], special_tokens=True)
    _check_own_id(tokenizer, audio_token, path)
    if chat_template == "chatml" or not tokenizer.chat_template:
        tokenizer.chat_template = CHATML
    return tokenizer


def _check_own_id(tokenizer: PreTrainedTokenizerBase, audio_token: str, path: str) -> None:
    """Raise UserError if the audio token has the id of another token.

    The new id is the number of tokens, which is in use if smaller ids are not.
    """
    own = tokenizer.convert_tokens_to_ids(audio_token)
    vocabulary = tokenizer.get_vocab()
    others = [word for word, i in vocabulary.items() if i == own and word != audio_token]
    if others:
        used = set(vocabulary.values())
        unused = next(i for i in range(own) if i not in used)
        raise UserError(
            f"the tokenizer of {path!r} has no token with the id {unused}, so the audio token "
            f"would get the id {own} of {others[0]!r}. Download the tokenizer again, or choose "
            "another LLM."
        )
