"""Audio files of every format, read block by block, and the errors for invalid ones."""

import errno
import os
import shutil
import struct
import subprocess

import numpy as np
import pytest
import soundfile

from asrllm.data import audio_files, ffmpeg
from asrllm.data.audio_file import OutsideError
from asrllm.data.audio_files import open_audio, read_blocks, read_segment
from asrllm.data.find_audio import find_audio
from asrllm.data.waveforms import resample, to_mono
from asrllm.errors import UserError
from asrllm.testing import vowels

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")


def read(path):
    return np.concatenate(list(read_blocks(open_audio(str(path)))))


def error_of(path):
    """Return the error for a file, which is one line and names the file."""
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


@pytest.mark.parametrize("rate", [0, 1, 999, 1_000_001, 2**31 - 1, 2**32 - 1])
def test_a_sampling_rate_that_no_recording_has_is_rejected(tmp_path, rate):
    path = make(tmp_path / "a.wav", seconds=0.5, rate=16000, channels=1)
    content = path.read_bytes()
    path.write_bytes(content[:24] + struct.pack("<I", rate) + content[28:])
    message = error_of(path)
    if 0 < rate < 2**31:  # libsndfile itself rejects the others
        assert f"{rate} Hz" in message


@pytest.mark.parametrize("rate", [1000, 192_000, 1_000_000])
def test_the_lowest_and_highest_sampling_rates_are_read(tmp_path, rate):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(rate // 2), rate)
    assert open_audio(str(path)).seconds == 0.5


@needs_ffmpeg
@pytest.mark.slow
def test_a_sampling_rate_that_only_ffmpeg_reads_is_checked(tmp_path):
    path = tmp_path / "a.mka"
    wave = tmp_path / "a.wav"
    soundfile.write(wave, np.zeros(400), 400)
    subprocess.run(
        ["ffmpeg", "-v", "error", "-i", wave, "-c:a", "pcm_s16le", "-ar", "400", path], check=True
    )
    assert "400 Hz" in error_of(path)


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
def test_blocks_contain_the_whole_file(tmp_path, monkeypatch, ending, rate, how):
    path = make(tmp_path / f"a.{ending}", rate=rate, **how)
    samples, own_rate = soundfile.read(path, dtype="float32", always_2d=True)
    whole = resample(to_mono(samples), own_rate)
    found = read(path)
    tolerance = 0.1 if ending in ("mp3", "opus") else 1e-3
    assert open_audio(str(path)).seconds == pytest.approx(9, abs=tolerance)
    assert abs(len(found) - len(whole)) <= 1
    assert found.dtype == np.float32
    n = min(len(found), len(whole))
    np.testing.assert_allclose(found[:n], whole[:n], atol=2e-4)
    monkeypatch.setattr(audio_files, "BLOCK_SAMPLES", 999)
    np.testing.assert_allclose(read(path), found, atol=1e-6)


@needs_ffmpeg
@pytest.mark.slow
@pytest.mark.parametrize("ending", ["m4a", "webm", "mp4", "mkv", "aac"])
def test_ffmpeg_reads_other_formats(tmp_path, ending):
    """A picture that is longer than the audio does not change the length of the audio."""
    wav = make(tmp_path / "a.wav", seconds=20)
    path = tmp_path / f"-a b.{ending}"
    codec = {"webm": "libopus"}.get(ending, "aac")
    picture = []
    if ending in ("mp4", "mkv"):
        picture = ["-f", "lavfi", "-i", "color=size=32x32:duration=22"]
    command = ["ffmpeg", "-v", "error", "-i", wav, *picture, "-c:a", codec, f"file:{path}"]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)
    file = open_audio(str(path))
    whole = read(wav)
    found = read(path)
    assert abs(len(found) - len(whole)) < 3200
    if ending in ("mkv", "aac"):  # these have neither the length nor the start of the audio
        assert file.seconds is None
        return
    assert (file.decoder, round(file.seconds)) == ("ffmpeg", 20)
    n = min(len(found), len(whole))
    assert np.corrcoef(found[:n], whole[:n])[0, 1] > 0.9
    blocks = read_blocks(file)
    next(blocks)
    blocks.close()  # ffmpeg is killed
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    error_of(cut)


