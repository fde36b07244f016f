"""Packed batches: the utterances of a micro-batch in one row without padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from asrllm.audio.reader import Sample
from asrllm.collator.chat import IGNORE_INDEX, ChatRenderer
from asrllm.collator.hotwords import Hotwords, with_context
from asrllm.data.prompts import Prompt, choose_prompt
from asrllm.defaults import RATE


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """N utterances whose T tokens are in one row.

    Attributes:
        waves: (N, samples) float32 at 16 kHz, zero-padded.
        wave_lengths: (N,) samples of each waveform.
        input_ids: (1, T) tokens.
        position_ids: (1, T), from 0 in each utterance.
        cu_seqlens: (N + 1,) int32, the boundaries of the utterances in the row.
        target_positions: (S,) positions whose next token is supervised.
        targets: (S,) those next tokens.
        masks: (N, M, 2) SpecAugment masks.
        time_masks: number of masks in time, which come before those in frequency.
        keys: keys of the utterances that are trained on, which excludes fillers.
        prompts: prompts of the same utterances.
        audio_seconds: seconds of audio of the same utterances.
        corpora: the number of each utterance's corpus.
        bad: messages about utterances that could not be read.
    """

    waves: Tensor
    wave_lengths: Tensor
    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    target_positions: Tensor
    targets: Tensor
    masks: Tensor
    time_masks: int
    keys: list[str]
    prompts: list[str]
    audio_seconds: float
    corpora: tuple[int, ...] = ()
    bad: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch with its tensors on a device."""
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return replace(self, **moved)


class Collator:
    """Turn samples into a PackedBatch.

    The prompt is the sample's own, else one of its corpus, else one of the common prompts.
    """

    def __init__(
        self,
        renderer: ChatRenderer,
        prompts: Sequence[Prompt],
        *,
        num_audio_tokens: Callable[[int], int],
        seed: int,
        hotwords: Hotwords | None = None,
        time_masks: int = 0,
    ) -> None:
        """
        Args:
            renderer: renders the chats.
            prompts: the common prompts.
            num_audio_tokens: maps samples of a waveform at 16 kHz to the number of audio tokens.
            seed: seed of the random choices.
            hotwords: lists hotwords in the prompts; None lists none.
            time_masks: how many of a sample's masks are in time.
        """
        self.renderer = renderer
        self.prompts = tuple(prompts)
        self.seed = seed
        self.num_audio_tokens = num_audio_tokens
        self.hotwords = hotwords
        self.time_masks = time_masks

    def __call__(self, samples: Sequence[Sample], out: np.ndarray | None = None) -> PackedBatch:
        """Return the batch of some samples.

        Args:
            samples: the utterances.
            out: (floats,) float32 memory for the waveforms, which is used if they fit.
        """
        prompts = [self.prompt(sample) for sample in samples]
        ids: list[Tensor] = []
        shifted: list[Tensor] = []  # the label of a token is at the position before it
        for sample, prompt in zip(samples, prompts, strict=True):
            row, labels = self._encode(sample, prompt)
            ids.append(torch.tensor(row))
            shifted.append(torch.tensor([*labels[1:], IGNORE_INDEX]))
        lengths = torch.tensor([len(row) for row in ids])
        labels_of_all = torch.cat(shifted)
        positions = torch.nonzero(labels_of_all != IGNORE_INDEX).flatten()
        # becomes int32 below, which the kernels of FlashAttention require
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        trained = [(s, p) for s, p in zip(samples, prompts, strict=True) if not s.is_filler]
        return PackedBatch(
            waves=torch.from_numpy(pad_waves([sample.wave for sample in samples], out)),
            wave_lengths=torch.tensor([len(sample.wave) for sample in samples]),
            input_ids=torch.cat(ids)[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            cu_seqlens=cu_seqlens.int(),
            target_positions=positions,
            targets=labels_of_all[positions],
            masks=torch.from_numpy(np.stack([sample.masks for sample in samples])),
            time_masks=self.time_masks,
            keys=[sample.key for sample, _ in trained],
            prompts=[prompt for _, prompt in trained],
            corpora=tuple(sample.corpus for sample in samples),
            audio_seconds=sum(len(sample.wave) for sample, _ in trained) / RATE,
        )

    def prompt(self, sample: Sample) -> str:
        """Return the prompt of a sample, with hotwords if there are any."""
        own = sample.fields.get("prompt")
        prompt = ""
        if isinstance(own, str):
            # The renderer adds the audio token. One in the prompt would have no audio.
            prompt = own.replace(self.renderer.audio_token, "").strip()
        if not prompt:
            prompt = choose_prompt(
                sample.prompts or self.prompts,
                seed=self.seed,
                pass_index=sample.pass_index,
                key=sample.key,
                lang=sample.lang,
                task=sample.fields.get("task"),
            )
        if self.hotwords is None:
            return prompt
        own_words = own_hotwords(sample)
        context = self.hotwords.context(
            sample.text, key=sample.key, pass_index=sample.pass_index, own=own_words
        )
        return with_context(prompt, context)

    def _encode(self, sample: Sample, prompt: str) -> tuple[list[int], list[int]]:
        """Return tokens and labels. A filler has no label."""
        audio = self.num_audio_tokens(len(sample.wave))
        messages = self.renderer.user_messages(prompt)
        ids, labels = self.renderer.encode_training(messages, sample.text, [audio])
        if sample.is_filler:
            labels = [IGNORE_INDEX] * len(ids)
        return ids, labels


def own_hotwords(sample: Sample) -> list[str]:
    """Return the hotwords in the fields of a sample."""
    words = sample.fields.get("hotwords")
    if not isinstance(words, list):
        return []
    return [word for word in words if isinstance(word, str)]


def pad_waves(waves: Sequence[np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
    """Pad waveforms (samples,) with zeros to (N, longest), in the memory of `out` if they fit."""
    shape = (len(waves), max(map(len, waves)))
    size = shape[0] * shape[1]
    if out is not None and size <= len(out):
        memory = out[:size]
    else:
        memory = np.empty(size, np.float32)
    padded = memory.reshape(shape)
    for row, wave in zip(padded, waves, strict=True):
        row[: len(wave)] = wave
        # `out` may hold the samples of an earlier batch.
        row[len(wave) :] = 0
    return padded


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad rows of tokens on the left, for decoding.

    Returns:
        The tokens (N, T) and their mask (N, T), which is 0 for padding.
    """
    longest = max(map(len, rows))
    ids: list[list[int]] = []
    mask: list[list[int]] = []
    for row in rows:
        padding = [0] * (longest - len(row))
        ids.append(padding + list(row))
        mask.append(padding + [1] * len(row))
    return torch.tensor(ids), torch.tensor(mask)
