"""The length of a file against what its header, its last frame or its index promises."""

import shutil
import subprocess

import numpy as np
import pytest
import soundfile

from asrllm.data.audio_files import open_audio, read_blocks
from asrllm.errors import UserError

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
SECONDS = 2.0037  # so that the last block, frame or packet is not full
# ending, options of ffmpeg
DECLARED = [
    ("voc", ["-c:a", "pcm_s16le"]),
    ("sox", []),
    ("adx", []),
    ("avi", ["-c:a", "pcm_s16le"]),
    ("rm", ["-c:a", "ac3"]),
    ("nut", ["-c:a", "mp2"]),
    ("dtshd", []),
]
FRAMES = [
    ("mp2", []),
    ("sbc", []),
    ("thd", ["-f", "truehd"]),
    ("mlp", []),
    ("dts", []),
    ("ts", ["-c:a", "mp2"]),
    ("m2ts", ["-c:a", "ac3"]),
    ("mpg", ["-c:a", "mp2"]),
]
CONTAINERS = [
    ("flac", []),
    ("wav", []),
    ("aiff", []),
    ("caf", []),
    ("au", []),
    ("ogg", []),
    ("mp3", []),
    ("m4a", []),
    ("mov", []),
    ("flv", ["-ar", "44100"]),
    ("tta", []),
    ("wv", []),
    ("ast", []),
    ("xwma", ["-c:a", "wmav2", "-f", "wav"]),
    ("mka", ["-c:a", "flac"]),
    ("webm", ["-c:a", "libopus"]),
]
TAGLESS = [
    ("mp3", ["-write_xing", "0", "-id3v2_version", "0"]),
    ("aac", []),
    ("ac3", []),
    ("sox", []),
    ("mka", ["-c:a", "flac"]),
    ("flac", []),
]


def read(path):
    return np.concatenate(list(read_blocks(open_audio(str(path)))))


def make(folder, name, options, rate=48000):
    """Write noise in a format of ffmpeg."""
    source = folder / "source.wav"
    noise = np.random.default_rng(0).normal(0, 0.1, round(SECONDS * rate))
    soundfile.write(source, noise, rate)
    path = folder / name
    if name.endswith(".dtshd"):
        stream = make(folder, "core.dts", []).read_bytes()
        header = b"DTSHDHDR" + (4).to_bytes(8, "big") + bytes(4)
        path.write_bytes(header + b"STRMDATA" + len(stream).to_bytes(8, "big") + stream)
        return path
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", "-i", source]
    subprocess.run([*command, "-strict", "-2", *options, path], check=True, timeout=60)
    return path


def is_rejected(path):
    with pytest.raises(UserError) as raised:
        read(path)
    return repr(str(path)) in str(raised.value)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize(("ending", "options"), DECLARED)
