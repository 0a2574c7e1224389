"""Helpers of the benchmarks."""

import json
from pathlib import Path

from bench.commands import kill_after
from bench.results import Results


def test_kill_after_tells_whether_the_job_was_killed() -> None:
    assert kill_after("models", {}, seconds=0)
    # The job lacks an option, and ends by itself.
    assert not kill_after("models", {}, seconds=0, condition=lambda: False)


def test_results_are_measured_once_for_all_their_settings(tmp_path: Path) -> None:
    file, settings = tmp_path / "results.jsonl", {"category": "nut", "seed": 0, "data": "here", "variants": ["", "a=1"]}
    line = Results(file).once(settings, lambda: {"auroc": 0.5})
    assert line == {"settings": settings, "auroc": 0.5}

    def unreachable() -> dict[str, float]:
        raise AssertionError

    assert Results(file).once(settings, unreachable) == line
    others = [settings | {"data": "elsewhere"}, settings | {"variants": [""]}, settings | {"teacher": "demo"}]
    for other in others:
        assert Results(file).once(other, lambda: {"auroc": 0.7})["auroc"] == 0.7
    assert [json.loads(text)["settings"] for text in file.read_text().splitlines()] == [settings, *others]
