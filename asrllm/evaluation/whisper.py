"""The baseline: the Whisper model that the audio encoder comes from, with its own decoder."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from asrllm.data.text import language_tag
from asrllm.defaults import RATE, WHISPER_WINDOW
from asrllm.errors import UserError
from asrllm.models.asr_llm.generation import Answer
from asrllm.models.cpu_linear import use_onednn
from asrllm.models.fingerprint import resolve_pretrained
from asrllm.models.hub_files import load_tokenizer
from asrllm.text_files import read_json_object, reading

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration

# samples; the test set's limits are those of the model's encoder, and audio after 30 s is cut off
LIMITS = (1, 31 * RATE)
WHISPER_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


def find_whisper(path: str | Path | None) -> Path:
    """Return the directory of a Whisper model with its tokenizer.

    Args:
        path: path of the audio encoder; None if it was not loaded from a directory.

    Raises:
        UserError: the directory is not that of a Whisper model with its tokenizer.
    """
    if path is None:
        raise UserError("the audio encoder does not come from a pretrained directory")
    folder = resolve_pretrained(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(path)!r} is not a Hugging Face directory")
    config = read_json_object(folder / "config.json", "the encoder's configuration")
    if config.get("model_type") != "whisper":
        raise UserError(f"the audio encoder {str(path)!r} is not a Whisper model")
    if not any((folder / name).is_file() for name in WHISPER_TOKENIZER_FILES):
        raise UserError(f"{str(path)!r} has no tokenizer, which Whisper's decoder needs")
    return folder


def _load_model(folder: Path, dtype: torch.dtype) -> WhisperForConditionalGeneration:
    """Load a Whisper model, or raise UserError if its weights have no decoder."""
    from transformers import WhisperForConditionalGeneration

    with reading(folder, "the Whisper model"):
        model, report = WhisperForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    # the output layer is tied to the embedding, so its weight is in no file
    missing = sorted(name for name in report["missing_keys"] if name != "proj_out.weight")
    if missing:
        raise UserError(f"the weights in {str(folder)!r} lack {missing[0]!r}")
    return model


class WhisperEngine:
    """Runs Whisper's greedy search on windows of 30 s.

    A multilingual model detects the language if none is given.
    """

    limits = LIMITS
    padded_to = WHISPER_WINDOW
    parallel = 1

    def __init__(
        self, folder: Path, *, dtype: torch.dtype, device: torch.device, max_new_tokens: int
    ) -> None:
        """
        Args:
            folder: a directory from find_whisper.
            dtype: dtype of the weights.
            device: where to run.
            max_new_tokens: maximum number of tokens of an answer.

        Raises:
            UserError: the directory cannot be loaded, or its weights have no decoder.
        """
        from transformers import WhisperFeatureExtractor

        # generate() warns in each batch that its own default length and ours are both set
        logging.getLogger("transformers.generation.utils").setLevel(logging.ERROR)
        model = _load_model(folder, dtype)
        use_onednn(model)
        self.tokenizer = load_tokenizer(folder)
        self.model: Any = model.to(device).eval()
        self.folder = folder
        self.extract = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
        longest = model.config.max_target_positions // 2
        self.options: dict[str, Any] = {"max_new_tokens": min(max_new_tokens, longest)}

    def with_language(self, lang: str | None) -> WhisperEngine:
        """Return an engine with the same weights for speech in a language, if they support it."""
        engine = copy.copy(self)
        config = self.model.generation_config
        if getattr(config, "is_multilingual", False):
            engine.options = self.options | {"task": "transcribe"}
            code = language_tag(lang).split("-")[0]
            if f"<|{code}|>" in getattr(config, "lang_to_id", {}):
                engine.options["language"] = code
        return engine

    @torch.no_grad()
    def answer(self, waves: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Answer]:
        """Decode a batch, see Engine.answer. Whisper takes no prompts."""
        features = self.extract(
            list(waves), sampling_rate=RATE, return_tensors="pt", return_attention_mask=True
        )
        rows = self.model.generate(
            features.input_features.to(self.model.device, self.model.dtype),
            attention_mask=features.attention_mask.to(self.model.device),
            **self.options,
        )
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [Answer(text=text.strip()) for text in texts]
