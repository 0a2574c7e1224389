"""Wait for several requests at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
Result = TypeVar("Result")


def in_parallel(function: Callable[[T], Result], items: Iterable[T], threads: int = 16) -> list[Result]:
    """Call a function on each item, in threads, and return the results in the order of the items.

    Raises:
        Exception: the first that the function raised, in the order of the items.
    """
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))
