"""Consolidation needs little memory, and rejects files that do not belong to the checkpoint."""

import errno
import json
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from asrllm.checkpoints.average import mean_weights
from asrllm.checkpoints.consolidate import checkpoint_weights, consolidate
from asrllm.errors import CorruptedError, UserError
from asrllm.models.auto import read_state
from asrllm.tensor_files import PIECE, begin_of_record, read_about, write_file
from asrllm.training.checkpoint.zero_files import file_digest
from tests.checkpoints.made import write_checkpoint
from tests.conftest import REPOSITORY, clean_environment


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "projector.a": (7, 5),
        "projector.b": (13,),
        "projector.scale": (1,),
        "llm.c": (3, 4, 2),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("ranks", [0, 1, 3])
@pytest.mark.parametrize("output", ["w.pt", "w.bin", "w.safetensors", "one", "many"])
def test_every_output_format_has_the_same_weights(tmp_path, state, ranks, output):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1", state, ranks=ranks)
    made = consolidate(
        checkpoint, tmp_path / output, max_shard_size=150 if output == "many" else "5GB"
    )
    found = read_state(made)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["checkpoint-1", output])
    if output == "many":
        assert len(list(made.glob("model-*.safetensors"))) > 1


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("output", ["w.pt", "w.safetensors", "many"])
def test_weights_that_are_not_finite_are_not_written(tmp_path, state, ranks, output):
    state["projector.b"][4] = float("-inf")
    diverged = write_checkpoint(tmp_path / "checkpoint-2", state, ranks=ranks, step=2)
    state["projector.b"][4] = 0
    intact = write_checkpoint(tmp_path / "checkpoint-1", state, ranks=ranks)

    def average(path):
        write_file(mean_weights([intact, diverged]), path)

    for write in (partial(consolidate, diverged), average):
        with pytest.raises(UserError) as caught:
            write(tmp_path / output)
        assert not isinstance(caught.value, CorruptedError)
        assert "'projector.b'" in str(caught.value)
        assert repr(str(diverged)) in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_nan_of_changed_bytes_is_reported_as_corruption(tmp_path, state):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1", state)
    path = checkpoint / "mp_rank_00_model_states.pt"
    original = state["projector.b"].numpy().tobytes()
    changed = torch.full((13,), float("nan")).numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(original, changed))
    with pytest.raises(CorruptedError, match=path.name):
        consolidate(checkpoint, tmp_path / "w.pt")


def test_output_names_its_source_checkpoint(tmp_path, state):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-7", state, step=7)
    for name in ("w.pt", "w.safetensors"):
        about = read_about(consolidate(checkpoint, tmp_path / name))
        assert [(source["checkpoint"], source["step"]) for source in about["sources"]] == [
            ("checkpoint-7", 7)
        ]
    assert load_file(tmp_path / "w.safetensors").keys() == state.keys()


def checksums(path):
    """Return the checksum in the central directory and the data descriptor of every tensor."""
    found = []
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        assert archive.testzip() is None
        for record in archive.infolist():
            if "/data/" in record.filename:
                file.seek(begin_of_record(file, record.header_offset) + record.file_size)
                found.append((record.CRC, file.read(16) if record.file_size else b""))
    return found


def test_checksums_match_those_of_torch_save(tmp_path, state):
    state |= {"llm.empty": torch.empty(0), "llm.large": torch.ones(PIECE + 3)}
    made = consolidate(write_checkpoint(tmp_path / "checkpoint-1", state), tmp_path / "w.pt")
    torch.save(state, tmp_path / "theirs.pt")
    assert checksums(made) == checksums(tmp_path / "theirs.pt")


def test_missing_truncated_or_foreign_rank_file_is_named(tmp_path, state):
    other = write_checkpoint(
        tmp_path / "checkpoint-2", {name: tensor + 1 for name, tensor in state.items()}, ranks=2
    )
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    for number, corrupt in enumerate(
        (
            lambda path: path.unlink(),
            lambda path: path.write_bytes(path.read_bytes()[:-200]),
            lambda path: shutil.copyfile(other / name, path),
        )
    ):
        checkpoint = write_checkpoint(tmp_path / f"{number}" / "checkpoint-1", state, ranks=2)
        corrupt(checkpoint / name)
        with pytest.raises(UserError, match=rf"'{checkpoint / name}'"):
            consolidate(checkpoint, tmp_path / "w.pt")
    assert not (tmp_path / "w.pt").exists()


def test_checkpoint_removed_during_reading_is_reported(tmp_path, state):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1", state, ranks=2)
    source = checkpoint_weights(checkpoint)
    shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match=rf"'{checkpoint}/.*trainer\.keep_last_k"):
        source.check()