def test_file_that_is_shorter_than_its_header_is_reported(tmp_path, ending, options):
    path = make(tmp_path, f"a.{ending}", options)
    assert len(read(path)) == pytest.approx(SECONDS * 16000, abs=0.06 * 16000)
    content = path.read_bytes()
    for cut in [*range(len(content) // 2, len(content) // 2 + 9), len(content) - 2000]:
        path.write_bytes(content[:cut])
        assert is_rejected(path)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize(("ending", "options"), FRAMES)
def test_last_frame_that_is_cut_is_reported(tmp_path, ending, options):
    path = make(tmp_path, f"a.{ending}", options)
    assert len(read(path)) == pytest.approx(SECONDS * 16000, abs=0.06 * 16000)
    content = path.read_bytes()
    for cut in (len(content) // 2 // 4 * 4 + 11, len(content) - 5):
        path.write_bytes(content[:cut])
        assert is_rejected(path)


@pytest.mark.slow
@needs_ffmpeg
def test_transport_stream_that_is_cut_between_two_packets_is_reported(tmp_path):
    """Each frame of audio takes several packets of 188 bytes."""
    path = make(tmp_path, "a.ts", ["-c:a", "mp2"])
    content = path.read_bytes()
    path.write_bytes(content[: 188 * (len(content) // 188 * 2 // 3)])
    cut = path.read_bytes()
    start_of_audio = cut[-188 + 1] & 0x40
    assert not start_of_audio
    assert is_rejected(path)


@needs_ffmpeg
def test_flv_that_is_cut_within_the_header_of_a_tag_is_reported(tmp_path):
    """ffmpeg would take the rest for a second stream, and ignore the length of the first."""
    path = make(tmp_path, "a.flv", ["-ar", "44100"])
    content = path.read_bytes()
    offset = 13
    while offset < len(content) // 2:
        offset += 15 + int.from_bytes(content[offset + 1 : offset + 4], "big")
    path.write_bytes(content[: offset + 10])
    assert is_rejected(path)


@needs_ffmpeg
def test_voc_of_several_blocks_has_no_headers_in_its_audio(tmp_path):
    path = make(tmp_path, "a.voc", ["-c:a", "pcm_s16le"], rate=16000)
    expected, _ = soundfile.read(tmp_path / "source.wav", dtype="float32")
    np.testing.assert_array_equal(read(path), expected)


@needs_ffmpeg
def test_voc_with_a_block_of_silence_is_reported(tmp_path):
    path = make(tmp_path, "a.voc", ["-c:a", "pcm_s16le"], rate=16000)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([3, 3, 0, 0, 0xFF, 0xFF, 200, 0]))
    assert is_rejected(path)


def test_voc_of_libsndfile_is_read(tmp_path):
    soundfile.write(tmp_path / "a.voc", np.full(16000, 0.5), 16000)
    np.testing.assert_array_equal(read(tmp_path / "a.voc"), np.full(16000, 0.5, np.float32))


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize(("second", "how"), TAGLESS)
@pytest.mark.parametrize(("first", "options"), CONTAINERS)
def test_stream_after_a_recording_is_reported_or_read(tmp_path, first, options, second, how):
    path = make(tmp_path, f"a.{first}", options)
    alone = len(read(path))
    content = path.read_bytes()
    path.write_bytes(content + make(tmp_path, f"b.{second}", how).read_bytes())
    if first == second and first in ("mp3", "mka"):
        assert len(read(path)) == pytest.approx(2 * alone, abs=0.15 * 16000)
    else:
        assert is_rejected(path)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("tag", [b"TAG" + bytes(125), b"ID3\4\0\0\0\0\x20\0" + b"x" * 4096])
@pytest.mark.parametrize(("first", "options"), CONTAINERS)
def test_tag_after_a_recording_is_accepted(tmp_path, first, options, tag):
    path = make(tmp_path, f"a.{first}", options)
    alone = len(read(path))
    if first in ("wav", "xwma") or (first == "mp3" and tag[:3] == b"ID3"):
        pytest.skip("such files have no tags of this kind")
    path.write_bytes(path.read_bytes() + tag)
    assert len(read(path)) == pytest.approx(alone, abs=1600)


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("form", ["m4a", "caf"])
def test_unknown_part_after_a_recording_is_accepted(tmp_path, form):
    """Telephones and cameras add boxes and chunks of their own."""
    path = make(tmp_path, f"a.{form}", ["-c:a", "alac"])
    alone = len(read(path))
    size = 4096
    header = (size + 8).to_bytes(4, "big") + b"sefd"
    if form == "caf":
        header = b"sefd" + size.to_bytes(8, "big")
    path.write_bytes(path.read_bytes() + header + b"x" * size)
    assert len(read(path)) == alone


@pytest.mark.slow
@needs_ffmpeg
def test_truncated_mp3_with_a_large_picture_is_reported(tmp_path):
    """The header with the length comes after the picture."""
    path = make(tmp_path, "a.mp3", [])
    content = path.read_bytes()
    picture = b"ID3\4\0\0\0\0\x40\0" + bytes(8192)
    path.write_bytes(picture + content[45:])
    assert len(read(path)) == pytest.approx(SECONDS * 16000, abs=0.1 * 16000)
    path.write_bytes(picture + content[45 : len(content) // 2])
    assert is_rejected(path)


def test_every_flac_is_followed_by_nothing(tmp_path):
    """The end of the last frame is found for any number of frames, channels and rates."""
    rng = np.random.default_rng(0)
    for rate, channels, samples in [(16000, 1, 10), (44100, 2, 9 * 44100), (8000, 1, 4096 * 3)]:
        path = tmp_path / f"{rate}.flac"
        soundfile.write(path, rng.normal(0, 0.1, (samples, channels)), rate)
        read(path)
        path.write_bytes(path.read_bytes() + rng.bytes(3000))
        assert is_rejected(path)


@pytest.mark.parametrize(
    "ending", ["g722", "vox", "ul", "ulaw", "al", "alaw", "g726", "g729", "sln", "raw", "pcm"]
)
def test_file_without_a_header_names_a_command_that_converts_it(tmp_path, ending):
    path = tmp_path / f"a.{ending.upper()}"
    path.write_bytes(np.random.default_rng(0).bytes(8000))
    with pytest.raises(UserError, match=r"raw.*(sox|ffmpeg) .*OUT\.wav"):
        read(path)


@needs_ffmpeg
@pytest.mark.parametrize(
    ("ending", "options", "rate"),
    [
        ("g722", ["-c:a", "g722"], 16000),
        ("ul", ["-c:a", "pcm_mulaw", "-f", "mulaw"], 8000),
        ("al", ["-c:a", "pcm_alaw", "-f", "alaw"], 8000),
        ("g726", ["-c:a", "g726", "-f", "g726"], 8000),
    ],
)
def test_command_that_converts_a_file_without_a_header_is_right(tmp_path, ending, options, rate):
    path = make(tmp_path, f"a.{ending}", ["-ar", str(rate), *options])
    with pytest.raises(UserError) as caught:
        read(path)
    words = str(caught.value).partition("example: ")[2].split()
    places = {"IN": str(path), "OUT.wav": str(tmp_path / "out.wav")}
    command = [places.get(word, word) for word in words]
    subprocess.run([*command, "-v", "error"], check=True, timeout=60, stdin=subprocess.DEVNULL)
    assert soundfile.info(tmp_path / "out.wav").samplerate == rate
    assert len(read(tmp_path / "out.wav")) == pytest.approx(SECONDS * 16000, abs=320)


def test_wav_that_is_named_raw_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(16000, 0.5), 16000)
    (tmp_path / "a.wav").rename(tmp_path / "a.vox")
    assert len(read(tmp_path / "a.vox")) == 16000


def amr(bytes_of_frames):
    """Return an AMR file of frames of these sizes, which choose its bitrate, of 20 ms each."""
    rng = np.random.default_rng(0)
    modes = {12: 0, 31: 7}
    frames = [bytes([modes[size] << 3 | 4]) + rng.bytes(size) for size in bytes_of_frames]
    return b"#!AMR\n" + b"".join(frames)


@needs_ffmpeg
@pytest.mark.parametrize("sizes", [[31] * 100 + [12] * 100, [12] * 100 + [31] * 100])
def test_amr_whose_bitrate_changes_is_read_completely(tmp_path, sizes):
    """ffprobe guesses the length from the first bitrate."""
    path = tmp_path / "a.amr"
    path.write_bytes(amr(sizes))
    assert len(read(path)) == pytest.approx(4 * 16000, abs=640)
