from __future__ import annotations

import dataclasses

from stpm.fitting.progress import FitProgress
from stpm.fitting.task import Epoch, FitTask, Outcome
from stpm.method.calibration import HeatmapScale
from stpm.models.record import FitSummary, ModelRecord
from tests.conftest import TINY, preprocessing_of

TASK = FitTask("nut", tuple((str(i), 1) for i in range(10)), dataclasses.replace(TINY, epochs=100), "s", "d")
OTHER = dataclasses.replace(TASK, category="screw")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def told(watched: bool, seconds_per_epoch: float, epochs: int = 100) -> list[str]:
    return both_told(watched, seconds_per_epoch, epochs)[0]


def both_told(watched: bool, seconds_per_epoch: float, epochs: int = 100) -> tuple[list[str], list[str]]:
    """What was said, and what was shown at the bottom."""
    lines: list[str] = []
    shown: list[str] = []
    clock = Clock()
    teller = FitProgress([TASK, OTHER], lines.append, shown.append if watched else None, clock)
    for number in range(1, epochs + 1):
        clock.now += seconds_per_epoch
        teller((TASK.key, Epoch(number, 1 / number, 2 / number, 50.0)))
    teller(Outcome.failed(TASK, "it broke"))
    return lines, shown


def test_where_someone_watches_each_epoch_is_a_line() -> None:
    lines = told(True, 0.1)
    assert sum("epoch" in line for line in lines) == 100
    assert "epoch   2/100  train loss 0.5000  validation loss 1.0000  50 images/s  16 s left" in lines[1]


def test_a_log_has_few_lines_and_every_loss() -> None:
    lines = [line for line in told(False, 0.1) if "epoch" in line]
    assert len(lines) <= 5
    for kind, scale in (("train", 1), ("validation", 2)):
        losses = " ".join(line.split(f"{kind} loss ")[1].split("  ")[0] for line in lines).split()
        assert losses == [f"{scale / n:.4f}" for n in range(1, 101)]


def test_slow_epochs_are_told_at_once_in_a_log_too() -> None:
    assert sum("epoch" in line for line in told(False, 6.0)) == 100


def test_what_was_gathered_is_told_before_the_end() -> None:
    lines = told(False, 0.1, epochs=3)
    assert ["epoch" in line for line in lines] == [True, True, False, False]
    assert "epoch 2-3/100" in lines[1]
    assert lines[2].endswith("failed: it broke")


def test_the_whole_has_a_bar_and_a_time_left() -> None:
    assert told(False, 1.0)[-1] == "[##########..........] 1/2 ended, about 2 min left"
    lines, shown = both_told(True, 1.0)
    assert not any("ended" in line for line in lines)
    assert len(shown) == 101
    assert shown[19] == "[##..................] 0/2 ended, about 3 min left"
    assert shown[-1] == "[##########..........] 1/2 ended, about 2 min left"


def test_a_loss_above_its_start_is_said() -> None:
    lines: list[str] = []
    teller = FitProgress([TASK], lines.append, lambda line: None)
    for number, loss in enumerate((0.8, 0.5, 0.9), 1):
        teller((TASK.key, Epoch(number, loss, 0.5, 50.0)))
    assert ["diverging" in line for line in lines] == [False, False, True]
    assert "above its start, 0.8000" in lines[2]


def test_of_a_model_without_a_student_no_epoch_is_told() -> None:
    lines: list[str] = []
    fit = FitSummary(3.21, 0, 0, None, None, 8, 2, 2, "cpu")
    record = ModelRecord("nut", TINY, preprocessing_of(64), "float32", "", HeatmapScale(0, 1), (), fit, {}, {}, "")
    FitProgress([TASK], lines.append, None)(Outcome.done(TASK, record, "fitted"))
    assert lines[0] == "nut (seed 0)  fitted in 3.2 s, a memory alone"
