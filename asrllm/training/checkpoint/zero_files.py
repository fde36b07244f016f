"""Read weights and optimizer state from DeepSpeed's checkpoint files.

The optimizer's float32 master weights are read, not the rounded working copies. Their layout
depends on the ZeRO stage:

0: whole weights, in `mp_rank_00_model_states.pt`.
1, 2: one flat vector per parameter group, cut into equal parts over the ranks.
3: every parameter cut into equal parts over the ranks, the last one padded. The parts of a rank
   follow each other in sub-groups.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from asrllm.errors import CorruptedError, UserError
from asrllm.integrity import BAD_ARCHIVE, corrupted
from asrllm.launchers import switched_on
from asrllm.tensor_files import BAD_TENSORS, PIECE
from asrllm.text_files import check_file, check_no_pointer, first_words, open_regular
from asrllm.training.checkpoint.manifest import Manifest

RANK_FILE = re.compile(r".*zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
MASTERS = "fp32"  # key of the master weights
AVERAGE = "average"  # key of their running average over the training
SHARED = "shared_"  # prefix of state that an optimizer holds per group, whatever its size
# These repeat, with one object per weight, where the weights are.
REDUNDANT_KEYS = ("param_slice_mappings", "param_alignment_paddings")
MODEL_FILE = "mp_rank_00_model_states.pt"
MODEL_FILE_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"  # at stage 3

SavedState = dict[str, Any]  # content of a file of DeepSpeed
WeightGroup = tuple[tuple[str, tuple[int, ...]], ...]  # (name, shape) of the weights in a group


class WeightLocation(NamedTuple):
    """Where a parameter starts.

    Attributes:
        group: parameter group (stages 1, 2), sub-group (stage 3) or number of the weight (stage 0).
        offset: first element in the group's flat vector; at stage 3, in that of each rank.
        shape: shape of the parameter.
    """

    group: int
    offset: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class ZeroFiles:
    """Tensors in the files of one checkpoint, which are memory-mapped: bytes are read on use.

    Attributes:
        checkpoint: directory of the checkpoint.
        stage: ZeRO stage.
        ranks: number of ranks that wrote the checkpoint.
        model: content of the model file without the weights.
        optimizers: optimizer state by rank.
        masters: flat float32 vectors by rank; at stage 0 whole weights.
        locations: where each trained weight is, by name.
    """

    def __init__(self, checkpoint: Path, manifest: Manifest) -> None:
        """Open the files.

        Raises:
            UserError: a file is missing or corrupted. The message names it.
        """
        check_files(checkpoint, manifest)
        self.checkpoint = checkpoint
        self.stage: int = manifest["zero_stage"]
        self.ranks: int = manifest["world_size"]
        model_file = MODEL_FILE_3 if self.stage == 3 else MODEL_FILE
        self.model_file = checkpoint / model_file
        self.model = load_file(self.model_file)
        working = self.model.pop("module", {})
        self.optimizer_files: list[Path] = []
        self.optimizers = self._optimizers()
        self.masters = [self._masters_of(saved, working, manifest) for saved in self.optimizers]
        self.averages: list[Sequence[Tensor]] = []
        self._check_dtypes(working, manifest)
        self.locations = self._locate_weights(manifest)

    def _optimizers(self) -> list[SavedState]:
        """Return the optimizer states of all ranks in order."""
        if self.stage == 0:
            return [self.model["optimizer"]]
        files = {}
        for path in self.checkpoint.glob("*.pt"):
            match = RANK_FILE.fullmatch(path.name)
            if match:
                files[int(match.group(1))] = path
        if sorted(files) != list(range(self.ranks)):
            raise UserError(
                f"{str(self.checkpoint)!r} is corrupted: it has optimizer files of the ranks "
                f"{sorted(files)}, but was written by {self.ranks} ranks. Choose another one."
            )
        self.optimizer_files = [files[rank] for rank in range(self.ranks)]
        states = []
        for path in self.optimizer_files:
            saved = load_file(path)["optimizer_state_dict"]
            states.append({key: saved[key] for key in saved if key not in REDUNDANT_KEYS})
        return states

    def _masters_of(
        self, saved: SavedState, working: dict[str, Tensor], manifest: Manifest
    ) -> Sequence[Tensor]:
        """Return the flat master vectors of one rank; at stage 0 whole weights.

        Args:
            saved: optimizer state of the rank.
            working: working weights by name.
            manifest: manifest of the checkpoint.
        """
        if self.stage in (1, 2):
            return saved["single_partition_of_fp32_groups"]
        if self.stage == 3:
            return saved["fp32_flat_groups"]
        groups = saved.get("fp32_groups")
        if groups is not None:
            return list(itertools.chain.from_iterable(groups))
        # trained in float32, so the working weights are the master weights
        # In the order of the optimizer, by which its state is numbered.
        names = itertools.chain.from_iterable(manifest["param_groups"])
        return [working[name] for name in names]

    def _check_dtypes(self, working: dict[str, Tensor], manifest: Manifest) -> None:
        """Raise UserError for weights whose dtypes are not those that were written."""
        for name, info in manifest["trainable"].items():
            if name in working and str(working[name].dtype) != f"torch.{info['dtype']}":
                raise UserError(
                    f"{str(self.checkpoint)!r} is corrupted: {name!r} is {working[name].dtype}, "
                    f"but its manifest says {info['dtype']}. Choose another one."
                )
        for vector in itertools.chain.from_iterable(self.masters):
            if vector.dtype != torch.float32:
                raise UserError(
                    f"{str(self.checkpoint)!r} is corrupted: its master weights are "
                    f"{vector.dtype} instead of torch.float32. Choose another one."
                )

    def _locate_weights(self, manifest: Manifest) -> dict[str, WeightLocation]:
        """Return where the trained weights are, and check them against the manifest."""
        shapes = {name: tuple(info["shape"]) for name, info in manifest["trainable"].items()}
        groups: list[WeightGroup] = []
        if self.stage == 0:
            for names in manifest["param_groups"]:
                groups.append(tuple((name, shapes.get(name, ())) for name in names))
        else:
            for group in self.model.pop("param_shapes"):
                groups.append(tuple((name, tuple(shape)) for name, shape in group.items()))
        saved = dict(itertools.chain.from_iterable(groups))
        self._check_shapes(saved, shapes)
        vectors = tuple(vector.numel() for vector in self.masters[0])
        return locate_weights(self.stage, self.ranks, tuple(groups), vectors)

    def _check_shapes(
        self, saved: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        """Raise UserError if the shapes in the files are not those in the manifest."""
        problem = f"{str(self.checkpoint)!r} is corrupted"
        unmatched = sorted(shapes.keys() ^ saved.keys())
        if unmatched:
            where = "its files" if unmatched[0] in saved else "its manifest"
            raise UserError(f"{problem}: {unmatched[0]!r} is only in {where}. Choose another one.")
        for name, shape in saved.items():
            if shape != shapes[name]:
                raise UserError(
                    f"{problem}: {name!r} has the shape {list(shape)}, "
                    f"but its manifest says {list(shapes[name])}. Choose another one."
                )

    def drop_optimizer_states(self) -> None:
        """Free the optimizer states, which add up if many checkpoints are open at once."""
        self.model = {}
        self.optimizers = []

    def state_keys(self) -> list[str]:
        """Return the names of the optimizer's state per element, for example exp_avg."""
        size = self.masters[0][0].numel()
        if self.stage in (1, 2):
            # The moments are saved with the padding of the group, the master weights without it.
            size += self.optimizers[0]["group_paddings"][0]
        keys = []
        for key, value in self._state_of(0, 0).items():
            if key.startswith(SHARED) or not isinstance(value, Tensor):
                continue
            if value.ndim and value.numel() == size:
                keys.append(key)
        return keys

    def shared_state(self, group: int) -> SavedState:
        """Return the optimizer's state per group, for example its number of steps."""
        elementwise = self.state_keys()
        shared = {}
        for key, value in self._state_of(0, group).items():
            if key not in elementwise:
                shared[key] = value.clone() if isinstance(value, Tensor) else value
        return shared

    def _state_of(self, rank: int, group: int) -> SavedState:
        """Return the optimizer's state of one group as one rank saved it."""
        saved = self.optimizers[rank]
        if self.stage in (1, 2):
            saved = saved["base_optimizer_state"]
        elif "optimizer_state_dict" in saved:
            saved = saved["optimizer_state_dict"]
        return saved["state"].get(group, {})

    def _vector(self, key: str, rank: int, group: int) -> Tensor:
        """Return a flat vector of one rank; at stage 0 a whole weight."""
        if key == MASTERS:
            return self.masters[rank][group]
        if key == AVERAGE:
            return self._averages()[rank][group]
        return self._state_of(rank, group)[key]

    def _averages(self) -> list[Sequence[Tensor]]:
        """Return the flat vectors of the running average by rank."""
        if not self.averages:
            files = [self.checkpoint / average_file(rank) for rank in range(len(self.masters))]
            self.averages = [load_file(file)[AVERAGE] for file in files]
        return self.averages

    def check(self, key: str = MASTERS) -> None:
        """Compare the bytes of the weights with their checksums.

        Args:
            key: MASTERS or AVERAGE.

        Raises:
            UserError: a file does not hold the bytes that were written. The message names it.
        """
        files = self.optimizer_files or [self.model_file]
        by_rank = self.masters
        if key == AVERAGE:
            files = [self.checkpoint / average_file(rank) for rank in range(len(self.masters))]
            by_rank = self._averages()
        for file, vectors in zip(files, by_rank, strict=True):
            verify_storages(file, vectors)

    def read(self, name: str, key: str = MASTERS) -> Tensor:
        """Return a weight, or its optimizer state, in the weight's shape.

        Args:
            name: name of the weight.
            key: MASTERS, AVERAGE or one of `state_keys`.

        Raises:
            UserError: the file has another number of values.
        """
        location = self.locations[name]
        values = self.read_range(name, 0, location.numel, key)
        self._check_numel(name, values.numel(), location.numel)
        return values.view(location.shape)

    def pieces(self, name: str, key: str = MASTERS, size: int = PIECE) -> Iterator[Tensor]:
        """Yield the values of `read`, flattened, in pieces of `size` elements.

        The pieces are mapped to the file, so the caller must not change them.
        """
        numel = self.locations[name].numel
        for start in range(0, max(numel, 1), size):
            yield self._piece(name, start, min(size, numel - start), key)

    def _piece(self, name: str, start: int, numel: int, key: str) -> Tensor:
        piece = self.read_range(name, start, numel, key)
        self._check_numel(name, start + piece.numel(), start + numel)
        return piece

    def _check_numel(self, name: str, numel: int, expected: int) -> None:
        """Raise UserError if a file does not have the expected number of values."""
        if numel != expected:
            shape = list(self.locations[name].shape)
            raise UserError(
                f"{str(self.checkpoint)!r} is corrupted: {name!r} has {numel} values, "
                f"but its manifest says {shape}. Choose another one."
            )

    def read_range(self, name: str, start: int, numel: int, key: str = MASTERS) -> Tensor:
        """Return elements of a flattened weight or of its optimizer state.

        Args:
            name: name of the weight.
            start: first element.
            numel: number of elements.
            key: MASTERS, AVERAGE or one of `state_keys`.

        Returns:
            (numel,), or fewer elements if the files end before.
        """
        group, offset, shape = self.locations[name]
        if self.stage == 0:
            vector = self._vector(key, 0, group)
            self._check_numel(name, vector.numel(), self.locations[name].numel)
            return vector.flatten()[start : start + numel]
        parts = []
        if self.stage == 3:
            part = stride(3, self.ranks, shape)
            for rank, begin, end in self._rank_ranges(start, numel, part):
                parts.append(self._vector(key, rank, group)[offset + begin : offset + end])
        else:
            # saved without the padding, which rank 0 only has if it holds the whole group
            part = self.masters[0][group].numel()
            for rank, begin, end in self._rank_ranges(offset + start, numel, part):
                parts.append(self._vector(key, rank, group)[begin:end])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rank_ranges(self, start: int, numel: int, part: int) -> Iterator[tuple[int, int, int]]:
        """Yield (rank, begin, end): where each rank has elements of a range.

        Args:
            start: first element of the range in the whole.
            numel: number of elements of the range.
            part: elements of the whole that each rank has.
        """
        for rank in range(start // part, -(-(start + numel) // part)):
            yield rank, max(start - rank * part, 0), min(start + numel - rank * part, part)


# Checkpoints of one run have the same layout: one copy suffices, however many are averaged.
@functools.lru_cache(maxsize=1)
def locate_weights(
    stage: int, ranks: int, groups: tuple[WeightGroup, ...], vectors: tuple[int, ...]
) -> dict[str, WeightLocation]:
    """Return where every weight is, by name.

    Args:
        stage: ZeRO stage.
        ranks: number of ranks.
        groups: parameter groups in DeepSpeed's order.
        vectors: number of elements of each flat vector of one rank.
    """
    found: dict[str, WeightLocation] = {}
    group = 0
    offset = 0
    for number, weights in enumerate(groups):
        if stage in (1, 2):
            group = number
            offset = 0
        for name, shape in weights:
            if stage == 0:
                group = len(found)
                offset = 0
            # The sub-group is full, so DeepSpeed put this weight into the next one.
            elif stage == 3 and offset >= vectors[group]:
                group = group + 1
                offset = 0
            found[name] = WeightLocation(group, offset, shape)
            offset += stride(stage, ranks, shape)
    return found


def stride(stage: int, ranks: int, shape: tuple[int, ...]) -> int:
    """Return the number of elements that a parameter takes in a flat vector."""
    numel = torch.Size(shape).numel()
    return -(-numel // ranks) if stage == 3 else numel


def average_file(rank: int) -> str:
    """Return the name of a rank's file of the running average."""
    return f"average_rank_{rank}.pt"


def file_digest(path: Path) -> str:
    """Return a digest of a file of torch.save.

    It covers the names, sizes and CRC-32 of the records in the archive's directory, so that the
    tensors need not be read.
    """
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        records = [(record.filename, record.file_size, record.CRC) for record in archive.infolist()]
    return hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16]


def check_files(checkpoint: Path, manifest: Manifest) -> None:
    """Check that the files of a checkpoint exist and are those that were written.

    Raises:
        CorruptedError: a file is missing, truncated or from another checkpoint.
        UserError: a file cannot be read because of its permissions.
    """
    for name, digest in manifest["files"].items():
        if Path(name).name != name:
            raise CorruptedError(
                f"the manifest of {str(checkpoint)!r} names the file {name!r}, which is a path. "
                "Remove the checkpoint."
            )
        _check_file(checkpoint / name, digest)


def _check_file(path: Path, digest: str) -> None:
    """Check that a file is the one that was written, see `check_files`."""
    file = f"the checkpoint file {str(path)!r}"
    fix = "Copy it again, or remove the checkpoint."
    try:
        current = file_digest(path)
    except FileNotFoundError as error:
        raise CorruptedError(f"{file} is missing. {fix}") from error
    except PermissionError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}). Change its permissions."
        ) from error
    except (*BAD_ARCHIVE, OSError) as error:
        raise CorruptedError(f"{file} is truncated or corrupted ({error}). {fix}") from error
    if current != digest:
        raise CorruptedError(f"{file} is from another checkpoint. {fix}")


