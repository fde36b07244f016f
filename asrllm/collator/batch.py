"""Packed batches: the utterances of a micro-batch in one row of true tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from asrllm.audio.reader import Sample
from asrllm.collator.chat import NO_LABEL, ChatRenderer
from asrllm.collator.prompts import choose_prompt
from asrllm.data.index import RATE


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """N utterances, T tokens in one row.

    waves (N, samples) float32 at 16 kHz, zero-padded; wave_lengths (N,); input_ids (1, T); position_ids (1, T), from 0 in each utterance;
    cu_seqlens (N + 1,) int32, where utterances begin and end in the row; target_positions (S,), the positions whose next token is
    supervised; targets (S,), those tokens. keys: of the utterances trained on, fillers apart. bad: utterances that could not be read.
    """

    waves: Tensor
    wave_lengths: Tensor
    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    target_positions: Tensor
    targets: Tensor
    keys: list[str]
    audio_seconds: float
    bad: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> "PackedBatch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def pin_memory(self) -> "PackedBatch":
        return replace(self, **{k: v.pin_memory() for k, v in vars(self).items() if isinstance(v, Tensor)})


class Collator:
    """Samples -> PackedBatch, with a prompt drawn for each.

    num_audio_tokens: samples of a waveform at 16 kHz -> how many tokens the LLM sees of it.
    """

    def __init__(self, renderer: ChatRenderer, prompts: Sequence[str], *, num_audio_tokens: Callable[[int], int], seed: int) -> None:
        self.renderer, self.prompts, self.seed = renderer, tuple(prompts), seed
        self.num_audio_tokens = num_audio_tokens

    def __call__(self, samples: Sequence[Sample], epoch: int) -> PackedBatch:
        rows = [self._encode(sample, epoch) for sample in samples]
        ids = [torch.tensor(ids) for ids, _ in rows]
        lengths = torch.tensor([len(row) for row in ids])
        # a label stands at the position that predicts it: one to the left of its own token
        labels = torch.cat([torch.tensor([*labels[1:], NO_LABEL]) for _, labels in rows])
        positions = torch.nonzero(labels != NO_LABEL).flatten()
        waves = [torch.from_numpy(sample.wave) for sample in samples]
        return PackedBatch(
            waves=torch.nn.utils.rnn.pad_sequence(waves, batch_first=True),
            wave_lengths=torch.tensor([len(wave) for wave in waves]),
            input_ids=torch.cat(ids)[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
            cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            target_positions=positions,
            targets=labels[positions],
            keys=[sample.key for sample in samples if sample.weight],
            audio_seconds=sum(len(s.wave) for s in samples if s.weight) / RATE,
        )

    def _encode(self, sample: Sample, epoch: int) -> tuple[list[int], list[int]]:
        prompts = sample.corpus.prompts or self.prompts
        prompt = choose_prompt(prompts, seed=self.seed, epoch=epoch, key=sample.key)
        audio = self.num_audio_tokens(len(sample.wave))
        ids, labels = self.renderer.encode_training(self.renderer.user_messages(prompt), sample.text, [audio])
        return ids, labels if sample.weight else [NO_LABEL] * len(ids)


def pad_left(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids of different lengths -> ids (N, T) and mask (N, T), padding to the left as decoding wants it."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
