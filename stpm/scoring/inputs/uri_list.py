"""Store a list of URIs that is read once, from standard input."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO

from stpm import storage
from stpm.names import as_utf8
from stpm.scoring.inputs.manifest import image_id


@contextmanager
def stored_list(lines: Iterable[str]) -> Iterator[tuple[IO[str], str]]:
    """Store a list of URIs in a temporary file.

    Yields:
        The file; and the number of lines with a digest that does not depend on their order, or "" without lines.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="surrogateescape") as file:
        count = total = 0
        for line in filter(None, map(str.strip, lines)):
            count += 1
            total += image_id(as_utf8(storage.absolute(line)))
            print(line, file=file)
        yield file, f"{count} lines, digest {total % 2**64:016x}" if count else ""
