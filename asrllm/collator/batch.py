"""Packed batches: the utterances of a micro-batch in one row of true tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from asrllm.audio.reader import Sample
from asrllm.collator.chat import NO_LABEL, ChatRenderer
from asrllm.collator.hotwords import Hotwords, with_context
from asrllm.data.index import RATE
from asrllm.data.prompts import Prompt, choose_prompt


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """N utterances, T tokens in one row.

    waves (N, samples) float32 at 16 kHz, zero-padded; wave_lengths (N,); input_ids (1, T); position_ids (1, T), from 0 in each utterance;
    cu_seqlens (N + 1,) int32, where utterances begin and end in the row; target_positions (S,), the positions whose next token is
    supervised; targets (S,), those tokens. masks (N, M, 2): of SpecAugment, the first `time_masks` of them in time.
    corpora: the number of each utterance's. keys, prompts: of the utterances trained on, fillers apart. bad: what could not be read.
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
        moved = {
            k: v.to(device, non_blocking=True)
            for k, v in vars(self).items()
            if isinstance(v, Tensor)
        }
        return replace(self, **moved)


class Collator:
    """Samples -> PackedBatch. The prompt is the sample's own, else one of its corpus's, else one of `prompts`, drawn for it.

    num_audio_tokens: samples of a waveform at 16 kHz -> how many tokens the LLM sees of it. time_masks: how many of a sample's masks are.
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
        self.renderer, self.prompts, self.seed = renderer, tuple(prompts), seed
        self.num_audio_tokens, self.hotwords, self.time_masks = (
            num_audio_tokens,
            hotwords,
            time_masks,
        )

    def __call__(self, samples: Sequence[Sample], out: np.ndarray | None = None) -> PackedBatch:
        """out: (floats,) of float32 in which the waveforms are laid out if they fit."""
        prompts = [self.prompt(sample) for sample in samples]
        rows = [
            self._encode(sample, prompt) for sample, prompt in zip(samples, prompts, strict=True)
        ]
        ids = [torch.tensor(ids) for ids, _ in rows]
        lengths = torch.tensor([len(row) for row in ids])
        # a label stands at the position that predicts it: one to the left of its own token
        labels = torch.cat([torch.tensor([*labels[1:], NO_LABEL]) for _, labels in rows])
        positions = torch.nonzero(labels != NO_LABEL).flatten()
        return PackedBatch(
            waves=torch.from_numpy(pad_waves([sample.wave for sample in samples], out)),
            wave_lengths=torch.tensor([len(sample.wave) for sample in samples]),
            input_ids=torch.cat(ids)[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            target_positions=positions,
            targets=labels[positions],
            masks=torch.from_numpy(np.stack([sample.masks for sample in samples])),
            time_masks=self.time_masks,
            keys=[sample.key for sample in samples if sample.weight],
            prompts=[
                prompt for sample, prompt in zip(samples, prompts, strict=True) if sample.weight
            ],
            corpora=tuple(sample.corpus for sample in samples),
            audio_seconds=sum(len(s.wave) for s in samples if s.weight) / RATE,
        )

    def prompt(self, sample: Sample) -> str:
        own, task = sample.fields.get("prompt"), sample.fields.get("task")
        own = own.replace(self.renderer.audio_token, "").strip() if isinstance(own, str) else ""
        prompts = sample.prompts or self.prompts
        prompt = own or choose_prompt(
            prompts,
            seed=self.seed,
            pass_index=sample.pass_index,
            key=sample.key,
            lang=sample.lang,
            task=task,
        )
        if self.hotwords is None:
            return prompt
        words = sample.fields.get("hotwords")
        words = [word for word in words if isinstance(word, str)] if isinstance(words, list) else ()
        return with_context(
            prompt,
            self.hotwords.context(
                sample.text, key=sample.key, pass_index=sample.pass_index, own=words
            ),
        )

    def _encode(self, sample: Sample, prompt: str) -> tuple[list[int], list[int]]:
        audio = self.num_audio_tokens(len(sample.wave))
        ids, labels = self.renderer.encode_training(
            self.renderer.user_messages(prompt), sample.text, [audio]
        )
        return ids, labels if sample.weight else [NO_LABEL] * len(ids)


def pad_waves(waves: Sequence[np.ndarray], out: np.ndarray | None = None) -> np.ndarray:
    """(samples,) each -> (N, longest), zeros behind the shorter ones; in `out` if that is large enough."""
    shape = (len(waves), max(map(len, waves)))
    size = shape[0] * shape[1]
    padded = (
        out[:size] if out is not None and size <= len(out) else np.empty(size, np.float32)
    ).reshape(shape)
    for row, wave in zip(padded, waves, strict=True):
        row[: len(wave)], row[len(wave) :] = wave, 0
    return padded


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids of different lengths -> ids (N, T) and mask (N, T), padding to the left as decoding wants it."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
