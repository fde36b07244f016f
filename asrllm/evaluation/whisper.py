"""The baseline: the audio encoder's own Whisper, with the decoder that it came with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asrllm.data.index import RATE
from asrllm.data.text import language_tag
from asrllm.errors import UserError
from asrllm.evaluation.engine import WINDOW
from asrllm.models.asr_llm.generation import Answer
from asrllm.models.fingerprint import resolve_pretrained
from asrllm.models.hub_files import load_tokenizer
from asrllm.text_files import reading

LIMITS = (
    1,
    31 * RATE,
)  # the test set's own limits are those of the model's encoder; a hop beyond 30 s is cut off
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def find_whisper(path: str | Path | None) -> Path:
    """The directory of a Whisper with its tokenizer. Raises UserError where the encoder is of none."""
    if path is None:
        raise UserError("the audio encoder is of no directory")
    folder = resolve_pretrained(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(path)!r} is no Hugging Face directory")
    if '"whisper"' not in (folder / "config.json").read_text(encoding="utf-8"):
        raise UserError("the audio encoder is no Whisper")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{str(path)!r} has no tokenizer, which Whisper's decoder needs")
    return folder


class WhisperEngine:
    """Whisper's greedy search on 30 s windows; it finds the language where several are known and none is given."""

    limits, padded_to = LIMITS, WINDOW

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, device: torch.device, max_new_tokens: int
    ) -> None:
        """Raises UserError where the directory cannot be loaded, or its weights have no decoder."""
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

        with reading(folder, "the Whisper model"):
            model, report = WhisperForConditionalGeneration.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
        self.tokenizer = load_tokenizer(folder)
        self.model: Any = model.to(device).eval()
        if missing := sorted(name for name in report["missing_keys"] if name != "proj_out.weight"):
            raise UserError(f"{str(folder)!r} lacks {missing[0]!r}")
        self.folder = folder
        self.extract = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
        longest = model.config.max_target_positions // 2
        self.options: dict[str, Any] = {"max_new_tokens": min(max_new_tokens, longest)}

    def of_language(self, lang: str | None) -> WhisperEngine:
        """The same weights, told the language of the speech where they know it."""
        engine, config = copy.copy(self), self.model.generation_config
        if getattr(config, "is_multilingual", False):
            code = language_tag(lang).split("-")[0]
            known = f"<|{code}|>" in getattr(config, "lang_to_id", {})
            engine.options = (
                self.options | {"task": "transcribe"} | ({"language": code} if known else {})
            )
        return engine

    @torch.no_grad()
    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """Whisper is asked nothing: prompts are not read."""
        features = self.extract(
            list(waves), sampling_rate=RATE, return_tensors="pt", return_attention_mask=True
        )
        rows = self.model.generate(
            features.input_features.to(self.model.device, self.model.dtype),
            attention_mask=features.attention_mask.to(self.model.device),
            **self.options,
        )
        return [
            Answer(text=text.strip())
            for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        ]
