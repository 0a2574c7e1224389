"""Judge a night of one category against the good images of its model, and against earlier nights.

Report a change if chance does not explain it, and if it is large enough to matter: with 100,000 images, any difference
is significant. docs/drift.md names the tests and limits.
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from stpm.data.image_statistics import COMPARED
from stpm.line import image_drift
from stpm.line.change import LEVELS, Change, Level, Limits, percent
from stpm.line.night import CategoryNight, Night
from stpm.line.options import MonitoringOptions
from stpm.line.significance import (
    FloatArray,
    Rate,
    compare_nights,
    compare_samples,
    exceedances,
    pool,
    pool_groups,
)
from stpm.method.calibration import min_calibration_images, threshold_rank

# One category's rows with a score of one night, or a random sample of them: `p_value` and the statistics of COMPARED by
# name, each with one value for each image.
Sample = Mapping[str, FloatArray]

# Nights with which a night is compared: thirteen weeks, from which it shows how much the same weekdays differ.
EARLIER = 91
# Nights that are compared together with those before: a small change takes more than one to stand out.
_WINDOWS = (1, 3)
# Factors of the p-values (Bonferroni). Numbers of images, errors, alarms, scores and images' statistics each get an
# equal part of the false-verdict rate, so that the many tests of statistics do not weaken the others.
_KINDS = 5
_BONFERRONI = {
    "images": _KINDS * len(_WINDOWS),
    "errors": _KINDS * (len(_WINDOWS) + 1),
    "alarms": _KINDS * (len(_WINDOWS) + 1),
    "scores": _KINDS,
    **dict.fromkeys(COMPARED, _KINDS * image_drift.TESTS),
}
# Causes come before their consequences: what else there is, these, alarms, scores.
_CONSEQUENCES = {**dict.fromkeys(COMPARED, 1), "alarms": 2, "scores": 3}

# Distance between the distributions of the night's scores and the calibration's; defects change it by their fraction.
_SCORES = Limits(0.25, 0.5)
# Alarms beyond the requested rate, as a fraction of the images: some defects are expected.
_ALARMS = Limits(0.05, 0.15)
# A night cannot tell if chance may explain as many alarms: the requested ones, and half of the other images.
_PLAIN = 0.5
# Numbers of images, or of calibration images, that a night may need: round ones, as the need is no sharp limit.
_SIZES = (5, 10, 15, 20, 30, 40, 50, 70, 100, 150, 200, 300, 500, 1000, 10_000, 100_000)
# Alarms beyond those of earlier nights.
_MORE_ALARMS = Limits(0.02, 0.05)
_ERRORS = Limits(0.01, 0.1)
# Images that are missing, as a fraction of those that are usual.
_MISSING = Limits(0.3, 0.9)
# Weeks of nights from which on a night is always compared with those of the same weekday.
_MIN_WEEKS = 3
# A product without images on this many nights is perhaps no longer made, and needs no action every night.
_NO_LONGER_MADE = 3
# Errors of a night of which nothing is known yet: on average one among a hundred images (beta-binomial).
_UNKNOWN_ERRORS = 99
# An earlier night with a smaller p-value had a fault, and is left out of what is usual.
_FAULT_P_VALUE = 1e-4


@dataclass(frozen=True)
class Reference:
    """The good images of a category, from its model.

    Args:
        statistics: one value for each good image, by name: `stpm.data.image_statistics.COMPARED`.
        added: ranks of the calibration images that a person added, ascending; 1 is the highest score.
        decision: the threshold that a person set, for people; "": the requested rate sets it.
        decided_rate: of good images, the fraction that is expected above that threshold.
        problem: why there are none, for people; "" if there are.
    """

    calibration_count: int = 0
    statistics: Mapping[str, FloatArray] = field(default_factory=dict)
    added: FloatArray = field(default_factory=lambda: np.empty(0))
    decision: str = ""
    decided_rate: float = 0.0
    problem: str = ""

    def compare_scores(self, p_values: FloatArray) -> tuple[float, float, float]:
        """Compare scores, by their p-values, with those of the calibration that no person added: a random sample.

        Returns:
            Distance and p-value, as of `compare_samples`, and the median of the p-values by that calibration.
        """
        # A p-value gives the rank of a score among the calibration's, and the test needs only ranks.
        as_high = np.rint(np.asarray(p_values, np.float64) * (self.calibration_count + 1)) - 1
        as_high -= np.searchsorted(self.added, as_high, side="right")
        count = self.calibration_count - len(self.added)
        # Calibration scores at 1 to n in descending order, and the night's between them.
        distance, p_value = compare_samples(as_high + 0.5, np.arange(1.0, count + 1))
        return distance, p_value, float(np.median(as_high) + 1) / (count + 1)


def judge(
    night: Night,
    name: str,
    sample: Sample,
    reference: Reference,
    earlier: Sequence[Night],
    options: MonitoringOptions,
) -> CategoryNight:
    """Return a category of a night with its verdict, by the counts of all its rows and a sample of those with a score.

    Args:
        night: with all categories, since `options.false_verdict_rate` holds for all verdicts of a page together.
        reference: the good images of the model that scored the category. Images whose model has none are a reason to
            act; a night without scores needs none.
        earlier: the nights before it, oldest first, for what is counted; images are compared with the model's.
    """
    category, tests = night.categories[name], len(night.categories) * options.nights
    if category.images and reference.problem:
        return replace(category, level="act", changes=(Change("model", "act", 0.0, 1.0, reference.problem),))
    # Images may be missing from nights that were not judged.
    found_before = ((each.day, each.categories.get(name)) for each in earlier[-EARLIER:])
    before = {day: each for day, each in found_before if each and each.level != "not judged"}
    past = list(before.values())
    changes = (
        *_fewer_images(before | {night.day: category}, night),
        *_errors(category, past),
        *_images_and_scores(category, sample, past, reference),
    )
    # Of two changes with one name, keep the larger one.
    found: dict[str, Change] = {}
    for change in sorted(changes, key=lambda change: change.size):
        adjusted = min(change.p_value * _BONFERRONI.get(change.name, 1) * tests, 1.0)
        if change.level != "fine" and adjusted <= options.false_verdict_rate:
            found[change.name] = replace(change, p_value=adjusted)
    if not found and category.images:
        limit = options.false_verdict_rate / (_BONFERRONI["alarms"] * tests)
        found = {change.name: change for change in _doubts(category, past, reference, limit)}
    ordered = sorted(found.values(), key=lambda change: (_CONSEQUENCES.get(change.name, 0), -change.size))
    levels: list[Level] = ["fine", *(change.level for change in ordered)]
    return replace(category, level=min(levels, key=LEVELS.index), changes=tuple(ordered))


def _doubts(
    night: CategoryNight, earlier: Sequence[CategoryNight], reference: Reference, limit: float
) -> Iterator[Change]:
    """Say what a night needs, unless the p-value of plainly too many alarms would be at most the limit."""
    count, rate = reference.calibration_count, night.false_alarm_rate
    share = rate + _PLAIN * (1 - rate)
    plain = replace(night, alarms=math.ceil(share * night.scored))
    if any(change.p_value <= limit for change in _alarms(plain, earlier, count)):
        return

    def tells(images: int, calibration: int) -> bool:
        return _above_requested(math.ceil(share * images), images, calibration, rate) <= limit

    candidates = (count, min_calibration_images(rate), *_SIZES)
    needed = next((each for each in candidates if each >= count and tells(_SIZES[-1], each)), 0)
    text = f"{percent(share)} of the images could be alarms by chance"
    if not needed:
        text += f"; too many false alarms are expected, {percent(rate)}: set a threshold that makes fewer"
    elif needed > count:
        what = "does not promise the expected" if night.decision else "cannot support the requested"
        text += f"; the threshold {what} {percent(rate)}: {count} good images calibrate it, and {needed} are needed"
    if needed and not tells(night.scored, needed):
        images = next(each for each in _SIZES if each > night.scored and tells(each, needed))
        text += f"; too few images: {night.scored} with a score, and {images} are needed"
    yield Change("alarms", "cannot tell", p_value=1.0, size=0.0, text=text)


def _images_and_scores(
    night: CategoryNight, sample: Sample, earlier: Sequence[CategoryNight], reference: Reference
) -> Iterator[Change]:
    """Compare images, alarms and scores with the model's good images."""
    if not len(sample["p_value"]):
        return
    distinct, repeated = image_drift.find_copies(sample, night.scored)
    if repeated:
        yield repeated
        if repeated.level == "act":
            # The other changes follow from that.
            return
    sample = {name: values[distinct] for name, values in sample.items()}
    yield from image_drift.compare_statistics(sample, reference.statistics)
    yield from _alarms(night, earlier, reference.calibration_count)
    if reference.calibration_count > len(reference.added):
        distance, p_value, middle = reference.compare_scores(sample["p_value"])
        if middle < 0.5:
            text = f"higher than the calibration's: half of the images score above {percent(1 - middle)} of it"
            cause = "has the product changed, or the model aged?"
        else:
            text = f"lower than the calibration's: half of the images score below {percent(middle)} of it"
            cause = "do the images still show what they should?"
        yield _SCORES.change("scores", distance, p_value, f"scores are {text}; {cause}")