@pytest.mark.slow
@needs_ffmpeg
def test_ffmpeg_that_writes_nothing_is_ended(tmp_path, monkeypatch):
    path = by_ffmpeg(make(tmp_path / "a.wav", 1), tmp_path / "a.m4a")
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(ffmpeg, "STALLED_SECONDS", 0.5)
    assert "0.5 s" in error_of(path)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@needs_ffmpeg
def test_wav_of_an_unknown_codec_is_reported(tmp_path):
    path = make(tmp_path / "a.wav", 1, rate=16000, channels=1)
    content = bytearray(path.read_bytes())
    place = content.index(b"fmt ") + 8
    content[place : place + 2] = b"\x99\x09"
    path.write_bytes(content)
    error_of(path)


@needs_ffmpeg
@pytest.mark.slow
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_file_whose_last_packet_is_not_full_is_read(tmp_path, rate):
    """ffprobe counts the whole last packet of a CAF file."""
    soundfile.write(tmp_path / "a.wav", 0.3 * np.sin(np.arange(10 * rate) / 5), rate)
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-i",
        tmp_path / "a.wav",
        "-c:a",
        "alac",
        tmp_path / "a.caf",
    ]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)
    assert len(read(tmp_path / "a.caf")) == 10 * 16000
    content = (tmp_path / "a.caf").read_bytes()
    (tmp_path / "half.caf").write_bytes(content[: len(content) // 2])
    error_of(tmp_path / "half.caf")


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("has_tags", [True, False])
def test_file_of_several_mp3s_is_read_completely_or_rejected(tmp_path, monkeypatch, has_tags):
    """ffmpeg stops at an ID3 tag between two of them."""
    how = ["-q:a", "4", "-id3v2_version", "3" if has_tags else "0"]
    soundfile.write(tmp_path / "a.wav", vowels(5), 16000)
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", *how, tmp_path / "one.mp3"]
    subprocess.run(command, check=True, timeout=60, stdin=subprocess.DEVNULL)
    one = (tmp_path / "one.mp3").read_bytes()
    (tmp_path / "two.mp3").write_bytes(one * 2)
    expected = len(read(tmp_path / "a.wav"))
    assert len(read(tmp_path / "one.mp3")) == pytest.approx(expected, abs=0.1 * 16000)
    if has_tags:
        assert "two.mp3" in error_of(tmp_path / "two.mp3")
    else:
        assert len(read(tmp_path / "two.mp3")) == pytest.approx(2 * expected, abs=0.2 * 16000)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "ffmpeg" in error_of(tmp_path / "two.mp3")
    read(tmp_path / "one.mp3")


@pytest.mark.slow
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
def test_file_with_an_unreliable_length_is_read_completely(tmp_path, monkeypatch, name, how):
    """ffmpeg writes the file into a pipe, where it cannot correct the length in the header."""
    noise = np.random.default_rng(0).normal(0, 0.2 if name == "loud.mp3" else 1e-4, 8000)
    soundfile.write(tmp_path / "a.wav", np.concatenate([noise, vowels(9)]), 16000)
    if "-f" not in how:
        how = [*how, "-f", "mp3"]
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", *how, "-"]
    made = subprocess.run(
        command, check=True, timeout=60, stdin=subprocess.DEVNULL, capture_output=True
    ).stdout
    copies = 2 if name == "chained.opus" else 1
    (tmp_path / name).write_bytes(made * copies)
    assert open_audio(str(tmp_path / name)).seconds is None
    expected = copies * len(read(tmp_path / "a.wav"))
    assert len(read(tmp_path / name)) == pytest.approx(expected, abs=0.2 * 16000)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "ffmpeg" in error_of(tmp_path / name)


def test_missing_ffmpeg_is_reported(tmp_path, monkeypatch):
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    message = error_of(tmp_path / "a.m4a")
    assert "wav, flac, mp3, ogg, opus, aiff, au, caf, w64" in message
    assert "ffmpeg" in message


@pytest.mark.parametrize("with_ffmpeg", [pytest.param(True, marks=needs_ffmpeg), False])
def test_files_without_audio_are_reported(tmp_path, monkeypatch, with_ffmpeg):
    if not with_ffmpeg:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.txt").write_text("nothing to hear\n" * 50)
    (tmp_path / "text.wav").write_text("nothing to hear\n" * 50)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    assert "0 bytes" in error_of(tmp_path / "empty.wav")
    assert "ffmpeg" in error_of(tmp_path / "text.txt")
    assert "ffmpeg" in error_of(tmp_path / "text.wav")
    assert os.strerror(errno.ENOENT) in error_of(tmp_path / "no.wav")
    assert "samples" in error_of(tmp_path / "none.wav")


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["wav", "aiff", "au", "w64", "caf", "flac", "mp3"])
def test_truncated_file_is_reported(tmp_path, ending):
    path = make(tmp_path / f"a.{ending}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    error_of(path)


@pytest.mark.parametrize(
    "kind", ["AVR", "IRCAM", "MAT4", "MAT5", "MPC2K", "PAF", "PVF", "WVE", "XI"]
)
def test_format_without_a_reliable_length_is_rejected(tmp_path, kind):
    path = tmp_path / "a.x"
    samples = vowels(1, rate=8000)
    subtype = {"WVE": "ALAW", "XI": "DPCM_16"}.get(kind, "PCM_16")
    soundfile.write(path, samples, 8000, format=kind, subtype=subtype)
    assert kind in error_of(path)


@pytest.mark.parametrize(
    ("rate", "channels", "subtype"),
    [(16000, 1, "PCM_16"), (48000, 2, "PCM_24"), (8000, 1, "ULAW"), (44100, 2, "FLOAT")],
)
def test_flipped_bits_in_the_format_of_a_wav_file_change_no_length(
    tmp_path, rate, channels, subtype
):
    path = make(tmp_path / "a.wav", 1, rate=rate, channels=channels, subtype=subtype)
    length = len(read(path))
    content = path.read_bytes()
    place = content.index(b"fmt ") + 8
    accepted = 0
    for bit in range(16, 128):  # of the channels, rates and sizes
        changed = bytearray(content)
        changed[place + bit // 8] ^= 1 << bit % 8
        try:
            file = open_audio("a.wav", bytes(changed))
            samples = sum(map(len, read_blocks(file)))
        except UserError:
            continue
        accepted += 1
        assert samples == length, bit
    assert accepted >= 16  # bytes per second may be wrong


@pytest.mark.parametrize("bits", [20, 24])
def test_wav_samples_in_four_bytes_each_are_read_or_rejected(tmp_path, bits):
    path = make(tmp_path / "a.wav", 1, rate=16000, channels=1, subtype="PCM_32")
    content = bytearray(path.read_bytes())
    place = content.index(b"fmt ") + 8
    content[place + 14] = bits
    path.write_bytes(content)
    if bits == 24:
        assert len(read(path)) == 16000
    else:  # libsndfile would read 21333 samples of noise
        assert "20 bits" in error_of(path)


def joined_file(folder, ending):
    """Write a file of two recordings, and return it with the place of the second one."""
    first = folder / f"first.{ending}"
    content = first.read_bytes()
    path = folder / f"joined.{ending}"
    path.write_bytes(content + content)
    return path, len(content)


@pytest.mark.parametrize("ending", ["wav", "rf64", "aiff", "au", "w64", "caf", "flac"])
def test_file_of_several_recordings_is_reported(tmp_path, ending):
    make(tmp_path / f"first.{ending}", seconds=2)
    path, place = joined_file(tmp_path, ending)
    assert str(place) in error_of(path)


@pytest.mark.parametrize("second", ["wav", "flac", "w64", "aiff"])
@pytest.mark.parametrize("first", ["ogg", "flac", "mp3", "aiff", "au", "caf", "rf64"])
def test_file_of_recordings_in_two_formats_is_reported(tmp_path, first, second):
    path = make(tmp_path / f"a.{first}", seconds=0.5, channels=1)
    content = path.read_bytes()
    path.write_bytes(content + make(tmp_path / f"b.{second}", seconds=0.5).read_bytes())
    assert f"byte {len(content)}" in error_of(path)


@needs_ffmpeg
@pytest.mark.slow
def test_two_recordings_in_ogg_flac_are_read_completely(tmp_path):
    path = by_ffmpeg(
        make(tmp_path / "a.wav", seconds=1, rate=16000), tmp_path / "a.oga", "-c:a", "flac"
    )
    path.write_bytes(path.read_bytes() * 2)
    assert len(read(path)) == 32000


def test_ogg_after_another_recording_is_reported(tmp_path):
    path = make(tmp_path / "a.flac", seconds=0.5, channels=1)
    content = path.read_bytes()
    path.write_bytes(content + make(tmp_path / "b.ogg", seconds=0.5).read_bytes())
    assert f"byte {len(content)}" in error_of(path)


@pytest.mark.parametrize("ending", ["flac", "ogg", "caf"])
def test_mp3_after_another_recording_is_reported(tmp_path, ending):
    path = make(tmp_path / f"a.{ending}", seconds=0.5, channels=1)
    content = path.read_bytes()
    tag = b"ID3\4\0\0\0\0\0\4tags"
    path.write_bytes(content + tag + make(tmp_path / "b.mp3", seconds=0.5).read_bytes())
    assert f"byte {len(content)}" in error_of(path)


def test_tags_around_a_recording_are_no_second_recording(tmp_path):
    path = make(tmp_path / "a.flac", seconds=0.5, rate=16000, channels=1)
    tag = b"ID3\4\0\0\0\0\4\0" + bytes(512)
    path.write_bytes(tag + path.read_bytes() + tag)
    assert len(read(path)) == 8000


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("codec", ["flac", "tta", "wavpack"])
def test_codec_header_in_a_container_is_no_second_recording(tmp_path, codec):
    source = make(tmp_path / "a.wav", seconds=2, rate=16000)
    path = by_ffmpeg(source, tmp_path / "a.mka", "-c:a", codec, "-strict", "-2")
    assert len(read(path)) == 32000


@pytest.mark.parametrize("ending", ["au", "snd", "vox", "gsm"])
def test_content_is_not_taken_for_audio_because_of_its_name(tmp_path, ending):
    """libsndfile reads any bytes in a file of these names, for example an error page."""
    path = tmp_path / f"page.{ending}"
    path.write_text("<html>404 not found</html>\n" * 33)
    assert "header" in error_of(path)


def test_gsm_without_a_header_is_checked_frame_by_frame(tmp_path):
    path = tmp_path / "a.gsm"
    wave = vowels(2, rate=8000)
    soundfile.write(path, wave, 8000, format="RAW", subtype="GSM610")
    assert abs(len(read(path)) - 32000) < 640
    content = path.read_bytes()
    for damaged in (content[:-5], content[:50] + content[55:] + bytes(5)):
        path.write_bytes(damaged)
        error_of(path)


def test_git_lfs_pointer_in_memory_names_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
    with pytest.raises(UserError, match=r"'a\.wav'.*git-LFS") as error:
        open_audio("a.wav", pointer)
    assert tmp_path.name not in str(error.value)
    (tmp_path / "a.wav").write_bytes(pointer)
    assert str(tmp_path) in error_of(tmp_path / "a.wav")


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("name", ["a.wav", "a.m3u8", "a.ts", "a.txt"])
def test_playlist_does_not_open_another_file(tmp_path, name):
    secret = by_ffmpeg(make(tmp_path / "s.wav", seconds=2), tmp_path / "s.aac")
    for content in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile '{secret}'\n",
        "ffconcat version 1.0\nfile s.aac\n",
    ):
        (tmp_path / name).write_text(content)
        error_of(tmp_path / name)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("ending", ["tta", "wv", "flv", "m4a", "mov"])
def test_file_of_several_recordings_that_only_ffmpeg_reads_is_reported(tmp_path, ending):
    by_ffmpeg(make(tmp_path / "a.wav", seconds=2), tmp_path / f"first.{ending}")
    path, place = joined_file(tmp_path, ending)
    assert str(place) in error_of(path)


def by_ffmpeg(source, path, *options):
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", source, *options, path]
    subprocess.run(command, check=True, timeout=60)
    return path


def with_flipped_bits(path, count=30):
    """Yield a file `count` times, each time with another bit flipped."""
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(len(content), size=count):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        yield path


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_flipped_bit_in_an_ogg_file_is_reported(tmp_path, subtype):
    path = make(tmp_path / "a.ogg", seconds=4, rate=48000, channels=1, subtype=subtype)
    for damaged in with_flipped_bits(path):
        error_of(damaged)


@pytest.mark.slow
def test_missing_page_of_an_ogg_file_is_reported(tmp_path):
    path = make(tmp_path / "a.ogg", seconds=9, rate=48000)
    pages = path.read_bytes().split(b"OggS")
    assert len(pages) > 6
    del pages[4]
    path.write_bytes(b"OggS".join(pages))
    error_of(path)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("ending", ["tta", "wv", "ac3", "mkv"])
def test_flipped_bit_is_reported_where_the_format_has_checksums(tmp_path, ending):
    codec = ["-c:a", "flac"] if ending == "mkv" else []
    path = by_ffmpeg(make(tmp_path / "a.wav", seconds=2), tmp_path / f"a.{ending}", *codec)
    for damaged in with_flipped_bits(path, count=5):
        error_of(damaged)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize(
    ("ending", "options"),
    [("mp2", []), ("aac", []), ("ac3", []), ("mp3", ["-write_xing", "0", "-id3v2_version", "0"])],
)
def test_zeros_within_a_stream_of_frames_are_reported(tmp_path, ending, options):
    path = by_ffmpeg(make(tmp_path / "a.wav", seconds=3), tmp_path / f"a.{ending}", *options)
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + bytes(3000) + content[half + 3000 :])
    error_of(path)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.flac", ["-f", "flac"]),  # written to a pipe, so that it has no sample count
        ("a.mp3", ["-write_xing", "0", "-id3v2_version", "0"]),
        ("a.mka", ["-c:a", "libmp3lame"]),
        ("a.thd", ["-f", "truehd", "-strict", "-2"]),
        ("a.dts", ["-c:a", "dca", "-strict", "-2"]),
        ("a.mp2", []),
        ("a.aac", []),
        ("a.m4a", []),
    ],
)
def test_damaged_bytes_that_a_decoder_notices_are_reported(tmp_path, name, options):
    wave = make(tmp_path / "a.wav", seconds=3, rate=48000)
    path = tmp_path / name
    if name == "a.flac":
        command = ["ffmpeg", "-v", "error", "-i", wave, *options, "-"]
        path.write_bytes(subprocess.run(command, check=True, timeout=60, stdout=-1).stdout)
    else:
        by_ffmpeg(wave, path, *options)
    read(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for share in (0.3, 0.5, 0.7):
        place = round(share * len(content))
        path.write_bytes(content[:place] + rng.bytes(1500) + content[place + 1500 :])
        error_of(path)


@needs_ffmpeg
def test_flac_without_a_count_and_without_its_first_frames_is_reported(tmp_path):
    """FLAC counts its frames, and ffmpeg begins with the first that it finds."""
    wave = make(tmp_path / "a.wav", seconds=3, rate=48000)
    command = ["ffmpeg", "-v", "error", "-i", wave, "-f", "flac", "-"]
    content = subprocess.run(command, check=True, timeout=60, stdout=-1).stdout
    first = content.index(b"\xff\xf8")
    noise = np.random.default_rng(0).bytes(20_000)
    (tmp_path / "a.flac").write_bytes(content[:first] + noise + content[first + len(noise) :])
    error_of(tmp_path / "a.flac")


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("ending", ["m4a", "mka", "ac3"])
def test_channels_that_ffmpeg_reads_are_averaged_as_others_are(tmp_path, ending):
    wave = 0.3 * np.sin(np.arange(48000) / 20)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, wave], 1), 48000)
    path = by_ffmpeg(tmp_path / "a.wav", tmp_path / f"a.{ending}")
    assert np.abs(read(path)[2000:-2000]).max() == pytest.approx(0.3, abs=0.02)


