"""Find rows that repeat the id of an earlier row, in memory that hardly grows with their number."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from functools import cached_property
from typing import IO

import numpy as np
import numpy.typing as npt

from stpm.scoring.schema import Int64Array

# Ids are split by their value into this many files, each of which is looked at alone.
_PARTS = 64


class DuplicateFinder(ExitStack):
    """Ids with the numbers of their rows, in temporary files: 17 bytes a row on disk.

    Use it as a context manager, which removes the files. The files have no names: a killed process leaves none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._files = [self._open_file() for _ in range(_PARTS)]
        self._rows = 0

    def add(self, ids: Int64Array) -> None:
        """Add the ids of the next rows."""
        entries = np.stack([ids, np.arange(self._rows, self._rows + len(ids))], axis=1)
        self._rows += len(ids)
        # Ids are hashes: any of their bits split them evenly.
        parts = ids % _PARTS
        for number, file in enumerate(self._files):
            file.write(entries[parts == number].tobytes())

    def _open_file(self) -> IO[bytes]:
        return self.enter_context(tempfile.TemporaryFile())

    def mask(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return whether each of the rows from `start` to before `stop` has the id of an earlier row.

        After the first call no row can be added any more.
        """
        return self._is_duplicate[start:stop]

    @cached_property
    def _is_duplicate(self) -> npt.NDArray[np.bool_]:
        # An array cannot be mapped to a file of no bytes.
        flags = np.memmap(self._open_file(), bool, "w+", shape=max(self._rows, 1))
        for file in self._files:
            file.seek(0)
            ids, rows = np.frombuffer(file.read(), np.int64).reshape(-1, 2).T
            order = np.argsort(ids, kind="stable")
            flags[rows[order[1:]][ids[order[1:]] == ids[order[:-1]]]] = True
        return flags