def _fewer_images(nights: Mapping[datetime.date, CategoryNight], last: Night) -> Iterator[Change]:
    """Compare with the same weekdays, or in the first weeks of a product that never rests with all nights."""
    counts = [Rate(each.images, 1, day.weekday()) for day, each in nights.items()]
    for length in _WINDOWS:
        now, before = counts[-length:], counts[:-length]
        weeks = Counter(night.group for night in before)
        fewest = min(weeks[night.group] for night in now)
        # The line may rest on a weekday of which there was none yet.
        if not fewest:
            continue
        if fewest < _MIN_WEEKS and all(night.events for night in before):
            now, before = ([night._replace(group=0) for night in part] for part in (now, before))
        usual, found = pool_groups(before), pool(now).events
        expected = sum(usual[night.group].value for night in now)
        missing = 1 - found / expected if expected else 0.0
        # Most nights need no test.
        if _MISSING.level(missing) != "fine":
            p_value = compare_nights(now, before, fewer=True)
            if counts[-1].events:
                text = f"only {found:,} images{_on(now)}; {expected:,.0f} are usual"
                yield _MISSING.change("images", missing, p_value, text)
            else:
                yield _MISSING.change("images", missing, p_value, *_describe_empty(nights, last))


def _describe_empty(nights: Mapping[datetime.date, CategoryNight], last: Night) -> tuple[str, Level]:
    """Describe a night without images, after others with some, and return the highest level that it can have."""
    day = max(day for day, each in nights.items() if each.images)
    text = f"no images tonight; {nights[day].images:,} on {day}"
    others = [not each.images for each in last.categories.values()]
    if len(others) > 1 and sum(others) > len(others) / 2:
        return f"{text}. Most categories have none: was the plant closed, or are files missing?", "watch"
    return text, "act" if sum(each > day for each in nights) <= _NO_LONGER_MADE else "watch"


