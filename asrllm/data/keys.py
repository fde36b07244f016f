"""The keys of utterances in tars, and sets of them."""

import hashlib
from collections.abc import Sequence

import numpy as np


class SeenKeys:
    """A set of 64-bit hashes that takes 8 bytes per hash.

    Attributes:
        runs: sorted arrays of hashes, each more than twice as long as the next.
    """

    def __init__(self) -> None:
        self.runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add hashes (n,), and return which of them (n,) were repeated.

        A hash is repeated if the set contains it, or if it occurs earlier in `hashes`.
        """
        _, first = np.unique(hashes, return_index=True)
        repeated: np.ndarray = np.ones(len(hashes), bool)
        repeated[first] = False
        for run in self.runs:
            places = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            repeated |= run[places] == hashes
        new = np.sort(hashes[~repeated])
        if len(new):
            self.runs.append(new)
        self._merge_runs()
        return repeated

    def _merge_runs(self) -> None:
        while len(self.runs) > 1:
            last = self.runs[-1]
            if len(self.runs[-2]) > 2 * len(last):
                return
            self.runs.pop()
            self.runs[-1] = np.union1d(self.runs[-1], last)


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """Return 64-bit hashes (n,) of keys."""
    digests = (
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        for key in keys
    )
    return np.frombuffer(b"".join(digests), np.uint64)


def tar_key(key: str) -> str:
    """Return a key as tars spell it.

    WebDataset ends a key at the first dot, and names in a tar are not absolute.
    """
    return key.replace(".", "_").lstrip("/")
