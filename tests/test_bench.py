"""Helpers of the benchmarks."""

from __future__ import annotations

from bench.commands import kill_after


def test_kill_after_tells_whether_the_job_was_killed() -> None:
    assert kill_after("models", {}, seconds=0)
    # The job lacks an option, and ends by itself.
    assert not kill_after("models", {}, seconds=0, condition=lambda: False)