def test_unreadable_file_is_not_reported_as_corrupted(tmp_path, state, monkeypatch):
    def rejected(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    checkpoint = write_checkpoint(tmp_path / "checkpoint-1", state)
    monkeypatch.setattr("asrllm.training.checkpoint.zero_files.file_digest", rejected)
    with pytest.raises(UserError, match=r"model_states\.pt' .*\(Permission denied\)"):
        checkpoint_weights(checkpoint)


@pytest.mark.parametrize("output", ["w.pt", "w.safetensors", "w"])
@pytest.mark.parametrize(
    ("ranks", "name"),
    [(0, "mp_rank_00_model_states.pt"), (2, "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")],
)
def test_changed_bytes_are_detected(tmp_path, state, ranks, name, output):
    checkpoint = write_checkpoint(tmp_path / "checkpoint-1", state, ranks=ranks)
    content = (checkpoint / name).read_bytes()
    at = content.index(state["projector.b"][-5:].numpy().tobytes()[:16])
    (checkpoint / name).write_bytes(content[:at] + bytes(8) + content[at + 8 :])
    with pytest.raises(CorruptedError, match=f"'{checkpoint / name}' .*checksum"):
        consolidate(checkpoint, tmp_path / output)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("ranks", [0, 2])
def test_master_weights_of_another_dtype_are_rejected(tmp_path, state, ranks):
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint-1",
        {name: tensor.double() for name, tensor in state.items()},
        ranks=ranks,
    )
    with pytest.raises(UserError, match=rf"'{checkpoint}' .*torch\.float64.*float32"):
        checkpoint_weights(checkpoint)


def test_non_contiguous_tensors_are_read(tmp_path, state):
    turned = {name: tensor.mT if tensor.ndim > 1 else tensor for name, tensor in state.items()}
    found = checkpoint_weights(write_checkpoint(tmp_path / "checkpoint-1", turned)).load()
    assert all(torch.equal(found[name], tensor) for name, tensor in turned.items())


def test_pickle_with_other_classes_is_rejected(tmp_path, state):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    checkpoint = write_checkpoint(tmp_path / "checkpoint-1", state)
    file = checkpoint / "mp_rank_00_model_states.pt"
    torch.save({"module": state, "optimizer": Harm()}, file)
    manifest = json.loads((checkpoint / "asrllm.json").read_text())
    (checkpoint / "asrllm.json").write_text(
        json.dumps(manifest | {"files": {file.name: file_digest(file)}})
    )
    with pytest.raises(UserError, match=rf"'{file}' .* print "):
        checkpoint_weights(checkpoint)


@pytest.mark.parametrize("ranks", [0, 2])
def test_keys_and_shapes_must_match_the_manifest(tmp_path, state, ranks):
    def with_trainable(number, change):
        checkpoint = write_checkpoint(tmp_path / str(number) / "checkpoint-1", state, ranks=ranks)
        manifest = json.loads((checkpoint / "asrllm.json").read_text())
        change(manifest)
        (checkpoint / "asrllm.json").write_text(json.dumps(manifest))
        return checkpoint

    wrong_shape = with_trainable(
        1, lambda manifest: manifest["trainable"]["projector.a"].update(shape=[7, 6])
    )
    with pytest.raises(UserError, match=rf"'{wrong_shape}' .*'projector\.a' .*\[7, 6\]"):
        checkpoint_weights(wrong_shape).load()
    more = with_trainable(
        2,
        lambda manifest: manifest["trainable"].update(
            {"llm.d": {"shape": [2], "dtype": "float32"}}
        ),
    )
    with pytest.raises(UserError, match=rf"'{more}' .*'llm\.d' .*manifest"):
        checkpoint_weights(more)


MEASURED = """
import sys
import threading
from asrllm.checkpoints.average import mean_weights
from asrllm.checkpoints.consolidate import checkpoint_weights, consolidate
from asrllm.tensor_files import write_file
from pathlib import Path

# Anonymous memory. Pages of mapped files do not count, because the system can drop them.
def current():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def watch():
    while not done.wait(0.002):
        peaks.append(current())

folder = Path(sys.argv[1])
# imports modules that are loaded on first use
consolidate(folder / "small" / "checkpoint-1", folder / "small.safetensors")
before = current()
peaks = []
done = threading.Event()
threading.Thread(target=watch).start()
for output in ("a.pt", "a.safetensors", "a"):
    consolidate(folder / "checkpoint-1", folder / output)
write_file(mean_weights([folder / f"checkpoint-{n}" for n in (1, 2, 3)]), folder / "mean.pt")
done.set()
print(max(peaks) - before)
"""


@pytest.mark.longest(60, reason="writes and reads 280 MB of weights")
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's")
def test_memory_does_not_grow_with_the_model(tmp_path, state):
    """The limit for 280 MB of weights, the largest of 32 MB, is 100 MB."""
    write_checkpoint(tmp_path / "small" / "checkpoint-1", state, ranks=2)
    large = {f"llm.{i}": torch.full((2048, 4096), float(i)) for i in range(8)} | {
        "llm.odd": torch.ones(3_000_001)
    }
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / f"checkpoint-{step}", large, ranks=2, step=step)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=clean_environment(),
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < 100
    mean = torch.load(tmp_path / "mean.pt", weights_only=True, mmap=True)
    assert torch.equal(mean["llm.5"], large["llm.5"])
