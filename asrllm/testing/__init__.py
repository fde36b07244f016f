"""Tiny models and synthetic speech for tests and first experiments, without a download."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# formants of synthetic vowels, in Hz
FORMANTS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
)
FORMANT_WIDTHS = (80, 100, 140)  # Hz
TINY_ZIPFORMER = {
    "encoder_dim": [16, 24],
    "encoder_unmasked_dim": [8, 16],
    "num_encoder_layers": [1, 2],
    "feedforward_dim": [24, 32],
    "downsampling_factor": [1, 2],
    "cnn_module_kernel": [7, 5],
    "num_heads": [2, 4],
    "query_head_dim": [8],
    "value_head_dim": [4],
    "pos_dim": 16,
}


def tiny_whisper(folder: Path, *, seed: int = 0, num_mel_bins: int = 80, ffn_dim: int = 32) -> Path:
    """Write a Hugging Face Whisper directory with random weights: 2 encoder layers of width 16.

    Args:
        folder: the directory to write.
        seed: seed of the weights.
        num_mel_bins: features per frame.
        ffn_dim: width of the encoder's feed-forward layers; 64 in Whisper's proportions.

    Returns:
        The directory.
    """
    from transformers import WhisperConfig, WhisperModel

    torch.manual_seed(seed)
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        vocab_size=64,
        num_mel_bins=num_mel_bins,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=ffn_dim,
        decoder_ffn_dim=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    WhisperModel(config).save_pretrained(folder)
    return folder


def tiny_zipformer(folder: Path, *, seed: int = 0) -> Path:
    """Write a Zipformer directory in Auden's format with random weights: 3 layers in 2 stacks.

    Returns:
        The directory.
    """
    from safetensors.torch import save_file

    from asrllm.models.encoders.zipformer.modeling import ZipformerConfig, ZipformerEncoder

    torch.manual_seed(seed)
    encoder = ZipformerEncoder(ZipformerConfig(**TINY_ZIPFORMER))  # type: ignore[arg-type]
    folder.mkdir(parents=True)
    save_file(encoder.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "zipformer"} | TINY_ZIPFORMER))
    return folder


def tiny_llm(folder: Path, *, seed: int = 0, tied: bool = True, head_dim: int = 8) -> Path:
    """Write a Hugging Face Qwen2 directory with random weights: 2 layers with 4 heads.

    Args:
        folder: the directory to write.
        seed: seed of the weights.
        tied: whether the LM head has the weights of the embeddings.
        head_dim: width of an attention head; vLLM supports 32 and more.

    Returns:
        The directory. Its tokenizer has the bytes and WORDS.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=4 * head_dim,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        initializer_range=0.3,  # large enough for the audio to change the text
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """Return a byte-level BPE tokenizer of at most 320 tokens, trained on WORDS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def tone(word: str, seconds: float, rate: int = 16000) -> np.ndarray:
    """Return a tone (samples,) in float32, whose pitch depends on the word's index in WORDS."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * 200 * 1.25 ** WORDS.index(word) * time)).astype(np.float32)


def vowels(seconds: float, *, seed: int = 0, rate: int = 16000) -> np.ndarray:
    """Return a sequence of vowels (samples,) in float32, which a VAD classifies as speech."""
    rng = np.random.default_rng(seed)
    sounds: list[np.ndarray] = []
    while sum(map(len, sounds)) < seconds * rate:
        sounds.append(_vowel(rng, rate))
    return (0.3 * np.concatenate(sounds)[: round(seconds * rate)]).astype(np.float32)


def _vowel(rng: np.random.Generator, rate: int) -> np.ndarray:
    """Return one vowel (samples,) of 0.12 to 0.25 s with a peak of at most 1."""
    first_pitch = rng.uniform(100, 140)  # Hz
    last_factor = rng.uniform(0.85, 1.1)
    samples = round(rng.uniform(0.12, 0.25) * rate)
    pitch = first_pitch * np.linspace(1, last_factor, samples)
    harmonics = np.arange(1, 36)[:, None]
    gains = 0
    for formant, width in zip(rng.choice(FORMANTS), FORMANT_WIDTHS, strict=True):
        gains = gains + 1 / (1 + ((harmonics * pitch.mean() - formant) / width) ** 2)
    phase = 2 * np.pi * harmonics * np.cumsum(pitch) / rate
    wave = (gains / harmonics**0.5 * np.sin(phase)).sum(0)
    return wave / np.abs(wave).max() * np.hanning(len(wave)) ** 0.3


def tone_sentences(count: int, *, seed: int = 0, rate: int = 16000) -> list[tuple[str, np.ndarray]]:
    """Return (text, waveform) of sentences with one to four tones of 0.1 to 0.4 s each.

    Args:
        count: number of sentences.
        seed: seed of the random choices.
        rate: sampling rate in Hz.
    """
    rng = np.random.default_rng(seed)
    sentences: list[tuple[str, np.ndarray]] = []
    for _ in range(count):
        words = [str(word) for word in rng.choice(WORDS, rng.integers(1, 5))]
        tones = [tone(word, rng.uniform(0.1, 0.4), rate) for word in words]
        sentences.append((" ".join(words), np.concatenate(tones)))
    return sentences


def kaldi_directory(
    folder: Path, sentences: Sequence[tuple[str, np.ndarray]], *, rate: int = 16000
) -> Path:
    """Write a Kaldi data directory: wav.scp, text, utt2spk and the wav files.

    Args:
        folder: the directory to write.
        sentences: (text, waveform) of each utterance.
        rate: sampling rate in Hz.

    Returns:
        The directory.
    """
    (folder / "wav").mkdir(parents=True)
    tables: dict[str, list[str]] = {"wav.scp": [], "text": [], "utt2spk": []}
    for i, (words, wave) in enumerate(sentences):
        key = f"utt{i:04d}"
        soundfile.write(folder / "wav" / f"{key}.wav", wave, rate)
        tables["wav.scp"].append(f"{key} wav/{key}.wav\n")
        tables["text"].append(f"{key} {words}\n")
        tables["utt2spk"].append(f"{key} spk{i % 3}\n")
    for name, lines in tables.items():
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


def data_config(path: Path, entries: Sequence[dict[str, object]]) -> Path:
    """Write a data configuration as JSON, which is YAML too, and return its path."""
    path.write_text(json.dumps(list(entries)))
    return path
