"""Corrupted weight files are detected before they are used."""

import os
import shutil
import zipfile

import numpy as np
import pytest
import torch

from asrllm.checkpoints.consolidate import consolidate
from asrllm.errors import CorruptedError, UserError
from asrllm.integrity import _verify, verify_weights
from asrllm.models import fingerprint as fingerprint_module
from asrllm.models.auto import read_state
from asrllm.models.fingerprint import fingerprint
from asrllm.training.checkpoint.manifest import manifest_text, read_manifest
from asrllm.training.checkpoint.resume import corruption
from tests.checkpoints.made import write_checkpoint

STATE = {
    "projector.a": torch.arange(35.0).view(7, 5),
    "projector.b": torch.ones(13),
    "llm.c": torch.zeros(3, 4),
}


def flipped(content: bytes, place: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << place % 8
    return bytes(changed)


def test_path_may_have_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"w\xff.pt")
    with open(path, "wb") as file:
        torch.save({"a": torch.ones(2)}, file)
    verify_weights(path)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_flipped_bit_is_detected_or_changes_nothing(tmp_path, name):
    path = consolidate(write_checkpoint(tmp_path / "checkpoint-1", STATE), tmp_path / name)
    verify_weights(path)
    content = path.read_bytes()
    for place in range(0, len(content), 31):
        changed = (
            tmp_path / f"{place}{path.suffix}"
        )  # a new name, because a file is verified only once
        changed.write_bytes(flipped(content, place))
        try:
            state = read_state(changed)
        except UserError:
            continue
        assert state.keys() == STATE.keys(), place
        assert all(torch.equal(state[key], tensor) for key, tensor in STATE.items()), place


@pytest.mark.slow
def test_archive_that_torch_would_not_read_is_rejected(tmp_path):
    """zipfile and torch.load differ in what they ignore of the directory at the end."""
    path = tmp_path / "w.pt"
    torch.save({"state": STATE, "step": 8}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        begin = archive.start_dir
    rejected = 0
    for bit in range(8 * begin, 8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        _verify.cache_clear()  # the time of the change may be the same
        try:
            verify_weights(path)
        except CorruptedError:
            rejected += 1
            continue
        state = torch.load(path, weights_only=True)["state"]
        assert all(torch.equal(state[key], tensor) for key, tensor in STATE.items()), bit
    assert rejected > 1000


def test_changed_file_is_verified_again(tmp_path):
    path = consolidate(
        write_checkpoint(tmp_path / "checkpoint-1", STATE), tmp_path / "w.safetensors"
    )
    verify_weights(path)
    content = path.read_bytes()
    path.write_bytes(flipped(content, len(content) - 1))
    with pytest.raises(CorruptedError, match=rf"'{path}' .*SHA-256"):
        verify_weights(path)


def test_compressed_record_is_rejected_without_unpacking(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data/0", bytes(1 << 20))
    with pytest.raises(CorruptedError, match=r"/w\.pt' .*'w/data/0' .*compressed"):
        verify_weights(tmp_path / "w.pt")


def test_safetensors_without_a_checksum_are_accepted(tmp_path):
    from safetensors.torch import save_file

    save_file(STATE, tmp_path / "w.safetensors")
    verify_weights(tmp_path / "w.safetensors")


# --- base models ---


def test_fingerprint_depends_on_every_byte(tmp_path):
    path = consolidate(write_checkpoint(tmp_path / "checkpoint-1", STATE), tmp_path / "model.pt")
    content = path.read_bytes()
    original = fingerprint(path)
    path.write_bytes(flipped(content, content.index(STATE["projector.a"].numpy().tobytes())))
    with pytest.raises(CorruptedError):
        fingerprint(path)
    other = consolidate(
        write_checkpoint(tmp_path / "checkpoint-2", STATE | {"llm.c": torch.ones(3, 4)}),
        tmp_path / "o.pt",
    )
    path.write_bytes(other.read_bytes())
    assert fingerprint(path) != original
    path.write_bytes(content)
    assert fingerprint(path) == original


def test_fingerprint_of_a_large_file_is_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint_module, "CACHED_ABOVE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "model.safetensors"
    shutil.copyfile(
        consolidate(write_checkpoint(tmp_path / "checkpoint-1", STATE), tmp_path / "w.safetensors"),
        path,
    )
    first = fingerprint(path)
    monkeypatch.setattr(
        fingerprint_module, "file_sha256", lambda file: pytest.fail("the file was read again")
    )
    assert fingerprint(path) == first
    monkeypatch.undo()
    monkeypatch.setattr(fingerprint_module, "CACHED_ABOVE", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = path.read_bytes()
    path.write_bytes(flipped(content, len(content) - 1))
    os.utime(path, ns=(1, 1))
    with pytest.raises(CorruptedError):
        fingerprint(path)


def test_fingerprint_is_computed_without_a_writable_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint_module, "CACHED_ABOVE", 0)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = consolidate(
        write_checkpoint(tmp_path / "checkpoint-1", STATE), tmp_path / "w.safetensors"
    )
    assert fingerprint(path).startswith("sha256:")


@pytest.mark.parametrize("ranks", [0, 2])
def test_every_kind_of_checkpoint_corruption_is_detected(tmp_path, ranks):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1", STATE, ranks=ranks)
    manifest = read_manifest(checkpoint)
    (checkpoint / "asrllm.json").write_text(manifest_text(manifest))
    assert corruption(checkpoint) is None
    generator = np.random.default_rng(0)
    for path in sorted(checkpoint.iterdir()):
        content = path.read_bytes()
        harmless = 0
        for place in generator.integers(len(content), size=40):
            # another file each time, because a file is verified only once
            path.unlink()
            path.write_bytes(flipped(content, int(place)))
            os.utime(path, ns=(int(place), int(place)))
            harmless += corruption(checkpoint) is None
        # e.g. bytes between the records of a .pt file, or spaces in the JSON
        assert harmless < 30, path
        tensors = content.find(STATE["projector.a"].numpy().tobytes()[:16])
        if tensors > 0:
            path.write_bytes(flipped(content, tensors))
            assert corruption(checkpoint) is not None
        path.unlink()
        assert path.name == "asrllm.json" or "is missing" in str(corruption(checkpoint))
        path.write_bytes(content)
    assert corruption(checkpoint) is None
