import io
import json
import tarfile

import numpy as np
import pytest
import soundfile
import webdataset

from asrllm.data.index import RATE, open_index, scan_tar, write_index
from asrllm.data.shards import write_shards
from asrllm.data.sources import Utterance, read_kaldi
from asrllm.errors import UserError
from asrllm.testing import kaldi_directory, tone, tone_sentences


def utterance(key="a", text="one", wave=None, rate=16000, **more):
    wave = tone("one", 0.5, rate) if wave is None else wave
    return Utterance(key=key, text=text, load=lambda: (wave, rate), **more)


def rejected(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def test_shards_hold_what_the_source_holds_and_webdataset_reads_them(tmp_path):
    sentences = tone_sentences(7, rate=8000)
    summary = write_shards(
        tmp_path / "out",
        read_kaldi(kaldi_directory(tmp_path / "kaldi", sentences, rate=8000)),
        utterances_per_shard=3,
        fields={"lang": "en"},
    )
    assert summary.rejected == {}
    assert [p.name for p in summary.index.shards] == [f"shard-{i:06d}.tar" for i in range(3)]
    urls = str(tmp_path / "out" / "shard-{000000..000002}.tar")
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [s["json"]["text"] for s in read] == [words for words, _ in sentences]
    assert read[0]["__key__"] == "utt0000"
    assert read[0]["json"] | {"text": ""} == {
        "text": "", "duration": len(sentences[0][1]) / 8000, "sampling_rate": 8000, "lang": "en", "speaker": "spk0"
    }  # fmt: skip
    wave, rate = soundfile.read(tmp_path / "kaldi" / "wav" / "utt0000.wav", dtype="float32")
    (first, *_) = scan_tar(summary.index.shards[0])
    flac, flac_rate = soundfile.read(io.BytesIO(first.audio), dtype="float32")
    assert (flac_rate, rate) == (8000, 8000)
    np.testing.assert_allclose(flac, wave, atol=1e-4)


def test_the_index_finds_every_sample(tmp_path):
    sentences = tone_sentences(5)
    write_shards(tmp_path / "out", read_kaldi(kaldi_directory(tmp_path / "kaldi", sentences)), utterances_per_shard=2)
    index = open_index(tmp_path / "out")
    assert index.rows.dtype.itemsize == 20
    for row, (words, wave) in zip(index.rows, sentences, strict=True):
        data = index.shards[row["shard"]].read_bytes()[int(row["offset"]) :][: int(row["size"])]
        (tmp_path / "piece.tar").write_bytes(data)
        (sample,) = scan_tar(tmp_path / "piece.tar")
        assert sample.fields["text"] == words
        assert row["samples"] == len(wave)
        assert row["text_bytes"] == len(words)


def test_the_same_input_gives_the_same_bytes(tmp_path):
    kaldi = kaldi_directory(tmp_path / "kaldi", tone_sentences(5))
    for name, workers in (("a", 1), ("b", 3)):
        write_shards(tmp_path / name, read_kaldi(kaldi), utterances_per_shard=2, workers=workers)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (utterance("bad", text="  "), "empty_text"),
        (utterance("bad", text="x" * 10_001), "long_text"),
        (utterance("bad", wave=np.zeros(0, np.float32)), "empty_audio"),
        (utterance("bad", wave=np.full(9, np.nan, np.float32)), "non_finite_audio"),
        (utterance("bad", duration=0.7), "duration_mismatch"),
        (utterance("good"), "duplicate_key"),
        (utterance("bad", rate=700_000), "not_encodable"),
    ],
)
def test_what_is_unfit_is_rejected_with_its_key_and_reason(tmp_path, bad, reason):
    summary = write_shards(tmp_path / "out", [utterance("good"), bad, utterance("last")])
    assert summary.rejected == {reason: 1}
    assert len(summary.index) == 2
    (row,) = rejected(tmp_path / "out")
    assert (row["key"], row["reason"]) == (bad.key, reason)


def test_unreadable_audio_is_rejected_with_its_key(tmp_path):
    kaldi = kaldi_directory(tmp_path / "kaldi", tone_sentences(3))
    (kaldi / "wav" / "utt0001.wav").write_bytes(b"RIFF, not really")
    (kaldi / "wav" / "utt0002.wav").unlink()
    write_shards(tmp_path / "out", read_kaldi(kaldi))
    assert [(r["key"], r["reason"]) for r in rejected(tmp_path / "out")] == [
        ("utt0001", "unreadable_audio"),
        ("utt0002", "unreadable_audio"),
    ]


def test_nothing_is_left_where_nothing_could_be_written(tmp_path):
    with pytest.raises(UserError, match=r"no utterance could be written.*1 empty_text"):
        write_shards(tmp_path / "out", [utterance(text="")])
    assert list(tmp_path.iterdir()) == []


def test_shards_are_never_written_over_others(tmp_path):
    write_shards(tmp_path / "out", [utterance()])
    with pytest.raises(UserError, match="is not empty"):
        write_shards(tmp_path / "out", [utterance()])


def test_an_interrupted_writing_leaves_no_shard_directory(tmp_path):
    def interrupted():
        yield utterance()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path / "out", interrupted())
    assert not (tmp_path / "out").exists()


def test_tars_of_others_are_indexed(tmp_path):
    """wenet's form: KEY.wav + KEY.txt, in a folder inside the tar, with the names of directories among the members."""
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.wav", tone("two", 0.25 * (i + 1), 8000), 8000)
        (tmp_path / f"{i}.txt").write_text("二\n", encoding="utf-8")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("0.wav", "0.txt", "1.txt", "1.wav"):
            tar.add(tmp_path / name, f"d/{name}")
    index = write_index(tmp_path, [tmp_path / "x.tar"])
    assert index.rows["samples"].tolist() == [0.25 * RATE, 0.5 * RATE]
    assert index.rows["text_bytes"].tolist() == [3, 3]
    assert [s.key for s in scan_tar(tmp_path / "x.tar")] == ["d/0", "d/1"]


def test_a_tar_without_transcripts_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone("two", 0.2), 16000)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "a.wav", "a.wav")
    with pytest.raises(UserError, match=r"sample 'a' in .* has no transcript"):
        write_index(tmp_path, [tmp_path / "x.tar"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "index.json").unlink(), "has no index.json"),
        (lambda out: (out / "shard-000000.tar").unlink(), "is missing"),
        (lambda out: (out / "index.json").write_text("{"), "is not valid JSON"),
        (lambda out: (out / "index.json").write_text("{}"), "is damaged"),
        (lambda out: (out / "index.bin").write_bytes(b"x"), "is damaged"),
        (lambda out: (out / "shard-000000.tar").write_bytes(b"x"), "its index says"),
    ],
)
def test_a_damaged_shard_directory_is_one_sentence(tmp_path, damage, message):
    write_shards(tmp_path / "out", [utterance()])
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        open_index(tmp_path / "out")
