"""Text files that are made to exhaust memory or time."""

import gzip
import tracemalloc
import zlib

import pytest

from asrllm.data.sources import SOURCES
from asrllm.data.sources import files as files_module
from asrllm.data.sources.files import count_lines
from asrllm.errors import UserError
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


@pytest.mark.parametrize("source", ["cuts", "nemo", "wenet", "slam", "swift"])
def test_a_gzip_bomb_is_rejected_with_bounded_memory(bomb, source):
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"bomb\.jsonl\.gz' .* 20 times"):
            list(SOURCES[source].read(bomb))
        assert SOURCES[source].count(bomb) is None
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


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


def test_deeply_nested_configurations_are_reported(tmp_path):
    path = tmp_path / "file"
    path.write_text("[" * 5000)
    for read in (read_json_object, read_yaml):
        with pytest.raises(UserError, match=f"{path}.* nested"):
            read(path, "the file")
