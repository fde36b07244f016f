import numpy as np
import pytest
import soundfile
import torch

from asrllm.data.waveforms import resample
from asrllm.errors import UserError
from asrllm.models.asr_llm.configuration import AsrLlmConfig
from asrllm.models.asr_llm.processing import AsrLlmProcessor
from asrllm.testing import TINY_ZIPFORMER, tiny_tokenizer, tone

WHISPER = {"model_type": "whisper", "num_mel_bins": 80, "max_source_positions": 1500}


def make_processor(encoder=WHISPER):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|AUDIO|>"], special_tokens=True)
    return AsrLlmProcessor(tokenizer, AsrLlmConfig(audio_encoder=encoder))


WAVE = tone("one", 0.5)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (WAVE[:0], "audio 1 .*empty"),
        (
            WAVE[:159],
            r"audio 1 .* 159 .* 160 \(0\.010 s\)",
        ),
        (
            np.zeros(16000 * 31, np.float32),
            r"audio 1 .* 31\.00 s.* 30\.01 s",
        ),
        (WAVE * np.nan, "audio 1 .*NaN"),
        (np.full(9000, np.inf), "audio 1 .*infinite"),
        (WAVE.astype(np.float64) * 1e300, "audio 1 .*float32"),
        ((WAVE * 32767).astype(np.int16), "audio 1 .*int16.* 32768"),
        (torch.zeros(9000, dtype=torch.int32), "audio 1 .*int32"),
        ([0, 1, 2], "audio 1 .*int64"),
        (np.stack([WAVE, WAVE]), r"audio 1 .* \(2, 8000\)"),
        (torch.zeros(1, 8000), r"audio 1 .* \(1, 8000\)"),
        ((WAVE, 0), "audio 1 .* 0.*Hz"),
        ((WAVE[:20], 48000), r"audio 1 .* 7 .* 160 \(0\.010 s\)"),
        ([[0.0], [1.0, 2.0]], "audio 1 .*array"),
        (None, r"audio 1 .* \(\)"),
        ("no.wav", r"'no\.wav'"),
    ],
)
def test_invalid_audio_is_rejected(audio, message):
    with pytest.raises(UserError, match=message) as caught:
        make_processor().load_waves([WAVE, audio])
    assert "\n" not in str(caught.value)


def test_invalid_audio_files_are_reported_by_path(tmp_path):
    soundfile.write(tmp_path / "short.wav", WAVE[:100], 16000)
    soundfile.write(tmp_path / "none.wav", WAVE[:0], 16000)
    for name, message in (
        ("short.wav", r"audio 0 \('.*short\.wav'\) .* 100 .* 160 "),
        ("none.wav", r"none\.wav' .*samples"),
    ):
        with pytest.raises(UserError, match=message):
            make_processor().load_waves([tmp_path / name])


def test_audio_limits_are_those_of_the_encoder():
    zipformer = make_processor({"model_type": "zipformer"} | TINY_ZIPFORMER)
    low, _ = zipformer.config.sample_limits()
    with pytest.raises(UserError, match=f"audio 0 .* {low - 1} .* {low} "):
        zipformer.load_waves([np.zeros(low - 1, np.float32)])
    waves, lengths = zipformer.load_waves(
        [np.zeros(low, np.float32), np.zeros(16000 * 31, np.float32)]
    )
    assert waves.shape == (2, 16000 * 31)
    assert lengths.tolist() == [low, 16000 * 31]


@pytest.mark.parametrize("alone", ["a.wav", WAVE, torch.from_numpy(WAVE), (WAVE, 16000), None, 3])
def test_audio_outside_of_a_list_is_rejected(alone):
    with pytest.raises(UserError, match=rf"{type(alone).__name__}\..*\[audio\]"):
        make_processor().load_waves(alone)


def test_empty_list_of_audios_is_rejected():
    with pytest.raises(UserError, match="audios"):
        make_processor().load_waves([])


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
def test_arrays_of_other_rates_are_resampled_as_files_are(tmp_path, rate):
    wave = tone("one", 0.5, rate)
    soundfile.write(tmp_path / "a.wav", wave, rate, subtype="FLOAT")
    waves, lengths = make_processor().load_waves(
        [tmp_path / "a.wav", (wave, rate), (torch.from_numpy(wave), np.int64(rate))]
    )
    for row in waves:
        np.testing.assert_array_equal(row, resample(wave, rate))
    assert lengths.tolist() == [8000] * 3


def test_stereo_files_are_mixed_down(tmp_path):
    other = tone("two", 0.5)
    soundfile.write(tmp_path / "a.wav", np.stack([WAVE, other], 1), 16000, subtype="FLOAT")
    (row,), _ = make_processor().load_waves([tmp_path / "a.wav"])
    np.testing.assert_allclose(row, (WAVE + other) / 2, atol=1e-7)


def test_chat_outside_of_a_list_is_rejected():
    processor = make_processor()
    with pytest.raises(UserError, match=r"\[messages\]"):
        processor.count_audios(processor.renderer.user_messages("x"), 1)