def _errors(night: CategoryNight, earlier: Sequence[CategoryNight]) -> Iterator[Change]:
    """Compare errors with earlier nights, and with what is expected of a night of which nothing is known."""
    rate = night.error_rate
    if not rate or not rate.events:
        return
    rates = [*filter(None, (past.error_rate for past in earlier)), rate]
    unknown = exceedances(rate.events, rate.total, _UNKNOWN_ERRORS)
    for now, usual, p_value in (
        ([rate], _usual(rates[:-1], _ERRORS.watch), unknown),
        *_compare_with_usual(rates, _ERRORS),
    ):
        recent, before = pool(now), pool(usual).value if usual else 0.0
        text = f"{percent(recent.value)} of the images{_on(now)} are errors ({recent.events:,} of {recent.total:,})"
        text += f", usually {percent(before)}" if usual else ""
        yield _ERRORS.change("errors", recent.value - before, p_value, text)


def _alarms(night: CategoryNight, earlier: Sequence[CategoryNight], calibration_count: int) -> Iterator[Change]:
    """Compare alarms with earlier nights of the same model, and with the rate that its calibration promises.

    Another model's nights say little: the threshold of n calibration images alone makes the share of good images above
    it vary by 100 % between models at a rate of 1/(n+1).
    """
    rate = night.alarm_rate
    if not rate or not calibration_count:
        return
    wanted = (night.model_id, night.false_alarm_rate)
    same = [past.alarm_rate for past in earlier if (past.model_id, past.false_alarm_rate) == wanted]
    for now, usual, p_value in _compare_with_usual([*filter(None, same), rate], _MORE_ALARMS):
        recent, before = pool(now), pool(usual).value
        text = f"more alarms than usual: {_describe(recent)}{_on(now)}, {percent(before)} on {len(usual)} nights before"
        yield _MORE_ALARMS.change("alarms", recent.value - before, p_value, text)
    what = "the threshold that a person decided lets expect" if night.decision else "the requested"
    text = f"more alarms than {what} {percent(night.false_alarm_rate)}: {_describe(rate)}"
    p_value = _above_requested(rate.events, rate.total, calibration_count, night.false_alarm_rate)
    rank = threshold_rank(calibration_count, night.false_alarm_rate)
    yield _ALARMS.change("alarms", rate.value - rank / (calibration_count + 1), p_value, text)


