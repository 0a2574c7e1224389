from __future__ import annotations

import pytest

from stpm.scoring.progress import Breaker, Done, Left, Progress, Tally, Tried


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def reported(caplog: pytest.LogCaptureFixture, *, terminal: bool) -> list[str]:
    """Lines on the terminal, or in the log."""
    shown: list[str] = []
    clock = Clock()
    progress = Progress(1000, shown.append if terminal else None, clock)
    for second in range(1, 21):
        clock.now = second
        # Ten seconds of starting, then 50 images a second.
        progress(Done(max(second - 10, 0) * 50, 2, 1))
    return shown if terminal else caplog.messages


def test_a_terminal_shows_each_step_and_a_log_one_in_five_seconds(caplog: pytest.LogCaptureFixture) -> None:
    assert len(reported(caplog, terminal=True)) == 20
    assert len(reported(caplog, terminal=False)) == 4


def test_the_time_of_starting_is_not_the_speed(caplog: pytest.LogCaptureFixture) -> None:
    first, *_, last = reported(caplog, terminal=True)
    assert first == "0/1000 images, 2 errors, 1 anomalous"
    assert last == "500/1000 images, 2 errors, 1 anomalous, 50 images/s, about 10 s left"


def test_a_tally_adds_up() -> None:
    tally = Tally()
    tally.add(Done(16, 1, 2))
    tally.add(Done(4, 0, 1))
    assert tally.read() == Done(20, 1, 3)


def test_a_tally_ends_the_pass_once_most_of_the_latest_images_failed() -> None:
    failed = Tried("decode", 64, 64, "unreadable: expired")
    tally, patient = Tally(), Tally(breaks=False)
    left = [Left(f"{i}.png", "unreadable", "expired") for i in range(64)]
    told = []
    for _ in range(4):
        # Scorers that are behind, and well, do not hide that decoding fails.
        assert tally.add(Done(64), Tried("forward", 64, 0, "")) == ""
        told.append(tally.add(Done(), failed, left))
        assert patient.add(Done(), failed, left) == ""
    assert told == ["", "", "", "256 of the latest 256 images failed, the last one as unreadable: expired"]
    assert tally.broken() == told[-1]
    assert tally.left() == left[:10]


@pytest.mark.parametrize(("share", "opens"), [(0.4, False), (0.6, True)])
def test_the_breaker_opens_above_one_half_of_a_window(share: float, opens: bool) -> None:
    breaker = Breaker(window=100)
    for i in range(99):
        breaker.add(1, 1)
        assert not breaker.is_open, i
    breaker = Breaker(window=100)
    for i in range(1000):
        breaker.add(1, int((i + 1) * share) - int(i * share))
    assert breaker.is_open == opens
    for _ in range(1000):
        breaker.add(1, 0)
    assert breaker.is_open == opens


def test_the_steady_speed_is_without_the_first_quarter() -> None:
    now = 0.0
    tally = Tally(lambda: now)
    assert tally.speed() == 0
    for second, rows in enumerate([0, 10, 10, 10, 50, 100, 100, 100]):
        now = float(second)
        tally.add(Done(rows))
    assert tally.read().rows == 380
    assert tally.speed() == (380 - 180) / 2
    now = 9.0
    tally.add(Done(encode_seconds=1))
    assert tally.speed() == (380 - 180) / 4
