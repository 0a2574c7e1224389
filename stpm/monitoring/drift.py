"""Judge a night of one category against the good images of its model, and against earlier nights.

Report a change if chance does not explain it, and if it is large enough to matter: with 100,000 images, any difference
is significant. docs/drift.md names the tests and limits.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from stpm.data.image_statistics import COMPARED
from stpm.method.calibration import threshold_rank
from stpm.monitoring import image_drift
from stpm.monitoring.change import Change, Level, Limits, percent
from stpm.monitoring.significance import FloatArray, Rate, compare_rates, compare_scores, exceedances, pool

# Factors of the p-values (Bonferroni). Errors, alarms, scores and images share the false-verdict rate equally, so that
# the many tests of images do not weaken the tests of alarms.
_BONFERRONI = {"errors": 4, "alarms": 4 * 2, "scores": 4} | dict.fromkeys(COMPARED, 4 * image_drift.TESTS)

# Distance between the distributions of the night's scores and the calibration's; defects change it by their share.
_SCORES = Limits(0.25, 0.5)
# Alarms beyond the requested rate, as a share of the images: some defects are expected.
_ALARMS = Limits(0.05, 0.15)
# Alarms beyond those of earlier nights.
_MORE_ALARMS = Limits(0.02, 0.05)
_ERRORS = Limits(0.01, 0.1)
# Images that are missing, as a share of the earlier night with the fewest.
_MISSING = Limits(0.5, 0.9)
_MIN_NIGHTS = 3
# An earlier night with a smaller p-value had a fault, and is left out of what is usual.
_FAULT_P_VALUE = 1e-4


@dataclass(frozen=True)
class Reference:
    """The good images of a category, from its model.

    Args:
        calibration_count: number of calibration images.
        statistics: one value for each good image, by name: `stpm.data.image_statistics.COMPARED`.
        added: ranks of the calibration images that a person added, ascending; 1 is the highest score.
    """

    calibration_count: int
    statistics: Mapping[str, FloatArray]
    added: FloatArray = field(default_factory=lambda: np.empty(0))

    def held_out_p_values(self, p_values: FloatArray) -> FloatArray:
        """Return the p-values by a calibration without the added images, which are not a random sample."""
        at_least = np.rint(p_values * (self.calibration_count + 1)) - 1
        at_least -= np.searchsorted(self.added, at_least, side="right")
        return (at_least + 1) / (self.calibration_count - len(self.added) + 1)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of one category's rows of one night.

    Args:
        model_id: of the model that scored most of the images; "" if none did.
        images: number of rows.
        alarms: how many of them are anomalous.
        errors: how many of them have no score, by error kind.
        false_alarm_rate: that was requested.
    """

    model_id: str
    images: int
    alarms: int
    errors: dict[str, int]
    false_alarm_rate: float

    @property
    def error_count(self) -> int:
        """Count the rows without a score."""
        return sum(self.errors.values())

    @property
    def scored(self) -> int:
        """Count the rows with a score."""
        return self.images - self.error_count

    @property
    def alarm_rate(self) -> Rate | None:
        """Return the alarms among the rows with a score; None if there are none."""
        return Rate(self.alarms, self.scored) if self.scored else None

    @property
    def error_rate(self) -> Rate | None:
        """Return the errors among all rows; None if there are none."""
        return Rate(self.error_count, self.images) if self.images else None


class Sample(NamedTuple):
    """One category's rows with a score of one night, or a random sample of them.

    Args:
        p_values: one for each image.
        statistics: of the same images in the same order, by name as in `Reference`.
    """

    p_values: FloatArray
    statistics: Mapping[str, FloatArray]


