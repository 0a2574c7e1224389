import dataclasses

import pytest

from stpm.fitting.progress import FitProgress
from stpm.fitting.task import Epoch, FitResult, FitTask
from tests.conftest import MODELS, TINY, Clock
from tests.evaluation.runs import result

TASK = FitTask("nut", tuple((str(i), 1) for i in range(10)), dataclasses.replace(TINY, epochs=100), "s", "d")
OTHER = dataclasses.replace(TASK, category="screw")
MEMORY_MODEL = result("nut", 0, None, None, MODELS["memory"]).model


def follow(*, terminal: bool, seconds_per_epoch: float, epochs: int = 100) -> list[str]:
    """Report some epochs of a task and its failure; return the lines shown at the bottom of the terminal."""
    shown: list[str] = []
    clock = Clock()
    progress = FitProgress([TASK, OTHER], shown.append if terminal else None, clock)
    for number in range(1, epochs + 1):
        clock.now += seconds_per_epoch
        progress((TASK.key, Epoch(number, 1 / number, 2 / number, 50.0)))
    progress(FitResult(TASK, reason="it broke"))
    return shown


def test_terminal_shows_a_line_per_epoch_and_a_bar_with_the_time_left(caplog: pytest.LogCaptureFixture) -> None:
    shown = follow(terminal=True, seconds_per_epoch=1.0)
    assert sum("epoch" in line for line in caplog.messages) == 100
    second = caplog.messages[1]
    assert "epoch   2/100  train loss 0.5000  validation loss 1.0000  50 images/s  16 s of this training left" in second
    assert not any("ended" in line for line in caplog.messages)
    assert len(shown) == 101
    assert shown[19] == "[##..................] 0/2 ended, about 3 min left"
    assert shown[-1] == "[##########..........] 1/2 ended, about 2 min left"


def test_log_has_few_lines_with_every_loss_unless_epochs_are_slow(caplog: pytest.LogCaptureFixture) -> None:
    follow(terminal=False, seconds_per_epoch=0.1)
    lines = [line for line in caplog.messages if "epoch" in line]
    assert len(lines) <= 5
    for kind, scale in (("train", 1), ("validation", 2)):
        losses = " ".join(line.split(f"{kind} loss ")[1].split("  ")[0] for line in lines).split()
        assert losses == [f"{scale / n:.4f}" for n in range(1, 101)]
    caplog.clear()
    follow(terminal=False, seconds_per_epoch=6.0)
    assert sum("epoch" in line for line in caplog.messages) == 100
    assert caplog.messages[-1] == "[##########..........] 1/2 ended, about 10 min left"


def test_a_log_is_never_silent_for_long(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    progress = FitProgress([TASK], None, clock)
    for clock.now in range(0, 90, 3):
        progress((TASK.key, "memory of 5 vectors") if clock.now == 39 else None)
    bar = "[....................] 0/1 ended, at work for"
    assert caplog.messages == [f"{bar} 30 s", f"{TASK.key}  memory of 5 vectors", f"{bar} 69 s"]


def test_epochs_after_a_restart_are_a_line_of_their_own(caplog: pytest.LogCaptureFixture) -> None:
    progress = FitProgress([TASK], None, Clock())
    for number in (1, 2, 3, 2, 3):
        progress((TASK.key, Epoch(number, 0.5, 0.5, 10.0)))
    progress(FitResult(TASK, reason="x"))
    *lines, result, _ = [line.partition("epoch ")[2].split("/")[0].strip() or line for line in caplog.messages]
    # Gathered epochs come before the result.
    assert lines == ["1", "2-3", "2-3"]
    assert result.endswith("failed: x")


def test_time_left_after_a_resume_counts_the_epochs_of_this_run() -> None:
    shown: list[str] = []
    clock = Clock()
    progress = FitProgress([TASK, OTHER], shown.append, clock)
    clock.now += 5
    progress((TASK.key, Epoch(91, 0.1, 0.2, 50.0)))
    # 109 more epochs of 5 seconds.
    assert shown == ["[#########...........] 0/2 ended, about 9 min left"]


def test_loss_above_its_start_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    progress = FitProgress([TASK], lambda line: None)
    for number, loss in enumerate((0.8, 0.5, 0.9), 1):
        progress((TASK.key, Epoch(number, loss, 0.5, 50.0)))
    assert ["diverging" in line for line in caplog.messages] == [False, False, True]
    assert "above its start, 0.8000" in caplog.messages[2]


def test_model_without_student_has_no_epochs(caplog: pytest.LogCaptureFixture) -> None:
    FitProgress([TASK], None)(FitResult(TASK, MEMORY_MODEL))
    assert caplog.messages[0] == "nut (seed 0)  fitted in 2.0 s, memory only"


def test_a_node_that_fits_with_other_versions_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    progress = FitProgress([TASK, OTHER], None)
    for task, node in ((TASK, "a"), (OTHER, "b")):
        progress(FitResult(task, dataclasses.replace(MEMORY_MODEL, library_versions={"torch": node}), node=node))
    (warning,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warning.startswith("screw (seed 0)  this run began with torch a, but node b has torch b: ")
