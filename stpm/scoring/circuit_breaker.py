"""The circuit breaker: it stops a run whose images fail for a reason outside them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class CircuitBreaker:
    """Open, and stay open, once more than half of the latest images failed for a reason outside the image.

    Args:
        window: number of images to decide on.
    """

    def __init__(self, window: int = 256) -> None:
        self._window = window
        self._failed: deque[bool] = deque(maxlen=window)
        self._last_error = ""
        self.is_open = False

    def add(self, images: int, errors: Sequence[str]) -> None:
        """Add a batch of images, and the errors of those that failed."""
        self._failed.extend([True] * len(errors) + [False] * (images - len(errors)))
        self._last_error = errors[-1] if errors else self._last_error
        self.is_open |= len(self._failed) == self._window and 2 * sum(self._failed) > self._window

    def __str__(self) -> str:
        failed, images = sum(self._failed), len(self._failed)
        return f"{failed} of the latest {images} images failed, the last one with {self._last_error}"
