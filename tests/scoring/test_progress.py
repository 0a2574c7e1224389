import logging
from unittest.mock import Mock

import pytest
from ray.exceptions import ActorDiedError

from stpm.models.libraries import NodeVersions
from stpm.scoring.progress import (
    BatchReport,
    ProgressActor,
    ProgressDisplay,
    ProgressReporter,
    Snapshot,
    WarningRelay,
)
from stpm.scoring.run_statistics import RunStatistics, UnfinishedImage
from tests.conftest import Clock


def test_progress_is_a_line_each_update_or_five_seconds(caplog: pytest.LogCaptureFixture) -> None:
    shown: list[str] = []
    clock = Clock()
    for display in (ProgressDisplay(1000, shown.append, clock), ProgressDisplay(1000, None, clock)):
        start = clock.now
        for second in range(1, 21):
            clock.now = start + second
            # The speed is not known from the beginning.
            speed = 50.0 if second > 10 else 0.0
            statistics = RunStatistics(max(second - 10, 0) * 50, 2, 1, steady_images_per_second=speed)
            display.update(Snapshot(statistics, [], "", []))
    # At 5, 11 and 16 s: a line that stays the same is not repeated.
    assert (len(shown), len(caplog.messages)) == (20, 3)
    for _ in range(60):
        clock.now += 1
        display.update(Snapshot(statistics, [], "", []))
    assert caplog.messages[3:] == [shown[-1]] * 2
    assert shown[0] == "0/1000 images, 2 errors, 1 anomalous"
    assert shown[-1] == "500/1000 images, 2 errors, 1 anomalous, 50 images/s, about 10 s left"


def test_nodes_with_other_versions_than_the_run_began_with_are_a_warning_each() -> None:
    actor = ProgressActor(versions={"torch": "1.0", "openvino": "5"})
    nodes = [("1.0", {"openvino": "5"}), ("2.0", {"pillow": "9"}), ("2.0", {"pillow": "9"}), ("3.0", {"openvino": "5"})]
    for number, (torch, others) in enumerate(nodes):
        for stage in ("decode", "score"):
            versions = NodeVersions(f"10.0.0.{number}", {"torch": torch} | others)
            actor.add(BatchReport(stage, RunStatistics(), origin=versions))
    both, torch_alone = actor.read().warnings
    assert both == (
        "this run began with torch 1.0, openvino 5, pillow missing, but node 10.0.0.1 has torch 2.0, openvino missing, "
        "pillow 9: results may differ slightly. Install deploy/constraints.txt on all nodes"
    )
    assert torch_alone.startswith("this run began with torch 1.0, but node 10.0.0.3 has torch 3.0: ")


def test_progress_actor_stops_the_run_once_most_of_the_latest_images_of_a_stage_failed() -> None:
    actor, patient = ProgressActor(), ProgressActor(stop_on_failures=False)
    unfinished = [UnfinishedImage(f"{i}.png", "unreadable", "expired") for i in range(64)]
    reasons = []
    for _ in range(4):
        # Successes of the scorers, which are behind, do not hide that decoding fails.
        assert actor.add(BatchReport("score", RunStatistics(64), attempted=64)) == ""
        failed = BatchReport("decode", RunStatistics(), 64, ["unreadable: expired"] * 64, unfinished)
        reasons.append(actor.add(failed))
        assert patient.add(failed) == ""
    assert reasons[:3] == ["", "", ""]
    assert reasons[3].startswith("256 of the latest 256 images failed, the last one with unreadable: expired. With ")
    assert actor.read().unfinished == unfinished[:10]
    # The decision stays, whatever comes.
    actor.add(BatchReport("decode", RunStatistics(), attempted=1000))
    assert actor.read().stop_reason == reasons[-1]


@pytest.mark.parametrize(("fraction", "stops"), [(0.4, False), (0.6, True)])
def test_progress_actor_stops_above_half_of_the_latest_images(fraction: float, stops: bool) -> None:
    actor = ProgressActor()
    for i in range(1000):
        errors = ["error"] * (int((i + 1) * fraction) - int(i * fraction))
        actor.add(BatchReport("score", RunStatistics(), 1, errors))
    assert bool(actor.read().stop_reason) == stops
    # A good batch may be the one that fills the window: the last error is named.
    other = ProgressActor()
    assert other.add(BatchReport("score", RunStatistics(), 200, [*["first"] * 199, "last"])) == ""
    reason = other.add(BatchReport("score", RunStatistics(), attempted=60))
    assert reason.startswith("196 of the latest 256 images failed, the last one with last. With --accept-errors ")


class LocalReporter(ProgressReporter):
    """A reporter to an actor in this process."""

    def warn(self, message: str) -> None:
        self._actor.warn(message)


def test_the_driver_logs_each_warning_of_the_scorers_once(caplog: pytest.LogCaptureFixture) -> None:
    actor = ProgressActor()
    workers = [logging.Logger(f"worker {number}") for number in range(2)]
    for worker in workers:
        worker.addHandler(WarningRelay(LocalReporter(actor)))
        worker.info("fine")
        worker.warning("%s; PyTorch computes it instead", "OpenVINO cannot")
        worker.error("a traceback stays in the worker's log")
    display = ProgressDisplay(1000, None, Clock())
    for _ in range(2):
        display.update(actor.read())
    workers[0].warning("again")
    display.update(actor.read())
    assert caplog.messages == ["OpenVINO cannot; PyTorch computes it instead", "again"]
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    for number in range(100):
        actor.warn(f"warning {number}")
    assert len(actor.read().warnings) == 10
    display.end(actor.read())
    assert caplog.messages[-2:] == ["warning 7", "and 92 more warnings"]


def test_a_warning_that_cannot_be_sent_raises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("worker")
    log.addHandler(WarningRelay(Mock(warn=Mock(side_effect=ActorDiedError()))))
    log.warning("many images")
    assert "ActorDiedError" in capsys.readouterr().err


def test_statistics_add_up_and_the_steady_speed_excludes_the_first_quarter() -> None:
    clock = Clock()
    actor = ProgressActor(clock)
    assert actor.read().statistics == RunStatistics()
    for second, images in enumerate([0, 10, 10, 10, 50, 100, 100, 100]):
        clock.now = float(second)
        actor.add(BatchReport("score", RunStatistics(images, 1, 2, score_seconds=0.5)))
    assert actor.read().statistics == RunStatistics(
        380, 8, 16, score_seconds=4.0, steady_images_per_second=(380 - 180) / 2
    )
    clock.now = 9.0
    actor.add(BatchReport("draw", RunStatistics(draw_seconds=1)))
    assert actor.read().statistics.steady_images_per_second == (380 - 180) / 4
    # Within a second it is that of all images, and unknown once the first quarter has no time of its own.
    actor = ProgressActor(clock)
    for clock.now in (1000.0, 1000.1, 1000.2):
        actor.add(BatchReport("score", RunStatistics(100)))
    assert actor.read().statistics.steady_images_per_second == pytest.approx(200 / 0.2, rel=1e-3)
    for clock.now in (1000.3, 1000.4):
        actor.add(BatchReport("score", RunStatistics(1000)))
    assert actor.read().statistics.steady_images_per_second == 0