@pytest.mark.slow
@needs_ffmpeg
def test_part_of_a_file_that_ffmpeg_reads_has_its_rate_and_channels(tmp_path):
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 0.1, (3 * 44100, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, 44100, subtype="FLOAT")
    file = open_audio(str(by_ffmpeg(tmp_path / "a.wav", tmp_path / "a.mka", "-c:a", "pcm_f32le")))
    for start, end in [(0.0, None), (0.0, 0.5), (1.2345, 2.5), (2.9, 3.1)]:
        found, rate = read_segment(file, start, end)
        stop = None if end is None else round(end * 44100)
        assert rate == 44100
        np.testing.assert_array_equal(found, wave[round(start * 44100) : stop])
    with pytest.raises(OutsideError):
        read_segment(file, 1.0, 4.0)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("ending", ["mp2", "aac"])
@pytest.mark.parametrize("tag", [b"TAG" + bytes(125), b"APETAGEX" + bytes(500)])
def test_tag_after_a_stream_of_frames_is_not_damage(tmp_path, ending, tag):
    path = by_ffmpeg(make(tmp_path / "a.wav", seconds=3), tmp_path / f"a.{ending}")
    path.write_bytes(path.read_bytes() + tag)
    assert len(read(path)) > 2.9 * 16000


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("rate", [32000, 44100, 48000])
@pytest.mark.parametrize("codec", ["ac3", "eac3"])
def test_cut_frame_of_ac3_is_reported(tmp_path, codec, rate):
    path = by_ffmpeg(make(tmp_path / "a.wav", seconds=2), tmp_path / f"a.{codec}", "-ar", str(rate))
    read(path)
    path.write_bytes(path.read_bytes()[:-20])
    error_of(path)


