"""What has been decoded of a test set so far, so that a killed evaluation goes on where it stopped."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from asrllm.training import distributed


@dataclass(frozen=True, kw_only=True)
class Said:
    """One decoded utterance, texts as they are. row: in the corpus's index; took: seconds of `rank`, its share of the batch's."""

    row: int
    key: str
    reference: str
    hypothesis: str
    end: str
    duration: float
    speaker: str
    recording: str
    corpus: str
    took: float
    rank: int


class Journal:
    """A file of each rank beside the results. of: all that the texts depend on; a journal of something else is not read."""

    def __init__(self, folder: Path, name: str, of: Any) -> None:
        self.folder, self.name = folder, name
        self.head = hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.file: TextIO | None = None

    def files(self) -> list[Path]:
        return sorted(self.folder.glob(f".decoding-{self.name}.rank*.jsonl"))

    def read(self) -> list[Said]:
        """What any rank has decoded, on every rank; files of something else are removed by the first."""
        found: list[Said] = []
        if distributed.rank() == 0:
            for path in self.files():
                said = self._read_file(path)
                if said is None:
                    path.unlink()
                found += said or []
        return distributed.gather_objects(found)[0]

    def _read_file(self, path: Path) -> list[Said] | None:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # not splitlines(): texts may hold U+2028
        if not lines or lines[0] != self.head:
            return None
        found = []
        for line in lines[1:]:
            with contextlib.suppress(ValueError, TypeError):  # the line that was being written, perhaps cut within a character
                found.append(Said(**json.loads(line)))
        return found

    def __enter__(self) -> "Journal":
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f".decoding-{self.name}.rank{distributed.rank()}.jsonl"
        is_new = not path.exists()
        self.file = path.open("a", encoding="utf-8")
        self.file.write(f"{self.head}\n" if is_new else "\n")  # behind a line that was being written
        return self

    def write(self, said: Sequence[Said]) -> None:
        assert self.file is not None
        self.file.writelines(json.dumps(asdict(each), ensure_ascii=False) + "\n" for each in said)
        self.file.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self.file is not None
        self.file.close()

    def remove(self) -> None:
        """The results are written."""
        for path in self.files():
            path.unlink()
