"""Reads that several threads want at a time: one of them reads, the others wait for it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

# A read that takes longer hangs, and threads that come later do not wait for it.
_PATIENCE = 120.0


class SharedReads(Generic[K, T]):
    """What was read last, by key. Nobody waits for the read of another key; what failed is tried again.

    Args:
        read: gets what a key names.
        kept: results, those used last.
        patience: seconds after which a read that has not ended is given up.
    """

    def __init__(self, read: Callable[[K], T], kept: int, patience: float = _PATIENCE) -> None:
        self._read = read
        self._kept = kept
        self._patience = patience
        self._lock = threading.Lock()
        self._reads: OrderedDict[K, tuple[Future[T], float]] = OrderedDict()

    def get(self, key: K) -> T:
        """Raises what `read` raises, in each thread that waited for it."""
        now = time.monotonic()
        with self._lock:
            future, began = self._reads.get(key, (None, now))
            ours = future is None or (not future.done() and now - began > self._patience)
            if future is None or ours:
                future = Future()
                self._reads[key] = future, now
            self._reads.move_to_end(key)
            while len(self._reads) > self._kept:
                self._reads.popitem(last=False)
        if ours:
            try:
                future.set_result(self._read(key))
            except BaseException as error:  # noqa: BLE001
                with self._lock:
                    if self._reads.get(key, (None,))[0] is future:
                        del self._reads[key]
                future.set_exception(error)
        return future.result()