@pytest.mark.parametrize("ending", ["wav", "w64"])
def test_bytes_after_the_audio_are_not_read_as_audio(tmp_path, ending):
    path = make(tmp_path / f"a.{ending}", seconds=1, rate=16000, channels=1)
    content = path.read_bytes()
    path.write_bytes(content + b"garbage " * 1000)
    assert "32000" in error_of(path)
    path.write_bytes(content)
    assert len(read(path)) == 16000


def test_wav_without_a_size_is_read_completely(tmp_path):
    path = make(tmp_path / "a.wav", channels=1)
    whole = read(path)
    content = bytearray(path.read_bytes())
    size = content.index(b"data") + 4
    content[4:8] = b"\xff\xff\xff\xff"
    content[size : size + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert (read(path) == whole).all()


def test_invalid_samples_are_reported(tmp_path):
    wave = vowels(12)
    for name, value, message in (
        ("nan", np.nan, "at 10.62 s"),
        ("inf", np.inf, "at 10.62 s"),
        ("loud", 1e30, "1e+30"),
    ):
        wave[170_000] = value
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000, subtype="FLOAT")
        assert message in error_of(tmp_path / f"{name}.wav")


def test_directories_are_replaced_by_their_sorted_audio_files(tmp_path):
    for name in ("b/2.wav", "b/1.FLAC", "a.mp3", "notes.txt", "._a.mp3", "z.m4a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(tmp_path / name) for name in ("a.mp3", "b/1.FLAC", "b/2.wav", "z.m4a")]
    assert find_audio([str(tmp_path)]) == found
    assert find_audio([found[1], str(tmp_path / "b"), "x.y"]) == [found[1], *found[1:3], "x.y"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"/none' .*wav, flac"):
        find_audio([str(tmp_path / "none")])


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_16"])
@pytest.mark.parametrize("samples", [8000, 8001, 70_001])
def test_padding_of_the_last_block_is_not_audio(tmp_path, subtype, samples):
    path = tmp_path / "a.wav"
    soundfile.write(path, 0.3 * np.sin(np.arange(samples) / 5), 16000, subtype=subtype)
    file = open_audio(str(path))
    assert file.seconds == samples / 16000
    assert sum(map(len, read_blocks(file))) == samples
    wave, rate = read_segment(file)
    assert (len(wave), rate) == (samples, 16000)
    assert len(read_segment(file, samples / 16000 - 0.1)[0]) == 1600


@pytest.mark.parametrize("count", [0, 1, 7000, 1 << 31])
def test_wrong_sample_count_does_not_cut_audio(tmp_path, count):
    path = tmp_path / "a.wav"
    soundfile.write(path, 0.3 * np.sin(np.arange(8001) / 5), 16000, subtype="GSM610")
    content = path.read_bytes()
    begin = content.index(b"fact") + 8
    path.write_bytes(content[:begin] + count.to_bytes(4, "little") + content[begin + 4 :])
    assert sum(map(len, read_blocks(open_audio(str(path))))) == 26 * 320


@pytest.mark.slow
@pytest.mark.parametrize("name", ["page.mp3", "page.wav", "page.flac", "page.bin"])
@pytest.mark.parametrize("content", [b"<html>404</html>" * 20, b"ID3\3\0\0\0\0\0!" + b"junk" * 300])
def test_content_that_is_not_audio_is_not_called_a_missing_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(read_blocks(open_audio(str(tmp_path / name))))
    assert "exist" not in str(error.value)
    assert "0x" not in str(error.value)


@pytest.mark.parametrize("name", ["a.raw", "A.RAW", "a.pcm", "a.mp3", os.fsdecode(b"\xe9.raw")])
@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_file_with_a_header_is_read_under_any_name(tmp_path, name, kind):
    wave = vowels(0.5, rate=16000)
    soundfile.write(tmp_path / "a.tmp", wave, 16000, format=kind)
    os.rename(tmp_path / "a.tmp", tmp_path / name)
    np.testing.assert_allclose(read(tmp_path / name), wave, atol=1e-3)
