"""Files of results that a later call of a benchmark continues."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class Results:
    """A file of JSON lines: the settings of a measurement, all that it depends on, and its values.

    Settings and values have the types of JSON: lists, not tuples.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text() if path.exists() else ""
        self._lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def once(self, settings: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return the file's line with the same settings; if there is none, measure, append the line and print it."""
        for line in self._lines:
            if line["settings"] == settings:
                return line
        line = {"settings": settings, **measure()}
        self._lines.append(line)
        text = json.dumps(line)
        with self._path.open("a") as file:
            print(text, file=file)
        print(text, flush=True)
        return line