def _above_requested(alarms: int, images: int, calibration_count: int, false_alarm_rate: float) -> float:
    """Return the p-value of as many alarms or more above a calibration's threshold, beside the expected defects."""
    if false_alarm_rate >= 1:
        # A person decided a threshold below all calibration scores.
        return 1.0
    defects = min(math.ceil(_ALARMS.watch * images), alarms)
    rank = threshold_rank(calibration_count, false_alarm_rate)
    return exceedances(alarms - defects, images - defects, calibration_count, rank)


def _describe(rate: Rate) -> str:
    low, high = map(percent, rate.interval())
    return f"{percent(rate.value)} of the images ({rate.events:,} of {rate.total:,}, 95 % interval {low} to {high})"


def _on(nights: Sequence[object]) -> str:
    return f" on the last {len(nights)} nights" if len(nights) > 1 else ""


def _compare_with_usual(rates: Sequence[Rate], limits: Limits) -> Iterator[tuple[Sequence[Rate], list[Rate], float]]:
    """Yield the last nights whose rate is above that of the nights before by a limit, those nights, and the p-value."""
    for length in _WINDOWS:
        now, before = rates[-length:], rates[:-length]
        rate = pool(now).value
        # Most nights need no test.
        if not before or rate - min(night.value for night in before) < limits.watch:
            continue
        usual = _usual(before, limits.watch)
        if limits.level(rate - pool(usual).value) != "fine":
            yield now, usual, compare_nights(now, usual)


def _usual(rates: Sequence[Rate], margin: float) -> list[Rate]:
    """Return the rates, lowest first, without those that stand out above all lower ones by more than a margin."""
    usual: list[Rate] = []
    for rate in sorted(rates, key=lambda rate: rate.value):
        if not (usual and rate.value > pool(usual).value + margin and compare_nights([rate], usual) < _FAULT_P_VALUE):
            usual.append(rate)
    return usual
