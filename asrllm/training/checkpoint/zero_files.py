"""Where a weight, and what the optimizer keeps of it, lies in DeepSpeed's files.

The optimizer's float32 masters are read, not the rounded working copies. Where they lie depends on the stage:
0: whole, in `mp_rank_00_model_states.pt`. 1, 2: one flat vector a parameter group, cut into equal parts over the ranks.
3: every parameter cut into equal parts over the ranks, the last one padded; a rank's parts lie one after another, in sub-groups.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asrllm.errors import CorruptedError, UserError
from asrllm.integrity import BAD_ARCHIVE
from asrllm.launchers import switched_on
from asrllm.stored_tensors import StoredTensor, read_stored
from asrllm.tensor_files import PIECE

RANK_FILE = re.compile(r".*zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
MASTERS = "fp32"
SHARED = "shared_"  # begins the names of what an optimizer keeps of a group, whatever its size
BY_WEIGHT = (
    "param_slice_mappings",
    "param_alignment_paddings",
)  # what says again, an object a weight, where the weights lie
AVERAGE = "average"  # of the masters, over the training
MODEL_FILES = {
    0: "mp_rank_00_model_states.pt",
    1: "mp_rank_00_model_states.pt",
    2: "mp_rank_00_model_states.pt",
}
MODEL_FILE_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"


class Place(NamedTuple):
    """Where a parameter begins: in its group's flat vector (stages 1, 2), or in a sub-group's on each rank (3); at stage 0 its number."""

    group: int
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class ZeroFiles:
    """One checkpoint's files: where its tensors lie, which are read when they are wanted; it takes next to no memory.

    Raises UserError naming a file that is missing or damaged.
    """

    def __init__(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        check_files(checkpoint, manifest)
        self.checkpoint = checkpoint
        self.stage, self.ranks = manifest["zero_stage"], manifest["world_size"]
        self.model = read_zero_file(checkpoint / MODEL_FILES.get(self.stage, MODEL_FILE_3))
        working = self.model.pop("module", {})
        self.optimizers = [self.model["optimizer"]] if self.stage == 0 else self._optimizers()
        self.masters = [self._masters_of(saved, working, manifest) for saved in self.optimizers]
        self.averages: list[Sequence[StoredTensor]] = []
        self._check_dtypes(working, manifest)
        self.places = self._places(manifest)

    def _optimizers(self) -> list[dict[str, Any]]:
        """The optimizer states of all ranks, in their order."""
        files = {
            int(match.group(1)): path
            for path in self.checkpoint.glob("*.pt")
            if (match := RANK_FILE.fullmatch(path.name))
        }
        if sorted(files) != list(range(self.ranks)):
            raise UserError(
                f"{self.checkpoint}: optimizer files of ranks {sorted(files)}, but the run had {self.ranks} ranks: it is damaged"
            )
        states = []
        for rank in range(self.ranks):
            saved = read_zero_file(files[rank])["optimizer_state_dict"]
            states.append({key: value for key, value in saved.items() if key not in BY_WEIGHT})
        return states

    def _masters_of(
        self, saved: dict[str, Any], working: dict[str, Any], manifest: dict[str, Any]
    ) -> Sequence[StoredTensor]:
        """One rank's flat vectors; at stage 0 whole weights."""
        if self.stage != 0:
            return saved[
                "single_partition_of_fp32_groups" if self.stage in (1, 2) else "fp32_flat_groups"
            ]
        if (
            groups := saved.get("fp32_groups")
        ) is None:  # trained in float32: the weights are the masters
            return [working[name] for group in manifest["param_groups"] for name in group]
        return [tensor for group in groups for tensor in group]

    def _check_dtypes(self, working: dict[str, Any], manifest: dict[str, Any]) -> None:
        for name, about in manifest["trainable"].items():
            if name in working and str(working[name].dtype) != f"torch.{about['dtype']}":
                raise UserError(
                    f"{self.checkpoint}: {name!r} is {working[name].dtype}, in its manifest {about['dtype']}: it is damaged"
                )
        if wrong := {vector.dtype for vectors in self.masters for vector in vectors} - {
            torch.float32
        }:
            raise UserError(
                f"{self.checkpoint}: its master weights are {wrong.pop()} instead of torch.float32: it is damaged"
            )

    def _places(self, manifest: dict[str, Any]) -> dict[str, Place]:
        shapes = {name: tuple(about["shape"]) for name, about in manifest["trainable"].items()}
        if self.stage == 0:
            groups = tuple(
                tuple((name, shapes.get(name, ())) for name in group)
                for group in manifest["param_groups"]
            )
        else:
            groups = tuple(
                tuple((name, tuple(shape)) for name, shape in group.items())
                for group in self.model.pop("param_shapes")
            )
        held = dict(itertools.chain.from_iterable(groups))
        if wrong := sorted(shapes.keys() ^ held.keys()):
            where = "its files alone" if wrong[0] in held else "its manifest alone"
            raise UserError(
                f"{self.checkpoint}: {wrong[0]!r} is in {where}: the checkpoint is damaged"
            )
        for name, shape in held.items():
            if shape != shapes[name]:
                raise UserError(
                    f"{self.checkpoint}: {name!r} is {list(shape)}, in its manifest {list(shapes[name])}: it is damaged"
                )
        return places(
            self.stage, self.ranks, groups, tuple(vector.numel() for vector in self.masters[0])
        )

    def keep_weights_alone(self) -> None:
        """Forget the optimizer's states: of many checkpoints that are open at once they add up."""
        self.model, self.optimizers = {}, []

    def state_keys(self) -> list[str]:
        """What the optimizer keeps of each element, such as exp_avg."""
        size = self.masters[0][0].numel() + (
            self.optimizers[0]["group_paddings"][0] if self.stage in (1, 2) else 0
        )
        return [
            key
            for key, value in self._state_of(0, 0).items()
            if isinstance(value, StoredTensor)
            and value.ndim
            and value.numel() == size
            and not key.startswith(SHARED)
        ]

    def shared_state(self, group: int) -> dict[str, Any]:
        """What the optimizer keeps of a group as a whole, such as its number of steps."""
        elementwise, state = self.state_keys(), self._state_of(0, group)
        return {
            key: v.load() if isinstance(v, StoredTensor) else v
            for key, v in state.items()
            if key not in elementwise
        }

    def _state_of(self, rank: int, group: int) -> dict[str, Any]:
        saved = self.optimizers[rank]
        if self.stage in (1, 2):
            return saved["base_optimizer_state"]["state"].get(group, {})
        return (
            saved["optimizer_state_dict"]["state"].get(group, {})
            if "optimizer_state_dict" in saved
            else saved["state"].get(group, {})
        )

    def _vector(self, key: str, rank: int, group: int) -> StoredTensor:
        """A flat vector of one rank's; at stage 0 a whole weight."""
        if key == MASTERS:
            return self.masters[rank][group]
        return self._averages()[rank][group] if key == AVERAGE else self._state_of(rank, group)[key]

    def _averages(self) -> list[Sequence[StoredTensor]]:
        if not self.averages:
            self.averages = [
                read_zero_file(self.checkpoint / average_file(rank))[AVERAGE]
                for rank in range(len(self.masters))
            ]
        return self.averages

    def check(self, key: str = MASTERS) -> None:
        """Compare what has not been read of the weights with its checksums. Raises UserError naming a file with other bytes."""
        for vectors in self.masters if key == MASTERS else self._averages():
            for vector in vectors:
                vector.storage.check()

    def read(self, name: str, key: str = MASTERS) -> Tensor:
        """A weight, or what is kept of it, in its shape. Raises UserError where it is of another size."""
        place = self.places[name]
        found = self.read_range(name, 0, place.numel, key)
        self._check_numel(name, found.numel(), place.numel)
        return found.view(place.shape)

    def pieces(self, name: str, key: str = MASTERS, size: int = PIECE) -> Iterator[Tensor]:
        """The same, flat, `size` elements at a time; none is kept while others are read."""
        numel = self.places[name].numel
        for start in range(0, max(numel, 1), size):
            yield self._piece(name, start, min(size, numel - start), key)

    def _piece(self, name: str, start: int, numel: int, key: str) -> Tensor:
        piece = self.read_range(name, start, numel, key)
        self._check_numel(name, start + piece.numel(), start + numel)
        return piece

    def _check_numel(self, name: str, found: int, expected: int) -> None:
        if found != expected:
            shape = list(self.places[name].shape)
            raise UserError(
                f"{self.checkpoint}: {name!r} has {found} values, its manifest says {shape}: it is damaged"
            )

    def read_range(self, name: str, start: int, numel: int, key: str = MASTERS) -> Tensor:
        """(numel,) of a flattened weight from `start` on."""
        group, offset, shape = self.places[name]
        if self.stage == 0:
            vector = self._vector(key, 0, group)
            self._check_numel(name, vector.numel(), self.places[name].numel)
            return vector.read(start, numel)
        if self.stage == 3:
            stretches = self._stretches(start, numel, stride(3, self.ranks, shape))
            parts = [
                self._vector(key, rank, group).read(offset + begin, end - begin)
                for rank, begin, end in stretches
            ]
        else:
            part = (
                self.masters[0][group].numel()
            )  # saved without its padding, which rank 0 has only where it holds the whole group
            stretches = self._stretches(offset + start, numel, part)
            parts = [
                self._vector(key, rank, group).read(begin, end - begin)
                for rank, begin, end in stretches
            ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _stretches(self, start: int, numel: int, part: int) -> Iterator[tuple[int, int, int]]:
        """(rank, begin, end) of what each rank has of the stretch, where each has `part` elements of the whole."""
        for rank in range(start // part, -(-(start + numel) // part)):
            yield rank, max(start - rank * part, 0), min(start + numel - rank * part, part)


@functools.lru_cache(
    maxsize=1
)  # checkpoints of one run have the same: one copy, however many are averaged
def places(
    stage: int,
    ranks: int,
    groups: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...],
    vectors: tuple[int, ...],
) -> dict[str, Place]:
    """groups: names and shapes by parameter group, in DeepSpeed's order. vectors: elements of one rank's flat vectors."""
    found: dict[str, Place] = {}
    group, offset = 0, 0
    for number, named in enumerate(groups):
        if stage in (1, 2):
            group, offset = number, 0
        for name, shape in named:
            if stage == 0:
                group, offset = len(found), 0
            elif stage == 3 and offset >= vectors[group]:
                group, offset = group + 1, 0
            found[name] = Place(group, offset, shape)
            offset += stride(stage, ranks, shape)
    return found


def stride(stage: int, ranks: int, shape: tuple[int, ...]) -> int:
    """Elements that a parameter takes in a flat vector."""
    numel = torch.Size(shape).numel()
    return -(-numel // ranks) if stage == 3 else numel


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
        if Path(name).name != name:
            raise CorruptedError(
                f"the manifest of {str(checkpoint)!r} names the file {name!r}. Remove the checkpoint."
            )
        file = f"the checkpoint file {str(checkpoint / name)!r}"
        try:
            found = file_digest(checkpoint / name)
        except FileNotFoundError as error:
            raise CorruptedError(
                f"{file} is missing: copy it again, or remove the checkpoint"
            ) from error
        except PermissionError as error:
            raise UserError(
                f"{file} may not be read ({error.strerror}): change its permissions"
            ) from error
        except (*BAD_ARCHIVE, OSError) as error:
            raise CorruptedError(
                f"{file} is cut short or damaged ({error}): copy it again, or remove the checkpoint"
            ) from error
        if found != digest:
            raise CorruptedError(
                f"{file} is of another checkpoint: copy the right one again, or remove the checkpoint"
            )


def load_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"the checkpoint file {str(path)!r} is missing: the checkpoint is damaged")
    try:
        with trusted_unpickling():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(
            f"the checkpoint file {str(path)!r} cannot be read: {' '.join(str(error).split())[:200]}"
        ) from error


def read_zero_file(path: Path) -> dict[str, Any]:
    """What a file of DeepSpeed's holds; see read_stored."""
    plain = {(kind.__module__, kind.__qualname__): kind for kind in plain_classes()}
    return read_stored(path, {**plain, ("__builtin__", "getattr"): stage_named})


def plain_classes() -> list[type]:
    """What DeepSpeed's checkpoints hold beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]


def stage_named(kind: Any, name: str) -> Any:
    """Python 3.11.0 to 3.11.3 pickle an enum as getattr(its class, its name); of getattr nothing else is let through."""
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
        raise pickle.UnpicklingError(f"the checkpoint asks for {name!r} of {kind!r}")
    return getattr(ZeroStageEnum, name)


@contextlib.contextmanager
def trusted_unpickling() -> Iterator[None]:
    """torch.load refuses, inside the block, whatever is neither a tensor nor one of DeepSpeed's plain classes."""
    safe = [*plain_classes(), (stage_named, "builtins.getattr")]
    with switched_on("TORCH_FORCE_WEIGHTS_ONLY_LOAD"), torch.serialization.safe_globals(safe):
        yield
