"""Tiny models and made-up speech: what tests and first experiments need, without a download."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def tiny_whisper(folder: Path, *, seed: int = 0, num_mel_bins: int = 80) -> Path:
    """A Hugging Face Whisper directory of random weights: 2 layers of width 16."""
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(seed)
    size = {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "vocab_size": 64,
        "num_mel_bins": num_mel_bins,
    }
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    WhisperModel(WhisperConfig(**size, **heads, **tokens)).save_pretrained(folder)
    return folder


TINY_ZIPFORMER = {
    "encoder_dim": [16, 24], "encoder_unmasked_dim": [8, 16], "num_encoder_layers": [1, 2], "feedforward_dim": [24, 32],
    "downsampling_factor": [1, 2], "cnn_module_kernel": [7, 5], "num_heads": [2, 4], "query_head_dim": [8], "value_head_dim": [4],
    "pos_dim": 16,
}  # fmt: skip


def tiny_zipformer(folder: Path, *, seed: int = 0) -> Path:
    """A Zipformer directory, as Auden's, of random weights: 3 layers in 2 stacks."""
    from safetensors.torch import save_file

    from asrllm.models.encoders.zipformer.modeling import ZipformerConfig, ZipformerEncoder

    torch.manual_seed(seed)
    encoder = ZipformerEncoder(ZipformerConfig(**TINY_ZIPFORMER))  # type: ignore[arg-type]
    folder.mkdir(parents=True)
    save_file(encoder.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "zipformer"} | TINY_ZIPFORMER))
    return folder


def tiny_llm(folder: Path, *, seed: int = 0, tied: bool = True) -> Path:
    """A Hugging Face Qwen2 directory of random weights, 2 layers of width 32, with a tokenizer of bytes and words."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = Qwen2Config(
        **size,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # large enough for what it hears to change what it says
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer():  # type: ignore[no-untyped-def]  # a transformers tokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def tone(word: str, seconds: float, rate: int = 16000) -> np.ndarray:
    """A word's tone: its number decides the pitch. (samples,) float32"""
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * 200 * 1.25 ** WORDS.index(word) * t)).astype(np.float32)


VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
)  # formants in Hz


def vowels(seconds: float, *, seed: int = 0, rate: int = 16000) -> np.ndarray:
    """Vowels one after the other, which voice activity detection takes for speech. (samples,) float32"""
    rng = np.random.default_rng(seed)
    harmonics = np.arange(1, 36)[:, None]
    sounds: list[np.ndarray] = []
    while sum(map(len, sounds)) < seconds * rate:
        pitch = rng.uniform(100, 140) * np.linspace(
            1, rng.uniform(0.85, 1.1), round(rng.uniform(0.12, 0.25) * rate)
        )
        gains = sum(
            1 / (1 + ((harmonics * pitch.mean() - f) / width) ** 2)
            for f, width in zip(rng.choice(VOWELS), (80, 100, 140), strict=True)
        )
        wave = (
            gains / harmonics**0.5 * np.sin(2 * np.pi * harmonics * np.cumsum(pitch) / rate)
        ).sum(0)
        sounds.append(wave / np.abs(wave).max() * np.hanning(len(wave)) ** 0.3)
    return (0.3 * np.concatenate(sounds)[: round(seconds * rate)]).astype(np.float32)


def tone_sentences(count: int, *, seed: int = 0, rate: int = 16000) -> list[tuple[str, np.ndarray]]:
    """(words, waveform) of sentences of one to four tones, 0.1 to 0.4 s each."""
    rng = np.random.default_rng(seed)
    sentences = []
    for _ in range(count):
        words = [str(word) for word in rng.choice(WORDS, rng.integers(1, 5))]
        sentences.append(
            (
                " ".join(words),
                np.concatenate([tone(word, rng.uniform(0.1, 0.4), rate) for word in words]),
            )
        )
    return sentences


def kaldi_directory(
    folder: Path, sentences: Sequence[tuple[str, np.ndarray]], *, rate: int = 16000
) -> Path:
    """wav.scp, text, utt2spk and the wavs."""
    (folder / "wav").mkdir(parents=True)
    tables: dict[str, list[str]] = {"wav.scp": [], "text": [], "utt2spk": []}
    for i, (words, wave) in enumerate(sentences):
        key = f"utt{i:04d}"
        soundfile.write(folder / "wav" / f"{key}.wav", wave, rate)
        for name, value in (
            ("wav.scp", f"wav/{key}.wav"),
            ("text", words),
            ("utt2spk", f"spk{i % 3}"),
        ):
            tables[name].append(f"{key} {value}\n")
    for name, lines in tables.items():
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


def data_config(path: Path, entries: Sequence[dict[str, object]]) -> Path:
    """A data config; JSON is YAML."""
    path.write_text(json.dumps(list(entries)))
    return path
