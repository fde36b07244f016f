"""Audio files of every format as a stream, and what is wrong with some."""

import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from asrllm.audio import stream
from asrllm.audio.reader import decode
from asrllm.audio.stream import find_audio, open_audio, read_blocks
from asrllm.errors import UserError
from asrllm.testing import vowels

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")


def read(path):
    return np.concatenate(list(read_blocks(open_audio(str(path)))))


def fails(path):
    with pytest.raises(UserError) as raised:
        read(path)
    message = str(raised.value)
    assert repr(str(path)) in message
    assert "\n" not in message
    return message


def make(path, seconds=9, rate=44100, channels=2, **how):
    wave = vowels(seconds, rate=rate)
    soundfile.write(
        path, np.stack([wave * (i + 1) / channels for i in range(channels)], 1), rate, **how
    )
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "rate", "how"),
    [
        ("wav", 16000, {}),
        ("wav", 8000, {"subtype": "FLOAT"}),
        ("flac", 44100, {}),
        ("mp3", 22050, {}),
        ("ogg", 44100, {}),
        ("opus", 48000, {"format": "OGG", "subtype": "OPUS"}),
        ("aiff", 96000, {}),
        ("caf", 11025, {}),
    ],
)
def test_a_stream_is_the_whole_file_in_blocks(tmp_path, monkeypatch, ending, rate, how):
    path = make(tmp_path / f"a.{ending}", rate=rate, **how)
    whole, found = decode(path), read(path)
    assert open_audio(str(path)).seconds == pytest.approx(
        9, abs=1e-3 if ending not in ("mp3", "opus") else 0.1
    )
    assert abs(len(found) - len(whole)) <= 1
    assert found.dtype == np.float32
    n = min(len(found), len(whole))
    np.testing.assert_allclose(found[:n], whole[:n], atol=2e-4)
    monkeypatch.setattr(stream, "BLOCK", 999)
    np.testing.assert_allclose(read(path), found, atol=1e-6)


@needs_ffmpeg
@pytest.mark.slow
@pytest.mark.parametrize("ending", ["m4a", "webm", "mp4", "mkv", "aac"])
def test_ffmpeg_reads_the_rest(tmp_path, ending):
    """A picture that stands longer than the sound takes nothing from it."""
    wav, path = make(tmp_path / "a.wav", seconds=20), tmp_path / f"-a b.{ending}"
    codec = {"webm": "libopus"}.get(ending, "aac")
    picture = (
        ["-f", "lavfi", "-i", "color=size=32x32:duration=22"] if ending in ("mp4", "mkv") else []
    )
    command = ["ffmpeg", "-v", "error", "-i", wav, *picture, "-c:a", codec, f"file:{path}"]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)
    file, whole, found = open_audio(str(path)), read(wav), read(path)
    assert abs(len(found) - len(whole)) < 3200
    if ending in ("mkv", "aac"):  # these say neither how long the sound is nor where it begins
        assert file.seconds is None
        return
    assert (file.decoder, round(file.seconds)) == ("ffmpeg", 20)
    n = min(len(found), len(whole))
    assert np.corrcoef(found[:n], whole[:n])[0, 1] > 0.9
    next(blocks := read_blocks(file))
    blocks.close()  # and ffmpeg ends
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "cannot be read" in fails(cut) or "is damaged" in fails(cut)


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("quiet.mp3", ["-q:a", "4", "-write_xing", "0"]),
        ("loud.mp3", ["-q:a", "4", "-write_xing", "0"]),
        ("a.flac", ["-f", "flac"]),
        ("chained.opus", ["-c:a", "libopus", "-f", "ogg"]),
    ],
)
def test_a_file_without_its_length_is_read_wholly(tmp_path, monkeypatch, name, how):
    """Its beginning says more or less than there is; written into a pipe, where ffmpeg cannot go back to say it."""
    noise = np.random.default_rng(0).normal(0, 0.2 if name == "loud.mp3" else 1e-4, 8000)
    soundfile.write(tmp_path / "a.wav", np.concatenate([noise, vowels(9)]), 16000)
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-i",
        tmp_path / "a.wav",
        *how,
        *([] if "-f" in how else ["-f", "mp3"]),
        "-",
    ]
    made = subprocess.run(
        command, check=True, timeout=60, stdin=subprocess.DEVNULL, capture_output=True
    ).stdout
    (tmp_path / name).write_bytes(made * 2 if name == "chained.opus" else made)
    assert open_audio(str(tmp_path / name)).seconds is None
    assert len(read(tmp_path / name)) / 16000 == pytest.approx(
        len(read(tmp_path / "a.wav")) / 16000 * (1 + (name == "chained.opus")), abs=0.2
    )
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "ffmpeg alone" in fails(tmp_path / name)


def test_without_ffmpeg_its_formats_are_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert (
        "read are wav, flac, mp3, ogg, opus, aiff, au, caf, w64, and with ffmpeg, which is not on PATH, also m4a"
        in fails(tmp_path / "a.m4a")
    )


@pytest.mark.parametrize("with_ffmpeg", [pytest.param(True, marks=needs_ffmpeg), False])
def test_what_is_no_audio(tmp_path, monkeypatch, with_ffmpeg):
    if not with_ffmpeg:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.txt").write_text("nothing to hear\n" * 50)
    (tmp_path / "text.wav").write_text("nothing to hear\n" * 50)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    assert "is empty, 0 bytes" in fails(tmp_path / "empty.wav")
    assert "cannot be read" in fails(tmp_path / "text.txt")
    assert "cannot be read" in fails(tmp_path / "text.wav")
    assert "cannot be read" in fails(tmp_path / "no.wav")
    assert "holds no sample" in fails(tmp_path / "none.wav")


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["wav", "aiff", "au", "w64", "caf", "flac", "mp3"])
def test_a_file_that_is_cut_short(tmp_path, ending):
    path = make(tmp_path / f"a.{ending}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    message = fails(path)
    assert "is cut short, its header promises" in message or "is damaged" in message


def test_a_wav_that_was_piped_has_no_size_and_is_whole(tmp_path):
    path = make(tmp_path / "a.wav", channels=1)
    content, whole = bytearray(path.read_bytes()), read(path)
    at = content.index(b"data") + 4
    content[4:8] = content[at : at + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert (read(path) == whole).all()


def test_samples_that_are_no_sound(tmp_path):
    wave = vowels(12)
    for name, value, message in (
        ("nan", np.nan, "NaN or infinite"),
        ("inf", np.inf, "NaN or infinite"),
        ("loud", 1e30, "as large as 1e"),
    ):
        wave[170_000] = value
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000, subtype="FLOAT")
        assert message in fails(tmp_path / f"{name}.wav")


def test_directories_give_their_audio_files_sorted(tmp_path):
    for name in ("b/2.wav", "b/1.FLAC", "a.mp3", "notes.txt", "._a.mp3", "z.m4a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(tmp_path / name) for name in ("a.mp3", "b/1.FLAC", "b/2.wav", "z.m4a")]
    assert find_audio([str(tmp_path)]) == found
    assert find_audio([found[1], str(tmp_path / "b"), "x.y"]) == [found[1], *found[1:3], "x.y"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no audio file"):
        find_audio([str(tmp_path / "none")])
