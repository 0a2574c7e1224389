"""Files of results, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_line(path: Path, values: Mapping[str, object]) -> None:
    """Append a JSON line to a file, and print it."""
    line = json.dumps(values)
    with path.open("a") as file:
        print(line, file=file)
    print(line, flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; none if it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
