"""Reading utterances from shards, and audio files of any format."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile

from asrllm.audio.reader import Reader, SampleError, read_audio
from asrllm.data.corpora import make_corpus
from asrllm.data.index import open_index
from asrllm.data.plan import Item
from asrllm.data.shards import write_shards
from asrllm.data.sources import read_kaldi
from asrllm.errors import UserError
from asrllm.testing import kaldi_directory, tone, tone_sentences
from tests.data.damage import accept_bytes


def make_reader(folder, sentences, rate=16000):
    utterances = read_kaldi(kaldi_directory(folder / "k", sentences, rate=rate))
    written = write_shards(folder / "s", utterances, utterances_per_shard=2)
    return Reader([make_corpus("c", written.index, None)])


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_every_utterance_is_read_at_16_khz(tmp_path, rate):
    sentences = tone_sentences(5, rate=rate)
    reader = make_reader(tmp_path, sentences, rate)
    for i, (words, wave) in enumerate(sentences):
        sample = reader.read(Item(corpus=0, row=i))
        assert sample.key == f"utt{i:04d}"
        assert sample.text == words
        assert not sample.is_filler
        assert sample.wave.dtype == np.float32
        assert abs(len(sample.wave) - len(wave) * 16000 / rate) <= 1
        assert abs(sample.wave.std() - wave.std()) < 0.01
    assert reader.read(Item(corpus=0, row=0, is_filler=True)).is_filler


def test_corrupted_sample_is_reported_with_its_shard(tmp_path):
    reader = make_reader(tmp_path, tone_sentences(3))
    corpus = reader.corpora[0]
    rows = np.array(corpus.index.rows)
    rows["offset"][1] += 1
    broken = Reader([replace(corpus, index=replace(corpus.index, rows=rows))])
    assert broken.read(Item(corpus=0, row=0)).key == "utt0000"
    with pytest.raises(SampleError, match=r"\b1 .*\bc .*shard-000000\.tar"):
        broken.read(Item(corpus=0, row=1))


def test_corrupted_audio_is_reported_with_its_key(tmp_path):
    reader = make_reader(tmp_path, tone_sentences(3))
    shard = tmp_path / "s" / "shard-000000.tar"
    row = reader.corpora[0].index.rows[1]
    data = bytearray(shard.read_bytes())
    begin = (int(row["offset"]) + 1) * 512
    data[begin : begin + 512] = bytes(512)
    shard.write_bytes(data)
    with pytest.raises(SampleError, match=r"\b1 .*\bc .*shard-000000\.tar"):
        reader.read(Item(corpus=0, row=1))
    accept_bytes(tmp_path / "s")
    reader = Reader([replace(reader.corpora[0], index=open_index(tmp_path / "s"))])
    with pytest.raises(SampleError, match=r"^utt0001 in .*shard-000000\.tar: .*Format not rec"):
        reader.read(Item(corpus=0, row=1))


def test_audio_whose_length_does_not_match_the_index_is_reported(tmp_path):
    reader = make_reader(tmp_path, tone_sentences(1))
    index = open_index(tmp_path / "s")
    rows = np.array(index.rows)
    samples = int(rows["samples"][0])
    rows["samples"] += 16000
    reader = Reader([replace(reader.corpora[0], index=replace(index, rows=rows))])
    with pytest.raises(SampleError, match=rf"utt0000 .* {samples} samples.* {samples + 16000} "):
        reader.read(Item(corpus=0, row=0))


def test_channels_of_a_file_are_averaged(tmp_path):
    left = tone("one", 0.5, 48000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, 0 * left], 1), 48000)
    wave = read_audio(tmp_path / "a.wav")
    assert wave.shape == (8000,)
    assert abs(wave.std() - left.std() / 2) < 0.01


def test_unreadable_files_are_reported_with_their_paths(tmp_path):
    with pytest.raises(UserError, match=r"/no\.wav'"):
        read_audio(tmp_path / "no.wav")
    (tmp_path / "text.wav").write_text("hello")
    with pytest.raises(UserError, match=r"/text\.wav'"):
        read_audio(tmp_path / "text.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16000)
    with pytest.raises(UserError, match=r"/empty\.wav' .*samples"):
        read_audio(tmp_path / "empty.wav")
    soundfile.write(tmp_path / "nan.wav", np.full(100, np.nan, np.float32), 16000, subtype="FLOAT")
    with pytest.raises(UserError, match=r"/nan\.wav' .*NaN"):
        read_audio(tmp_path / "nan.wav")
