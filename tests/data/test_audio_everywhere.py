"""Shards made from files and indexed tars accept and reject the same audio."""

import io
import os
import shutil
import subprocess
import threading

import numpy as np
import pytest
import soundfile

from asrllm.audio.reader import Reader, SampleError
from asrllm.data.audio_files import open_audio, read_blocks, read_segment
from asrllm.data.corpora import make_corpus
from asrllm.data.find_audio import find_audio
from asrllm.data.index import open_index
from asrllm.data.plan import Item
from asrllm.data.shards import write_shards
from asrllm.data.sources import read_folder, read_kaldi, read_nemo
from asrllm.data.tars import scan_tar
from asrllm.data.verify import index_tars
from asrllm.errors import UserError
from asrllm.testing import kaldi_directory, tone, tone_sentences
from tests.data.test_verify import write_tar

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
SECONDS = 2.0


def encoded(form="WAV", wave=None, **options):
    """Return the bytes of an audio file."""
    file = io.BytesIO()
    soundfile.write(
        file, tone("one", SECONDS) if wave is None else wave, 16000, format=form, **options
    )
    return file.getvalue()


def with_sizes(size):
    """Return a wav with wrong sizes in its header.

    Programs write such a header if they do not know the length beforehand.
    """
    data = bytearray(encoded())
    data[4:8] = size.to_bytes(4, "little")
    place = data.index(b"data") + 4
    data[place : place + 4] = size.to_bytes(4, "little")
    return bytes(data)


def without_total():
    """Return a FLAC of a stream, whose header has no number of samples."""
    data = bytearray(encoded("FLAC"))
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    return bytes(data)


def with_total(samples):
    """Return a FLAC whose header has this number of samples."""
    data = bytearray(encoded("FLAC"))
    data[21] = data[21] & 0xF0 | samples >> 32
    data[22:26] = (samples & 0xFFFFFFFF).to_bytes(4, "big")
    return bytes(data)


