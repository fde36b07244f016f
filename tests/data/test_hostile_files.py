"""Text files that are made to exhaust memory or time."""

import gzip
import json
import os
import tarfile
import tracemalloc
import zlib

import pytest
import soundfile

from asrllm.data.audio_files import open_audio
from asrllm.data.index import open_index
from asrllm.data.shards import write_shards
from asrllm.data.sources import SOURCES, RejectedError, json_rows
from asrllm.data.sources import files as files_module
from asrllm.data.sources.files import count_lines
from asrllm.data.verify import index_tars
from asrllm.errors import UserError
from asrllm.testing import kaldi_directory, tone, tone_sentences
from asrllm.text_files import read_json_object, read_yaml

DEEP = 100_000


@pytest.fixture
def bomb(tmp_path, monkeypatch):
    """A gzip file of 100 kB that unpacks to 100 MB, while 1 MB is allowed."""
    monkeypatch.setattr(files_module, "MAX_UNPACKED", 1 << 20)
    monkeypatch.setattr(files_module, "MAX_UNPACKED_RATIO", 20)
    path = tmp_path / "bomb.jsonl.gz"
    packer = zlib.compressobj(wbits=31)
    with open(path, "wb") as file:
        for _ in range(100):
            file.write(packer.compress(bytes(1 << 20)))
        file.write(packer.flush())
    return path


@pytest.mark.slow
@pytest.mark.parametrize("source", ["cuts", "nemo", "wenet", "slam", "swift"])
def test_a_gzip_bomb_is_rejected_with_bounded_memory(bomb, source):
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"bomb\.jsonl\.gz' .* 1048576 bytes"):
            list(SOURCES[source].read(bomb))
        assert SOURCES[source].count(bomb) is None
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_many_lines_that_unpack_to_much_are_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "MAX_UNPACKED", 1 << 20)
    monkeypatch.setattr(files_module, "MAX_UNPACKED_RATIO", 20)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress((b" " * 999 + b"\n") * 2000))
    with pytest.raises(UserError, match=r"bomb\.jsonl\.gz' .* 20 times"):
        list(SOURCES["nemo"].read(path))


def test_a_gzip_file_of_blank_lines_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "MAX_UNPACKED", 1 << 20)
    path = tmp_path / "manifest.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n" * 1_000_000))
    with pytest.raises(UserError, match="manifest"):
        list(SOURCES["nemo"].read(path))


@pytest.mark.parametrize(("begin", "value", "end"), [("[", "{},", "{}]"), ('{"a":[', "0,", "0]}")])
def test_a_gzip_file_of_many_small_values_is_rejected_before_it_is_parsed(
    tmp_path, monkeypatch, begin, value, end
):
    monkeypatch.setattr(files_module, "MAX_UNPACKED", 1 << 20)
    monkeypatch.setattr(json_rows, "DECODER", None)
    path = tmp_path / "manifest.jsonl.gz"
    path.write_bytes(gzip.compress((begin + 100_000 * value + end).encode()))
    with pytest.raises(UserError, match=r"manifest\.jsonl\.gz' .* memory"):
        list(SOURCES["nemo"].read(path))


def test_a_highly_compressible_manifest_is_read(tmp_path):
    path = tmp_path / "manifest.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"audio_filepath": "a.wav", "text": "one"}\n' * 20_000))
    assert count_lines(path) == 20_000


@pytest.mark.parametrize("source", ["cuts", "nemo", "wenet", "slam", "swift"])
@pytest.mark.parametrize("begin", ["[", '{"a":'])
def test_deeply_nested_json_is_reported(tmp_path, source, begin):
    path = tmp_path / "manifest.jsonl"
    path.write_text(begin * DEEP)
    if begin == "[":
        with pytest.raises(UserError, match=r"manifest\.jsonl"):
            list(SOURCES[source].read(path))
    else:
        (utterance,) = SOURCES[source].read(path)
        assert utterance.problem[0] == "bad_json"
        assert "manifest.jsonl:1" in utterance.problem[1]


@pytest.mark.slow
def test_deeply_nested_configurations_are_reported(tmp_path):
    path = tmp_path / "file"
    path.write_text("[" * 2000)
    for read in (read_json_object, read_yaml):
        with pytest.raises(UserError, match=f"{path}.* nested"):
            read(path, "the file")