def load_file(path: Path) -> SavedState:
    """Load a file of a checkpoint with torch.load, memory-mapped and without trusting it.

    torch.load does not verify the pickle's checksum; reading it with zipfile does. The bytes of
    tensors are read when they are used, see `verify_storages`.

    Raises:
        UserError: the file is missing or corrupted.
    """
    check_file(path, "the checkpoint file")
    try:
        check_no_pointer(path)
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("/data.pkl"):
                    archive.read(name)
        with restricted_unpickling():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*BAD_TENSORS, OSError) as error:
        raise UserError(
            f"the checkpoint file {str(path)!r} is corrupted: {first_words(error)}. Copy it again."
        ) from error


def verify_storages(path: Path, tensors: Iterable[Tensor]) -> None:
    """Compare the bytes of tensors with the checksums in the file of torch.save that they map.

    Only these tensors are read. They are a third of the bytes of a checkpoint of Adam.

    Args:
        path: the file.
        tensors: tensors of torch.load with mmap=True.

    Raises:
        CorruptedError: the file holds no record with such bytes.
        UserError: the file does not exist any more.
    """
    tensors = list(tensors)
    if not tensors:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            expected = {(record.file_size, record.CRC) for record in archive.infolist()}
    except FileNotFoundError as error:
        raise UserError(
            f"the file {str(path)!r} was removed while it was read, perhaps because of "
            "trainer.keep_last_k. Choose checkpoints that remain."
        ) from error
    for tensor in tensors:
        storage = tensor.untyped_storage()
        content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data
        crc = 0
        for start in range(0, len(content), PIECE):
            crc = zlib.crc32(content[start : start + PIECE], crc)
        if (len(content), crc) not in expected:
            raise corrupted(path, "its tensors do not match their checksums")


def plain_classes() -> list[type]:
    """Return the classes whose objects DeepSpeed's checkpoints contain in addition to tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]


def zero_stage_by_name(kind: object, name: str) -> object:
    """Replace getattr while unpickling: return a ZeRO stage by name, and reject all else.

    Python 3.11.0 to 3.11.3 pickle an enum member as getattr(class, name).
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    if name not in ZeroStageEnum.__members__ or kind is not ZeroStageEnum:
        raise pickle.UnpicklingError(f"the checkpoint asks for {name!r} of {kind!r}")
    return getattr(ZeroStageEnum, name)


@contextlib.contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Let torch.load accept nothing but tensors and DeepSpeed's plain classes in the block."""
    safe = [*plain_classes(), (zero_stage_by_name, "builtins.getattr")]
    with switched_on("TORCH_FORCE_WEIGHTS_ONLY_LOAD"), torch.serialization.safe_globals(safe):
        yield
