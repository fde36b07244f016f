"""Record which utterances are decoded, so that a killed evaluation resumes where it stopped.

Each line has a CRC-32 and one utterance as JSON. The checksum covers the line and everything that
the texts depend on, so that a corrupted line, or one of another evaluation, is decoded again.
"""

import glob
import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from asrllm import distributed
from asrllm.text_files import parse_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DecodedUtterance:
    """One decoded utterance, with its texts before normalization.

    Attributes:
        row: row in the corpus's index.
        key: the utterance's key.
        reference: the transcript.
        hypothesis: the decoded text.
        end: what ended the hypothesis, see generation.Answer.
        duration: seconds of audio.
        speaker: "" if unknown.
        recording: "" if unknown.
        corpus: "" if unknown.
        took: seconds of decoding: those of its batch divided by the number of utterances.
        rank: the rank that decoded it.
    """

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
    """The utterances that were decoded so far, in one file per rank beside the results."""

    def __init__(self, folder: Path, name: str, settings: object) -> None:
        """
        Args:
            folder: directory of the results.
            name: name of the test set.
            settings: JSON with all that the texts depend on. Lines with other settings are ignored.
        """
        self.folder = folder
        self.name = name
        self.start = zlib.crc32(json.dumps(settings, sort_keys=True, default=str).encode())
        self.file: BinaryIO | None = None

    def files(self) -> list[Path]:
        """Return the existing files of all ranks."""
        return sorted(self.folder.glob(f".decoding-{glob.escape(self.name)}.rank*.jsonl"))

    def read(self) -> list[DecodedUtterance]:
        """Return on every rank what any rank has decoded.

        The first rank removes files without any line that has these settings.
        """
        found: list[DecodedUtterance] = []
        if distributed.rank() == 0:
            for path in self.files():
                decoded = self._read_file(path)
                if not decoded:
                    path.unlink()
                found += decoded
        return distributed.gather_objects(found)[0]

    def _read_file(self, path: Path) -> list[DecodedUtterance]:
        found = []
        corrupted = 0
        lines = path.read_bytes().split(b"\n")
        for line in lines:
            checksum, _, content = line.partition(b" ")
            if checksum == self._checksum(content):
                found.append(DecodedUtterance(**parse_json(content)))
            elif line and line is not lines[-1]:  # the last line may be incomplete after a kill
                corrupted += 1
        if found and corrupted:
            logger.warning("%d lines of %s are corrupted and are decoded again", corrupted, path)
        return found

    def _checksum(self, content: bytes) -> bytes:
        return b"%08x" % zlib.crc32(content, self.start)

    def __enter__(self) -> "Journal":
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f".decoding-{self.name}.rank{distributed.rank()}.jsonl"
        is_new = not path.exists()
        self.file = path.open("ab")
        if not is_new:
            self.file.write(b"\n")  # ends a line that may be incomplete
        return self

    def write(self, decoded: Sequence[DecodedUtterance]) -> None:
        """Append utterances to this rank's file."""
        assert self.file is not None
        for utterance in decoded:
            content = json.dumps(asdict(utterance)).encode()
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
        """Remove the files of all ranks, after the results are written."""
        for path in self.files():
            path.unlink()
