"""A cache for reads that several threads want at the same time: one thread reads, the others wait for its result."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class SharedReads(Generic[K, T]):
    """The results of the latest reads, by key. A key waits only for its own read; a failed read is not kept.

    Args:
        read: read the value of a key.
        max_results: results to keep, the most recently used ones.
        max_seconds: after which a read counts as hung, and the next thread reads again.
    """

    def __init__(self, read: Callable[[K], T], max_results: int, max_seconds: float = 120.0) -> None:
        self._read = read
        self._max_results = max_results
        self._max_seconds = max_seconds
        self._lock = threading.Lock()
        # With the time at which each began; the most recently used is the last.
        self._reads: dict[K, tuple[Future[T], float]] = {}

    def get(self, key: K) -> T:
        """Return the value of a key. What `read` raises is raised in every thread that waited for it."""
        now = time.monotonic()
        with self._lock:
            future, began = self._reads.pop(key, (Future[T](), -math.inf))
            reads_now = not future.done() and now - began > self._max_seconds
            if reads_now:
                future, began = Future(), now
            self._reads[key] = future, began
            if len(self._reads) > self._max_results:
                del self._reads[next(iter(self._reads))]
        if reads_now:
            try:
                future.set_result(self._read(key))
            except BaseException as error:  # noqa: BLE001
                with self._lock:
                    if self._reads.get(key, (None,))[0] is future:
                        del self._reads[key]
                future.set_exception(error)
        return future.result()