VALID = {
    "wav": encoded(),
    "wav of unknown size": with_sizes(0xFFFFFFFF),
    "wav of a stream": with_sizes(0),
    "wav with a tag": encoded() + b"id3 " + (2000).to_bytes(4, "little") + bytes(2000),
    "wav with zeros behind it": encoded() + bytes(5000),
    "flac": encoded("FLAC"),
    "ogg": encoded("OGG"),
    "mp3": encoded("MP3"),
    "gsm": encoded("WAV", tone("one", SECONDS), subtype="GSM610"),
    "float above full scale": encoded(wave=20 * tone("one", SECONDS), subtype="FLOAT"),
}
INVALID = {
    "truncated wav": encoded()[: len(encoded()) // 2],
    "wav whose header has a smaller size": with_sizes(6400),
    "truncated flac": encoded("FLAC")[: len(encoded("FLAC")) // 2],
    "truncated mp3": encoded("MP3")[: len(encoded("MP3")) // 2],
    "joined wav": encoded() + encoded(),
    "joined flac": encoded("FLAC") + encoded("FLAC"),
    "damaged ogg": encoded("OGG")[:-2000] + b"~" + encoded("OGG")[-1999:],
    "flac whose header has 19 days": with_total((1 << 36) - 1),
    "float wav of integers": encoded(wave=30_000 * tone("one", SECONDS), subtype="FLOAT"),
    "empty": b"",
    "one byte of a frame": b"\xff",
    "three bytes of a frame": b"\xff\xf1\x50",
    "text": b"this is no audio " * 100,
}


def shards_and_index(folder, content, name):
    """Return the summaries of shards made from a file, and of an indexed tar that contains it.

    Both also have a valid file.
    """
    ending = next(
        (ending for ending in ("flac", "ogg", "mp3", "m4a") if ending in name.split()), "wav"
    )
    (folder / "audio").mkdir()
    (folder / "audio" / f"a.{ending}").write_bytes(content)
    (folder / "audio" / "a.txt").write_text("one")
    (folder / "audio" / "good.wav").write_bytes(encoded())
    (folder / "audio" / "good.txt").write_text("one")
    made = write_shards(folder / "made", read_folder(folder / "audio"))
    members = {f"a.{ending}": content, "a.txt": b"one", "good.wav": encoded(), "good.txt": b"one"}
    tar = write_tar(folder / "x.tar", members)
    return made, index_tars([tar])


@pytest.mark.parametrize("name", VALID)
def test_readable_audio_has_its_full_length(tmp_path, name):
    for summary in shards_and_index(tmp_path, VALID[name], name):
        assert summary.rejected == {}
        assert summary.index.rows["samples"].tolist() == pytest.approx(
            [SECONDS * 16000] * 2, abs=1600
        )


def read_by_training(index):
    """Return the waveform of each row of an index as a training reads it, or its error."""
    reader = Reader([make_corpus("c", index, None)])
    found = []
    for row in range(len(index)):
        try:
            found.append(reader.read(Item(corpus=0, row=row)).wave)
        except SampleError as error:
            found.append(str(error))
    return found


def check_training(index, content, ending):
    """Check that a training reads the first row of an index as `asrllm transcribe` reads a file."""
    expected = np.concatenate(list(read_blocks(open_audio(f"a.{ending}", content))))
    wave, good = read_by_training(index)
    assert len(wave) == len(expected)
    np.testing.assert_allclose(wave, expected, atol=1e-3)
    assert len(good) == SECONDS * 16000


@pytest.mark.parametrize("name", VALID)
def test_training_reads_the_audio_that_is_indexed(tmp_path, name):
    ending = name if name in ("flac", "ogg", "mp3") else "wav"
    _, indexed = shards_and_index(tmp_path, VALID[name], name)
    check_training(indexed.index, VALID[name], ending)


def test_training_rejects_values_that_are_not_audio(tmp_path):
    for i, value in enumerate((30_000.0, np.nan)):
        wave = tone("one", SECONDS)
        wave[1000] = value  # indexing reads only the end
        content = encoded(wave=wave, subtype="FLOAT")
        (tmp_path / str(i)).mkdir()
        _, indexed = shards_and_index(tmp_path / str(i), content, "wav")
        error, good = read_by_training(indexed.index)
        assert "a.wav" in error
        assert len(good) == SECONDS * 16000


@pytest.mark.parametrize("name", INVALID)
def test_bad_audio_is_rejected_from_folders_and_tars(tmp_path, name):
    made, indexed = shards_and_index(tmp_path, INVALID[name], name)
    assert made.rejected == {"unreadable_audio": 1}
    # its header is valid, so only reading the samples rejects it
    if name == "float wav of integers":
        return
    assert indexed.rejected == {"unreadable_audio": 1}


@pytest.mark.slow
@needs_ffmpeg
def test_a_flac_without_a_total_has_its_full_length(tmp_path):
    for summary in shards_and_index(tmp_path, without_total(), "flac"):
        assert summary.rejected == {}
        assert summary.index.rows["samples"].tolist() == pytest.approx(
            [SECONDS * 16000] * 2, abs=1600
        )
    check_training(summary.index, without_total(), "flac")


@needs_ffmpeg
@pytest.mark.parametrize("codec", ["adpcm_ima_wav", "adpcm_ms"])
def test_adpcm_is_read_whole(tmp_path, codec):
    soundfile.write(tmp_path / "a.wav", tone("one", SECONDS), 16000)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-c:a", codec, tmp_path / "b.wav"]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)
    for summary in shards_and_index(tmp_path, (tmp_path / "b.wav").read_bytes(), "wav"):
        assert summary.rejected == {}
        assert summary.index.rows["samples"].tolist() == pytest.approx(
            [SECONDS * 16000] * 2, abs=1600
        )


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("opus", []),
        ("ogg", []),
        ("ogg", ["-c:a", "flac"]),
        ("aac", []),
        ("mp3", ["-write_xing", "0"]),
        ("mp2", []),
        ("flac", []),
    ],
)
def test_half_a_stream_is_rejected_and_a_whole_one_is_read(tmp_path, ending, options):
    soundfile.write(tmp_path / "a.wav", tone("one", SECONDS), 16000)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", *options]
    if ending == "flac":  # a pipe cannot be completed with the number of samples
        command += ["-f", "flac", "pipe:1"]
        done = subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL, stdout=-1)
        content = done.stdout
    else:
        subprocess.run([*command, tmp_path / f"b.{ending}"], check=True, timeout=60)
        content = (tmp_path / f"b.{ending}").read_bytes()
    for name, part in (("whole", content), ("half", content[: len(content) // 2 + 3])):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"a.{ending}").write_bytes(part)
        (tmp_path / name / "a.txt").write_text("one")
        soundfile.write(tmp_path / name / "good.wav", tone("one", SECONDS), 16000)
        (tmp_path / name / "good.txt").write_text("one")
        made = write_shards(tmp_path / f"{name}-out", read_folder(tmp_path / name))
        assert made.rejected == ({} if name == "whole" else {"unreadable_audio": 1})


@pytest.mark.slow
@needs_ffmpeg
def test_m4a_is_read_from_folders_and_tars(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone("one", SECONDS), 16000)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", tmp_path / "a.m4a"]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)
    content = (tmp_path / "a.m4a").read_bytes()
    for summary in shards_and_index(tmp_path, content, "m4a"):
        assert summary.rejected == {}
        assert summary.index.rows["samples"].tolist() == pytest.approx(
            [SECONDS * 16000] * 2, abs=1600
        )
    check_training(summary.index, content, "m4a")


def test_skipped_files_of_a_folder_are_counted_and_named(tmp_path, caplog):
    soundfile.write(tmp_path / "a.wav", tone("one", SECONDS), 16000)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / ".hidden").write_text("of the system")
    (tmp_path / "more").mkdir()
    for name in ("cover.jpg", "more/b.pdf"):
        (tmp_path / name).write_bytes(bytes(3200))
    assert [utterance.key for utterance in read_folder(tmp_path)] == ["a"]
    assert find_audio([str(tmp_path)]) == [str(tmp_path / "a.wav")]
    assert [record.args[0] for record in caplog.records] == [2, 2]
    for record in caplog.records:
        assert "cover.jpg" in record.getMessage()
        assert "more/b.pdf" in record.getMessage()


def test_audio_that_the_folders_own_table_does_not_list_is_counted(tmp_path, caplog):
    for name in ("a", "b", "c"):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(1600), 16000)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,one\n./b.wav,two\n")
    assert [utterance.key for utterance in read_folder(tmp_path)] == ["a", "b"]
    assert "c.wav" in caplog.text
    assert "a.wav" not in caplog.text
    caplog.clear()
    table = tmp_path / "metadata.csv"
    assert len(list(read_folder(tmp_path, table=table))) == 2
    assert not caplog.text


def test_symbolic_links_are_followed_once(tmp_path):
    (tmp_path / "corpus").mkdir()
    soundfile.write(tmp_path / "corpus" / "a.wav", tone("one", SECONDS), 16000)
    (tmp_path / "corpus" / "again").symlink_to(tmp_path / "corpus")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "corpus").symlink_to(tmp_path / "corpus")
    assert find_audio([str(tmp_path / "links")]) == [str(tmp_path / "links" / "corpus" / "a.wav")]


