"""How many images go through one forward pass."""

from __future__ import annotations

from stpm.method.preprocessing import MAX_CPU_BATCH

MAX_BATCH = 256
# A larger batch has to be this much faster.
_MIN_SPEED_UP = 1.05


class BatchSize:
    """The number of images per forward pass: fixed, or doubled while that is faster; halved after out-of-memory.

    Args:
        fixed: the number; 0: start at `MAX_CPU_BATCH`.
        grows: double the number while that is faster, as it may be on a GPU.
    """

    def __init__(self, fixed: int, grows: bool) -> None:
        self.current = fixed or MAX_CPU_BATCH
        self._is_final = bool(fixed) or not grows
        self._best_speed = 0.0
        self._is_warm = False

    def update(self, images: int, seconds: float) -> None:
        """Choose the next size from the time that a forward pass took."""
        if self._is_final or images < self.current:
            return
        if not self._is_warm:
            # The first pass of each size also chooses kernels.
            self._is_warm = True
            return
        speed, self._is_warm = images / seconds, False
        if speed < self._best_speed * _MIN_SPEED_UP:
            self.current //= 2
            self._is_final = True
        elif self.current * 2 > MAX_BATCH:
            self._is_final = True
        else:
            self._best_speed = speed
            self.current *= 2

    def halve(self, images: int) -> None:
        """Halve the batch size after a batch of this many images ran out of memory."""
        self.current = max(images // 2, 1)
        self._is_final = True
