"""Find rows that repeat the id of an earlier row, in memory that hardly grows with their number."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import cached_property

import numpy as np
import numpy.typing as npt

from stpm.scoring.schema import Int64Array

# Ids are split by their value into this many files, each of which is looked at alone.
_PARTS = 64


class DuplicateFinder:
    """Ids with the numbers of their rows, in temporary files: 16 bytes a row on disk, and one bit in memory.

    Use it as a context manager, which removes the files. The files have no names: a killed process leaves none.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._files = [self._stack.enter_context(tempfile.TemporaryFile()) for _ in range(_PARTS)]  # noqa: SIM115
        self._rows = 0

    def __enter__(self) -> DuplicateFinder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, ids: Int64Array) -> None:
        """Add the ids of the next rows."""
        entries = np.stack([ids, np.arange(self._rows, self._rows + len(ids))], axis=1)
        self._rows += len(ids)
        # Ids are hashes: any of their bits split them evenly.
        parts = ids % _PARTS
        order = np.argsort(parts, kind="stable")
        ends = np.searchsorted(parts[order], np.arange(_PARTS), side="right")
        for file, part in zip(self._files, np.split(entries[order], ends[:-1]), strict=True):
            file.write(part.tobytes())

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return whether each of the rows from `start` to before `stop` has the id of an earlier row.

        After the first call no row can be added any more.
        """
        first = start // 8
        flags = np.unpackbits(self._bits[first : -(-stop // 8)])
        return flags[start - 8 * first : stop - 8 * first].astype(bool)

    @cached_property
    def _bits(self) -> npt.NDArray[np.uint8]:
        """One bit for each row, packed as `numpy.packbits` does."""
        bits = np.zeros(-(-self._rows // 8), np.uint8)
        for file in self._files:
            file.seek(0)
            rows = _repeated(np.frombuffer(file.read(), np.int64).reshape(-1, 2))
            np.bitwise_or.at(bits, rows >> 3, (128 >> (rows & 7)).astype(np.uint8))
        return bits


def _repeated(entries: Int64Array) -> Int64Array:
    """Return the numbers of the rows whose id an earlier row has, given (id, row) pairs in ascending order of rows."""
    ordered = entries[np.argsort(entries[:, 0], kind="stable")]
    repeated: Int64Array = ordered[1:][ordered[1:, 0] == ordered[:-1, 0], 1]
    return repeated