@pytest.mark.timeout(30)
def test_a_fifo_in_a_corpus_is_rejected_without_waiting(tmp_path):
    kaldi = kaldi_directory(tmp_path / "k", tone_sentences(2))
    os.mkfifo(tmp_path / "fifo.wav")
    (kaldi / "wav.scp").write_text(
        f"utt0000 {tmp_path}/fifo.wav\nutt0001 {kaldi}/wav/utt0001.wav\n"
    )
    assert write_shards(tmp_path / "out", read_kaldi(kaldi)).rejected == {"unreadable_audio": 1}
    with pytest.raises(UserError, match=f"{tmp_path}/fifo.wav"):
        list(read_nemo(tmp_path / "fifo.wav"))


def test_audio_above_full_scale_is_scaled_and_not_clipped(tmp_path):
    wave = 3 * tone("one", 1.0) / np.abs(tone("one", 1.0)).max()
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="FLOAT")
    (tmp_path / "a.txt").write_text("one")
    write_shards(tmp_path / "out", read_folder(tmp_path))
    (sample,) = scan_tar(tmp_path / "out" / "shard-000000.tar")
    found, _ = soundfile.read(io.BytesIO(sample.audio))
    np.testing.assert_allclose(found, wave / 3, atol=1e-4)


def test_raw_samples_are_rejected_with_a_hint_to_sox(tmp_path):
    (tmp_path / "a.raw").write_bytes(bytes(3200))
    with pytest.raises(UserError, match="sox"):
        open_audio(str(tmp_path / "a.raw"))