def test_yaml_whose_aliases_expand_exponentially_is_rejected(tmp_path):
    lines = ["- &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"- &a{i} [{', '.join(9 * [f'*a{i - 1}'])}]" for i in range(1, 30)]
    path = tmp_path / "file.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"file\.yaml' has aliases"):
        read_yaml(path, "the file")
    path.write_text("&a [*a]")
    with pytest.raises(UserError, match=r"file\.yaml' has aliases"):
        read_yaml(path, "the file")


def test_yaml_with_many_values_or_a_few_aliases_is_read(tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text("a: &a [x, y]\nb: *a\nc: {d: *a}\n")
    assert read_yaml(path, "the file") == {"a": ["x", "y"], "b": ["x", "y"], "c": {"d": ["x", "y"]}}
    path.write_text("- [x]\n" * 11_000)
    assert len(read_yaml(path, "the file")) == 11_000


# --- pipes and git-LFS pointers ---

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("source", ["cuts", "nemo", "wenet", "slam", "swift"])
@pytest.mark.parametrize("kind", ["pipe", "pointer"])
def test_manifest_that_is_a_pipe_or_a_pointer_is_reported(tmp_path, source, kind):
    path = tmp_path / "manifest.jsonl"
    make_special(path, kind)
    assert SOURCES[source].count(path) is None
    with pytest.raises(UserError, match=r"manifest\.jsonl"):
        list(SOURCES[source].read(path))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["wav.scp", "text", "segments"])
@pytest.mark.parametrize("kind", ["pipe", "pointer"])
def test_kaldi_table_that_is_a_pipe_or_a_pointer_is_reported(tmp_path, name, kind):
    folder = kaldi_directory(tmp_path / "k", tone_sentences(2))
    (folder / name).unlink(missing_ok=True)
    make_special(folder / name, kind)
    SOURCES["kaldi"].count(folder)
    with pytest.raises(UserError, match=name):
        list(SOURCES["kaldi"].read(folder))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "pointer"])
def test_tar_that_is_a_pipe_or_a_pointer_is_reported(tmp_path, kind):
    write_shards(
        tmp_path / "s", SOURCES["kaldi"].read(kaldi_directory(tmp_path / "k", tone_sentences(2)))
    )
    tar = tmp_path / "s" / "shard-000000.tar"
    tar.unlink()
    make_special(tar, kind)
    for open_it in (open_index, lambda folder: index_tars([str(folder / tar.name)])):
        with pytest.raises(UserError, match=r"shard-000000\.tar") as error:
            open_it(tmp_path / "s")
        assert ("git lfs pull" in str(error.value)) == (kind == "pointer")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "pointer"])
def test_transcript_that_is_a_pipe_or_a_pointer_rejects_its_utterance(tmp_path, kind):
    soundfile.write(tmp_path / "a.wav", tone("one", 1.0), 16000)
    make_special(tmp_path / "a.txt", kind)
    (utterance,) = SOURCES["folder"].read(tmp_path)
    assert utterance.problem[0] == "no_transcript"
    assert str(tmp_path / "a.txt") in utterance.problem[1]


@pytest.mark.timeout(30)
def test_cut_whose_recording_is_a_pipe_is_rejected(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    source = {"type": "file", "channels": [0], "source": str(tmp_path / "a.wav")}
    sizes = {"sampling_rate": 16000, "num_samples": 16000, "duration": 1.0}
    recording = {"id": "r", "sources": [source], **sizes}
    supervision = {"id": "s", "recording_id": "r", "start": 0, "duration": 1.0, "text": "one"}
    cut = {"id": "c", "start": 0, "duration": 1.0, "channel": 0, "type": "MonoCut"}
    row = cut | {"recording": recording, "supervisions": [supervision]}
    (tmp_path / "cuts.jsonl").write_text(json.dumps(row) + "\n")
    (utterance,) = SOURCES["cuts"].read(tmp_path / "cuts.jsonl")
    with pytest.raises(RejectedError, match=r"a\.wav"):
        utterance.load()


def test_audio_that_is_a_pointer_is_reported(tmp_path):
    make_special(tmp_path / "a.wav", "pointer")
    with pytest.raises(UserError, match=r"a\.wav.*git lfs pull"):
        open_audio(str(tmp_path / "a.wav"))


def make_special(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(POINTER)


def test_line_break_in_a_key_is_escaped_in_the_message(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("u\nb.wav", "u\nb.json"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=r"u\\nb") as error:
        index_tars([str(path)])
    assert len(str(error.value).splitlines()) == 3
