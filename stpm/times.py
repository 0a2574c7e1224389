"""Times as text."""

from __future__ import annotations

from datetime import datetime, timezone


def timestamp() -> str:
    """Return the time in UTC, to the second, in the format of ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def duration(seconds: float) -> str:
    """Format seconds in the unit that suits them: 70 s, 5 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