def test_a_fifo_is_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    writer = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=[encoded()], daemon=True)
    writer.start()
    wave, rate = read_segment(open_audio(str(tmp_path / "fifo")))
    assert (len(wave), rate) == (SECONDS * 16000, 16000)


def test_a_file_name_that_is_not_utf8_is_read(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
    with open(name, "wb") as file:
        file.write(encoded())
    with open(name.replace(".wav", ".txt"), "w") as file:
        file.write("one")
    assert len(read_segment(open_audio(name))[0]) == SECONDS * 16000
    assert write_shards(tmp_path / "out", read_folder(tmp_path)).rejected == {}
    (sample,) = scan_tar(tmp_path / "out" / "shard-000000.tar")
    assert sample.key == r"caf\xe9"


def kaldi_with_segments(folder, segments):
    """Write a Kaldi directory of a recording with the channels "one" and "two", and segments."""
    soundfile.write(
        folder / "r.wav", np.stack([tone("one", SECONDS), tone("two", SECONDS)], 1), 16000
    )
    (folder / "wav.scp").write_text("r r.wav\n")
    (folder / "segments").write_text(
        "".join(f"u{i} r {segment}\n" for i, segment in enumerate(segments))
    )
    (folder / "text").write_text("".join(f"u{i} one\n" for i in range(len(segments))))
    return folder


def test_kaldi_segments_support_channels_and_a_tolerance_at_the_end(tmp_path):
    kaldi = kaldi_with_segments(
        tmp_path, ["0 1 0", "0 1 1", "0 1 A", "0 1 B", "0 1", "1 2.4", "1 2.6", "0 1 2"]
    )
    summary = write_shards(tmp_path / "out", read_kaldi(kaldi))
    assert summary.rejected == {"outside_audio": 1, "missing_channel": 1}
    assert (open_index(tmp_path / "out").rows["samples"] / 16000).tolist() == pytest.approx(
        [1.0] * 6
    )
    waves = [
        soundfile.read(io.BytesIO(sample.audio))[0]
        for sample in scan_tar(tmp_path / "out" / "shard-000000.tar")
    ]
    one, two = tone("one", SECONDS)[:16000], tone("two", SECONDS)[:16000]
    for wave, expected in zip(waves, [one, two, one, two, (one + two) / 2], strict=False):
        np.testing.assert_allclose(wave, expected, atol=1e-4)


@needs_ffmpeg
def test_kaldi_segments_name_the_channels_of_a_file_that_ffmpeg_reads(tmp_path):
    kaldi = kaldi_with_segments(tmp_path, ["0 1 0", "0 1 1", "0 1"])
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "r.wav", "-c:a", "pcm_s16le"]
    subprocess.run([*command, tmp_path / "r.mka"], check=True, timeout=60, stdin=subprocess.DEVNULL)
    (kaldi / "wav.scp").write_text("r r.mka\n")
    assert write_shards(tmp_path / "out", read_kaldi(kaldi)).rejected == {}
    samples = scan_tar(tmp_path / "out" / "shard-000000.tar")
    waves = [soundfile.read(io.BytesIO(sample.audio))[0] for sample in samples]
    one, two = tone("one", SECONDS)[:16000], tone("two", SECONDS)[:16000]
    for wave, expected in zip(waves, [one, two, (one + two) / 2], strict=True):
        np.testing.assert_allclose(wave, expected, atol=1e-4)


@pytest.mark.parametrize("segment", ["0 1 C", "0 1 -1", "0 1 0 0", "0"])
def test_malformed_kaldi_segments_are_rejected(tmp_path, segment):
    (utterance,) = read_kaldi(kaldi_with_segments(tmp_path, [segment]))
    assert utterance.problem[0] == "bad_segment"


def test_a_truncated_sphere_file_is_rejected(tmp_path):
    whole = encoded("NIST")
    assert len(read_segment(open_audio("a.sph", whole))[0]) == SECONDS * 16000
    with pytest.raises(UserError, match=r"'a\.sph' .*truncated"):
        open_audio("a.sph", whole[: len(whole) // 2])
