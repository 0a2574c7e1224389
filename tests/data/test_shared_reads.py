import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from stpm.data.shared_reads import SharedReads


def test_one_thread_reads_a_key_and_the_others_wait() -> None:
    read: list[str] = []
    started = threading.Barrier(8)

    def get(key: str) -> str:
        started.wait(30)
        return shared.get(key)

    shared = SharedReads(lambda key: read.append(key) or key.upper(), max_results=2)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(get, "aabbaabb")) == list("AABBAABB")
    assert sorted(read) == ["a", "b"]
    for key in "abca":
        assert shared.get(key) == key.upper()
    assert sorted(read) == ["a", "a", "b", "c"]


def test_a_read_that_hangs_delays_no_other_key_and_is_replaced() -> None:
    begun, release = threading.Event(), threading.Event()
    hangs = [True]

    def read(key: str) -> str:
        if key == "hangs" and hangs.pop():
            hangs.append(False)
            begun.set()
            release.wait(60)
        return key.upper()

    shared = SharedReads(read, max_results=2, max_seconds=0.05)
    first = threading.Thread(target=shared.get, args=["hangs"], daemon=True)
    first.start()
    assert begun.wait(60)
    assert shared.get("other") == "OTHER"
    # Longer than the read may take.
    time.sleep(0.1)
    assert shared.get("hangs") == "HANGS"
    release.set()
    first.join(60)


def test_a_failed_read_is_tried_again() -> None:
    answers = [OSError("503"), None]

    def read(key: int) -> int:
        if error := answers.pop(0):
            raise error
        return key

    shared = SharedReads(read, max_results=1)
    with pytest.raises(OSError, match="503"):
        shared.get(1)
    assert shared.get(1) == 1
