"""What has been decoded of a test set so far, so that a killed evaluation resumes where it stopped.

Each line holds a CRC-32 and one utterance as JSON. The checksum covers the line and everything that
the texts depend on, so that a corrupted line, or one of another evaluation, is decoded again.
"""

import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from asrllm import distributed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DecodedUtterance:
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
        self.start = zlib.crc32(json.dumps(of, sort_keys=True, default=str).encode())
        self.file: BinaryIO | None = None

    def files(self) -> list[Path]:
        return sorted(self.folder.glob(f".decoding-{self.name}.rank*.jsonl"))

    def read(self) -> list[DecodedUtterance]:
        """What any rank has decoded, on every rank; files of something else are removed by the first."""
        found: list[DecodedUtterance] = []
        if distributed.rank() == 0:
            for path in self.files():
                said = self._read_file(path)
                if not said:
                    path.unlink()
                found += said
        return distributed.gather_objects(found)[0]

    def _read_file(self, path: Path) -> list[DecodedUtterance]:
        found = []
        corrupted = 0
        lines = path.read_bytes().split(b"\n")
        for line in lines:
            checksum, _, content = line.partition(b" ")
            if checksum == self._checksum(content):
                found.append(DecodedUtterance(**json.loads(content)))
            elif line and line is not lines[-1]:  # the last one was being written
                corrupted += 1
        if found and corrupted:
            logger.warning("%s: %d lines are corrupted and are decoded again", path, corrupted)
        return found

    def _checksum(self, content: bytes) -> bytes:
        return b"%08x" % zlib.crc32(content, self.start)

    def __enter__(self) -> "Journal":
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f".decoding-{self.name}.rank{distributed.rank()}.jsonl"
        is_new = not path.exists()
        self.file = path.open("ab")
        if not is_new:
            self.file.write(b"\n")  # behind a line that was being written
        return self

    def write(self, said: Sequence[DecodedUtterance]) -> None:
        assert self.file is not None
        for each in said:
            content = json.dumps(asdict(each)).encode()
            self.file.write(self._checksum(content) + b" " + content + b"\n")
        self.file.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self.file is not None
        self.file.close()

    def remove(self) -> None:
        """The results are written."""
        for path in self.files():
            path.unlink()
