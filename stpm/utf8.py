"""Names of files that are not UTF-8. Python reads each such byte as a lone surrogate, U+DC80 to U+DCFF."""

from __future__ import annotations

import re
from urllib.parse import quote

_BYTE = re.compile(r"[\udc80-\udcff]")


def is_utf8(name: str) -> bool:
    """Return whether a name holds no lone surrogate."""
    return not re.search(r"[\ud800-\udfff]", name)


def as_utf8(name: str) -> str:
    """Write each byte that is not UTF-8 as %XX; every other character stays."""
    return _BYTE.sub(lambda match: quote(match[0].encode("utf-8", "surrogateescape")), name)