@dataclass(frozen=True)
class Verdict:
    """The verdict on a night. Causes come before their consequences, and large changes before small ones.

    The p-values of its changes are corrected for all verdicts that are given together.
    """

    level: Level
    changes: tuple[Change, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Return what changed, for people."""
        return tuple(change.text for change in self.changes)


def judge(
    night: Counts,
    sample: Sample,
    earlier: Mapping[datetime.date, Counts],
    reference: Reference | None,
    *,
    tests: int,
    false_verdict_rate: float,
) -> Verdict:
    """Judge a night of one category.

    Args:
        night: the counts of all its rows.
        sample: of its rows with a score.
        earlier: the counts of the nights before it, by date; images are compared with the model's alone.
        reference: of the model that scored the night; None if there is none.
        tests: number of verdicts that are given together (categories × nights).
        false_verdict_rate: probability, in (0, 1), that any of these verdicts is not `fine` though nothing changed.
    """
    found: list[Change] = []
    for change in _changes(night, sample, earlier, reference):
        adjusted = min(change.p_value * _BONFERRONI.get(change.name, 1) * tests, 1.0)
        if change.level != "fine" and adjusted <= false_verdict_rate:
            found.append(replace(change, p_value=adjusted))
    level: Level = "fine"
    if found:
        level = "act" if any(change.level == "act" for change in found) else "watch"
    # Keep the larger of two changes with one name.
    by_name = {change.name: change for change in sorted(found, key=lambda change: change.size)}
    return Verdict(level, tuple(sorted(by_name.values(), key=_order)))


def _order(change: Change) -> tuple[int, float]:
    groups = (("images", "repeated", "errors"), COMPARED, ("alarms",), ("scores",))
    return next(i for i, names in enumerate(groups) if change.name in names), -change.size


def _changes(
    night: Counts, sample: Sample, earlier: Mapping[datetime.date, Counts], reference: Reference | None
) -> Iterator[Change]:
    """Yield what may have changed, with the p-value of each test alone."""
    counts = list(earlier.values())
    yield from _fewer_images(night, earlier)
    yield from _errors(night, counts)
    if not reference or not len(sample.p_values):
        return
    distinct, commonest = image_drift.distinct_rows(sample.statistics)
    repeated = list(image_drift.repeated_picture(night.scored, len(sample.p_values), commonest))
    yield from repeated
    if any(change.level == "act" for change in repeated):
        # The other changes follow from that.
        return
    statistics = {name: values[distinct] for name, values in sample.statistics.items()}
    yield from image_drift.compare_statistics(statistics, reference.statistics)
    yield from _alarms(night, counts, reference.calibration_count)
    held_out = reference.calibration_count - len(reference.added)
    if held_out:
        yield _scores(reference.held_out_p_values(sample.p_values[distinct]), held_out)


def _fewer_images(night: Counts, earlier: Mapping[datetime.date, Counts]) -> Iterator[Change]:
    counts = [past.images for past in earlier.values()]
    if not night.images:
        last = max((date for date, past in earlier.items() if past.images), default=None)
        since = [date for date in earlier if last and date > last]
        pauses = counts.count(0) - len(since)
        text = "no images tonight"
        if last:
            text += f"; {earlier[last].images:,} on {last}"
        if pauses:
            text += f", and none on {counts.count(0)} of the last {len(earlier)} nights"
        # A product that is no longer made needs no action every night.
        is_new = len(since) < _MIN_NIGHTS
        level: Level = "act" if last and is_new and not pauses else "watch"
        yield Change("images", level, p_value=0.0, size=1.0, text=text)
        return
    present = [count for count in counts if count]
    if len(present) >= _MIN_NIGHTS:
        missing = 1 - night.images / min(present)
        if (level := _MISSING.level(missing)) != "fine":
            text = (
                f"only {night.images:,} images; never fewer than {min(present):,} on the {len(present)} nights before"
            )
            yield Change("images", level, p_value=0.0, size=missing / _MISSING.act, text=text)


def _errors(night: Counts, earlier: Sequence[Counts]) -> Iterator[Change]:
    rate = night.error_rate
    if not rate or not rate.events:
        return
    usual = _usual([past.error_rate for past in earlier], _ERRORS.watch)
    # Without earlier nights, one error in a hundred images is expected.
    share = pool(usual).value if usual else 0.0
    text = f"{percent(rate.value)} of the images are errors ({rate.events:,} of {rate.total:,})"
    if usual:
        text += f", usually {percent(share)}"
    excess = rate.value - share
    p_value = compare_rates(rate, usual or [Rate(1, 100)])
    yield Change("errors", _ERRORS.level(excess), p_value=p_value, size=excess / _ERRORS.act, text=text)


def _alarms(night: Counts, earlier: Sequence[Counts], calibration_count: int) -> Iterator[Change]:
    """Compare alarms with earlier nights of the same model, and with the rate that its calibration promises."""
    rate = night.alarm_rate
    if not rate or not calibration_count:
        return
    low, high = rate.interval()
    found = (
        f"{percent(rate.value)} of the images ({rate.events:,} of {rate.total:,}, 95 % interval {percent(low)} to "
        f"{percent(high)})"
    )
    wanted = (night.model_id, night.false_alarm_rate)
    same = [past for past in earlier if (past.model_id, past.false_alarm_rate) == wanted]
    if usual := _usual([past.alarm_rate for past in same], _MORE_ALARMS.watch):
        share = pool(usual).value
        excess = rate.value - share
        text = f"more alarms than usual: {found}, {percent(share)} on {len(usual)} nights before"
        p_value = compare_rates(rate, usual)
        level = _MORE_ALARMS.level(excess)
        yield Change("alarms", level, p_value=p_value, size=excess / _MORE_ALARMS.act, text=text)
    rank = threshold_rank(calibration_count, night.false_alarm_rate)
    excess = rate.value - rank / (calibration_count + 1)
    defects = min(math.ceil(_ALARMS.watch * rate.total), rate.events)
    p_value = exceedances(rate.events - defects, rate.total - defects, calibration_count, rank)
    text = f"more alarms than the requested {percent(night.false_alarm_rate)}: {found}"
    yield Change("alarms", _ALARMS.level(excess), p_value=p_value, size=excess / _ALARMS.act, text=text)


def _usual(rates: Sequence[Rate | None], margin: float) -> list[Rate]:
    """Return the rates, lowest first, without those that stand out above all lower ones by more than a margin."""
    usual: list[Rate] = []
    for rate in sorted(filter(None, rates), key=lambda rate: rate.value):
        if not (usual and rate.value > pool(usual).value + margin and compare_rates(rate, usual) < _FAULT_P_VALUE):
            usual.append(rate)
    return usual


def _scores(p_values: FloatArray, calibration_count: int) -> Change:
    distance, p_value = compare_scores(p_values, calibration_count)
    middle = float(np.median(p_values))
    if middle < 0.5:
        text = f"scores are higher than the calibration's: half of the images score above {percent(1 - middle)} of it"
        cause = "has the product changed, or the model aged?"
    else:
        text = f"scores are lower than the calibration's: half of the images score below {percent(middle)} of it"
        cause = "do the images still show what they should?"
    level, size = _SCORES.level(distance), distance / _SCORES.act
    return Change("scores", level, p_value=p_value, size=size, text=f"{text}; {cause}")
