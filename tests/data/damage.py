"""Change an index, and update its checksums so that only the change is wrong."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from asrllm.data.index import ROW, _about_sha256
from asrllm.data.tars import BLOCK


def read_rows(folder: Path) -> np.ndarray:
    """Return the rows of an index."""
    return np.fromfile(folder / "index.bin", ROW)


def write_rows(folder: Path, rows: np.ndarray) -> None:
    """Replace the rows of an index."""
    rows.tofile(folder / "index.bin")
    change_about(folder, rows_sha256=hashlib.sha256(rows.tobytes()).hexdigest())


def change_about(folder: Path, **changes: Any) -> None:
    """Change entries of index.json."""
    path = folder / "index.json"
    about = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(about | {"sha256": _about_sha256(about)}))


def accept_bytes(folder: Path) -> None:
    """Set the checksum of every row to that of its shard's current content."""
    rows = read_rows(folder)
    names = [shard["name"] for shard in json.loads((folder / "index.json").read_text())["shards"]]
    for row in rows:
        data = (folder / names[row["shard"]]).read_bytes()
        start = int(row["offset"]) * BLOCK
        row["crc32"] = zlib.crc32(data[start : start + int(row["size"]) * BLOCK])
    write_rows(folder, rows)
