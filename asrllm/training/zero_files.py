"""Where a weight, and what the optimizer keeps of it, lies in DeepSpeed's files.

The optimizer's float32 masters are read, not the rounded working copies. Where they lie depends on the stage:
0: whole, in `mp_rank_00_model_states.pt`. 1, 2: one flat vector a parameter group, cut into equal parts over the ranks.
3: every parameter cut into equal parts over the ranks, the last one padded; a rank's parts lie one after another, in sub-groups.
"""

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asrllm.errors import UserError
from asrllm.tensor_files import PIECE

RANK_FILE = re.compile(r".*zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
MASTERS = "fp32"
SHARED = "shared_"  # begins the names of what an optimizer keeps of a group, whatever its size
AVERAGE = "average"  # of the masters, over the training
MODEL_FILES = {0: "mp_rank_00_model_states.pt", 1: "mp_rank_00_model_states.pt", 2: "mp_rank_00_model_states.pt"}
MODEL_FILE_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"


class Place(NamedTuple):
    """Where a parameter begins: in its group's flat vector (stages 1, 2), or in a sub-group's on each rank (3)."""

    group: int
    offset: int


class ZeroFiles:
    """One checkpoint's files, mapped: what is read is what is touched. Raises UserError naming a file that is missing or damaged."""

    def __init__(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        check_files(checkpoint, manifest)
        self.checkpoint, self.manifest = checkpoint, manifest
        self.stage, self.ranks = manifest["zero_stage"], manifest["world_size"]
        self.shapes: dict[str, list[int]] = {name: about["shape"] for name, about in manifest["trainable"].items()}
        self.model = load_file(checkpoint / MODEL_FILES.get(self.stage, MODEL_FILE_3))
        if self.stage != 0:
            del self.model["module"]  # rounded copies, whose objects take room in each of the checkpoints that are averaged
        self.optimizers = [self.model["optimizer"]] if self.stage == 0 else self._optimizers()
        self.averages: list[dict[str, Any]] = []
        self.touched: dict[int, Tensor] = {}  # flat vectors whose pages are in memory, by their address
        self.places = self._places()

    def _optimizers(self) -> list[dict[str, Any]]:
        """The optimizer states of all ranks, in their order."""
        files = {int(match.group(1)): path for path in self.checkpoint.glob("*.pt") if (match := RANK_FILE.fullmatch(path.name))}
        if sorted(files) != list(range(self.ranks)):
            raise UserError(
                f"{self.checkpoint}: optimizer files of ranks {sorted(files)}, but the run had {self.ranks} ranks: it is damaged"
            )
        return [load_file(files[rank])["optimizer_state_dict"] for rank in range(self.ranks)]

    def _places(self) -> dict[str, Place]:
        if self.stage == 0:
            names = [name for group in self.manifest["param_groups"] for name in group]
            return {name: Place(group=i, offset=0) for i, name in enumerate(names)}
        places, group, offset = {}, 0, 0
        for number, named in enumerate(self.model["param_shapes"]):
            if self.stage != 3:
                group, offset = number, 0
            for name, shape in named.items():
                if list(shape) != self.shapes.get(name):
                    raise UserError(f"{self.checkpoint}: {name!r} is {list(shape)}, in its manifest {self.shapes.get(name)}: it is damaged")
                if self.stage == 3 and offset >= self.optimizers[0]["fp32_flat_groups"][group].numel():
                    group, offset = group + 1, 0
                places[name] = Place(group, offset)
                offset += self._stride(shape.numel())
        return places

    def _stride(self, numel: int) -> int:
        """Elements that a parameter takes in a flat vector."""
        return -(-numel // self.ranks) if self.stage == 3 else numel

    @property
    def names(self) -> list[str]:
        return list(self.places)

    def state_keys(self) -> list[str]:
        """What the optimizer keeps of each element, such as exp_avg."""
        state, held = self._state_of(0, 0), self._vector(MASTERS, 0, 0)
        size = held.numel() + (self.optimizers[0]["group_paddings"][0] if self.stage in (1, 2) else 0)
        return [
            key
            for key, value in state.items()
            if isinstance(value, Tensor) and value.ndim and value.numel() == size and not key.startswith(SHARED)
        ]

    def shared_state(self, group: int) -> dict[str, Any]:
        """What the optimizer keeps of a group as a whole, such as its number of steps."""
        elementwise = self.state_keys()
        return {key: value for key, value in self._state_of(0, group).items() if key not in elementwise}

    def _state_of(self, rank: int, group: int) -> dict[str, Any]:
        saved = self.optimizers[rank]
        if self.stage in (1, 2):
            return saved["base_optimizer_state"]["state"].get(group, {})
        return saved["optimizer_state_dict"]["state"].get(group, {}) if "optimizer_state_dict" in saved else saved["state"].get(group, {})

    def _vector(self, key: str, rank: int, group: int) -> Tensor:
        vector = self._find_vector(key, rank, group)
        self.touched[vector.data_ptr()] = vector
        return vector

    def forget(self) -> None:
        """Give back the memory of all that was read; tensors that are views of the files are read again where they are used again."""
        for vector in self.touched.values():
            drop_pages(vector)
        self.touched.clear()

    def _find_vector(self, key: str, rank: int, group: int) -> Tensor:
        """A flat vector of one rank's; at stage 0 a whole parameter."""
        if key == AVERAGE:
            return self._average_of(rank)[group]
        if key != MASTERS:
            return self._state_of(rank, group)[key]
        saved = self.optimizers[rank]
        if self.stage == 0:
            return self._whole_masters()[group]
        return saved["single_partition_of_fp32_groups" if self.stage in (1, 2) else "fp32_flat_groups"][group]

    def _whole_masters(self) -> Sequence[Tensor]:
        groups = self.optimizers[0].get("fp32_groups")
        if groups is None:  # trained in float32: the weights are the masters
            return [self.model["module"][name] for name in self.places]
        return [tensor for group in groups for tensor in group]

    def _average_of(self, rank: int) -> Sequence[Tensor]:
        if not self.averages:
            self.averages = [load_file(self.checkpoint / average_file(number)) for number in range(len(self.optimizers))]
        return self.averages[rank][AVERAGE]

    def read(self, name: str, key: str = MASTERS) -> Tensor:
        """A weight, or what is kept of it, in its shape. Raises UserError where it is missing or of another size."""
        numel = self._numel(name)
        found = self.read_range(name, 0, numel, key)
        self._check_numel(name, found.numel())
        return found.view(self.shapes[name])

    def pieces(self, name: str, key: str = MASTERS) -> Iterator[Tensor]:
        """The same, flat and piece by piece, in memory of its own: nothing of the files, and no piece, is kept while others are read."""
        numel = self._numel(name)
        for start in range(0, max(numel, 1), PIECE):
            yield self._piece(name, start, min(PIECE, numel - start), key)

    def _piece(self, name: str, start: int, numel: int, key: str) -> Tensor:
        piece = self.read_range(name, start, numel, key).clone()
        self.forget()
        self._check_numel(name, start + piece.numel(), start + numel)
        return piece

    def _numel(self, name: str) -> int:
        if name not in self.places:
            raise UserError(f"{self.checkpoint}: {name!r} is missing: the checkpoint is damaged")
        return torch.Size(self.shapes[name]).numel()

    def _check_numel(self, name: str, found: int, expected: int | None = None) -> None:
        if found != (self._numel(name) if expected is None else expected):
            raise UserError(f"{self.checkpoint}: {name!r} has {found} values, its manifest says {self.shapes[name]}: it is damaged")

    def read_range(self, name: str, start: int, numel: int, key: str = MASTERS) -> Tensor:
        """(numel,) of a flattened weight from `start` on."""
        group, offset = self.places[name]
        if self.stage == 0:
            whole = self._vector(key, 0, group).detach().flatten()
            self._check_numel(name, whole.numel())
            return whole[start : start + numel]
        if self.stage == 3:
            pieces = self._pieces(start, numel, self._stride(torch.Size(self.shapes[name]).numel()))
            return torch.cat([self._vector(key, rank, group)[offset + begin : offset + end] for rank, begin, end in pieces])
        part = self._vector(MASTERS, 0, group).numel() + self.optimizers[0]["group_paddings"][group]
        pieces = self._pieces(offset + start, numel, part)
        return torch.cat([self._vector(key, rank, group)[begin:end] for rank, begin, end in pieces])

    def _pieces(self, start: int, numel: int, part: int) -> Iterator[tuple[int, int, int]]:
        """(rank, begin, end) of what each rank has of the stretch, where each has `part` elements of the whole."""
        for rank in range(start // part, -(-(start + numel) // part)):
            yield rank, max(start - rank * part, 0), min(start + numel - rank * part, part)


def average_file(rank: int) -> str:
    return f"average_rank_{rank}.pt"


def file_digest(path: Path) -> str:
    """Of what torch.save wrote, by the checksums in its directory: the tensors are not read."""
    with zipfile.ZipFile(path) as archive:
        records = [(record.filename, record.file_size, record.CRC) for record in archive.infolist()]
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16]


def check_files(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Raises UserError naming a file that is missing, cut short or of another checkpoint."""
    for name, digest in manifest["files"].items():
        file = f"the checkpoint file {str(checkpoint / name)!r}"
        try:
            found = file_digest(checkpoint / name)
        except FileNotFoundError as error:
            raise UserError(f"{file} is missing: copy it again, or remove the checkpoint") from error
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"{file} is cut short or damaged ({error}): copy it again, or remove the checkpoint") from error
        if found != digest:
            raise UserError(f"{file} is of another checkpoint: copy the right one again, or remove the checkpoint")


def drop_pages(tensor: Tensor) -> None:
    """Give back the memory of a tensor that is a view of a file, unchanged (madvise(2), MADV_DONTNEED)."""
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - begin
    ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def load_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"the checkpoint file {str(path)!r} is missing: the checkpoint is damaged")
    try:
        with trusted_unpickling():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"the checkpoint file {str(path)!r} cannot be read: {' '.join(str(error).split())[:200]}") from error


@contextlib.contextmanager
def trusted_unpickling() -> Iterator[None]:
    """torch.load refuses, inside the block, whatever is neither a tensor nor one of DeepSpeed's plain classes."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage_named(kind: Any, name: str) -> Any:
        """Python 3.11.0 to 3.11.3 pickle an enum as getattr(its class, its name); of getattr nothing else is let through."""
        if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"the checkpoint asks for {name!r} of {kind!r}")
        return getattr(ZeroStageEnum, name)

    plain = [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address, (stage_named, "builtins.getattr")]
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(plain):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
