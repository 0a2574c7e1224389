"""A cache for reads that several threads want at the same time: one thread reads, the others wait for its result."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
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
        self._reads: OrderedDict[K, tuple[Future[T], float]] = OrderedDict()

    def get(self, key: K) -> T:
        """Return the value of a key. What `read` raises is raised in every thread that waited for it."""
        with self._lock:
            future, is_new = self._find_or_add(key)
        if is_new:
            try:
                future.set_result(self._read(key))
            except BaseException as error:  # noqa: BLE001
                with self._lock:
                    if self._reads.get(key, (None,))[0] is future:
                        del self._reads[key]
                future.set_exception(error)
        return future.result()

    def _find_or_add(self, key: K) -> tuple[Future[T], bool]:
        now = time.monotonic()
        future, began = self._reads.get(key, (None, now))
        is_new = future is None or (not future.done() and now - began > self._max_seconds)
        if future is None or is_new:
            future = Future()
            self._reads[key] = future, now
        self._reads.move_to_end(key)
        while len(self._reads) > self._max_results:
            self._reads.popitem(last=False)
        return future, is_new
