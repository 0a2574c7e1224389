"""Judge a night of one category against the good images of its model, and against earlier nights.

Report a change if chance does not explain it, and if it is large enough to matter: with 100,000 images, any difference
is significant. docs/drift.md names the tests and limits.
"""

from __future__ import annotations

import datetime
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from stpm.data.image_statistics import COMPARED
from stpm.line import image_drift
from stpm.line.change import LEVELS, Change, Level, Limits, Verdict, percent
from stpm.line.night import CategoryNight, Night
from stpm.line.options import MonitoringOptions
from stpm.line.significance import (
    FloatArray,
    Rate,
    compare_counts,
    compare_rates,
    compare_scores,
    exceedances,
    pool,
)
from stpm.method.calibration import min_calibration_images, threshold_rank

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
# Causes come before their consequences.
_ORDER = {
    name: i
    for i, names in enumerate((("images", "repeated", "errors"), COMPARED, ("alarms",), ("scores",)))
    for name in names
}

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

    def held_out_p_values(self, p_values: FloatArray) -> FloatArray:
        """Return the p-values by a calibration without the added images, which are not a random sample."""
        as_high = np.rint(p_values * (self.calibration_count + 1)) - 1
        as_high -= np.searchsorted(self.added, as_high, side="right")
        return (as_high + 1) / (self.calibration_count - len(self.added) + 1)


class Sample(NamedTuple):
    """One category's rows with a score of one night, or a random sample of them.

    Args:
        p_values: one for each image.
        statistics: of the same images in the same order, by name as in `Reference`.
    """

    p_values: FloatArray
    statistics: Mapping[str, FloatArray]


def judge_categories(
    night: Night,
    samples: Mapping[str, Sample],
    references: Mapping[str, Reference],
    earlier: Sequence[Night],
    options: MonitoringOptions,
) -> dict[str, CategoryNight]:
    """Return the categories of a night with their verdicts, given those of the nights before it, oldest first.

    Images whose model has no good images are a reason to act.
    """
    categories = night.categories
    is_idle = sum(not each.images for each in categories.values()) > len(categories) / 2 and len(categories) > 1
    judged = {}
    for name, category in categories.items():
        reference = references[name]
        if category.images and reference.problem:
            verdict = Verdict("act", (Change("model", "act", p_value=0.0, size=1.0, text=reference.problem),))
        else:
            # Images may be missing from nights that were not judged.
            past = {n.day: each for n in earlier[-EARLIER:] if (each := n.categories.get(name)) and each.verdict}
            verdict = judge(
                category,
                samples[name],
                past,
                reference,
                date=night.day,
                is_idle=is_idle,
                tests=len(categories) * options.nights,
                false_verdict_rate=options.false_verdict_rate,
            )
        judged[name] = replace(category, verdict=verdict)
    return judged


def judge(
    night: CategoryNight,
    sample: Sample,
    earlier: Mapping[datetime.date, CategoryNight],
    reference: Reference,
    *,
    date: datetime.date,
    is_idle: bool,
    tests: int,
    false_verdict_rate: float,
) -> Verdict:
    """Judge a night of one category, by the counts of all its rows and a sample of those with a score.

    Args:
        night, sample: what is judged.
        earlier: the category's nights before it by date, for what is counted; images are compared with the model's.
        reference: the good images of the model that scored the night; it needs none for a night without scores.
        date: of the night, for its weekday.
        is_idle: most categories have no images on this night.
        tests: number of verdicts that are given together (categories × nights).
        false_verdict_rate: probability, in (0, 1), that any of these is `watch` or `act` though nothing has changed.
    """
    changes = (
        *_fewer_images(night, date, earlier, is_idle),
        *_errors(night, list(earlier.values())),
        *_images_and_scores(night, sample, list(earlier.values()), reference),
    )
    # Of two changes with one name, keep the larger one.
    found: dict[str, Change] = {}
    for change in sorted(changes, key=lambda change: change.size):
        adjusted = min(change.p_value * _BONFERRONI.get(change.name, 1) * tests, 1.0)
        if change.level != "fine" and adjusted <= false_verdict_rate:
            found[change.name] = replace(change, p_value=adjusted)
    if not found and night.images:
        limit = false_verdict_rate / (_BONFERRONI["alarms"] * tests)
        found = {change.name: change for change in _doubts(night, list(earlier.values()), reference, limit)}
    ordered = sorted(found.values(), key=lambda change: (_ORDER[change.name], -change.size))
    return Verdict(max((change.level for change in ordered), default="fine", key=LEVELS.index), tuple(ordered))


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
    if not len(sample.p_values):
        return
    distinct, repeated = image_drift.find_copies(sample.statistics, night.scored)
    if repeated:
        yield repeated
        if repeated.level == "act":
            # The other changes follow from that.
            return
    statistics = {name: values[distinct] for name, values in sample.statistics.items()}
    yield from image_drift.compare_statistics(statistics, reference.statistics)
    yield from _alarms(night, earlier, reference.calibration_count)
    if held_out := reference.calibration_count - len(reference.added):
        yield _scores(reference.held_out_p_values(sample.p_values[distinct]), held_out)


def _fewer_images(
    night: CategoryNight, date: datetime.date, earlier: Mapping[datetime.date, CategoryNight], is_idle: bool
) -> Iterator[Change]:
    """Compare with the same weekdays, or in the first weeks of a product that never rests with all nights."""
    days = [*sorted(earlier), date]
    images = [*(earlier[day].images for day in days[:-1]), night.images]
    empty, highest = _describe_empty(days, images, is_idle) if not night.images else ("", "act")
    for length in _WINDOWS:
        weeks = Counter(day.weekday() for day in days[:-length])
        fewest = min(weeks[day.weekday()] for day in days[-length:])
        # The line may rest on a weekday of which there was none yet.
        if not fewest:
            continue
        by_weekday = fewest >= _MIN_WEEKS or not all(images[:-length])
        groups = [day.weekday() if by_weekday else 0 for day in days]
        usual = defaultdict[int, list[int]](list)
        for group, count in zip(groups[:-length], images, strict=False):
            usual[group].append(count)
        expected = sum(sum(usual[group]) / len(usual[group]) for group in groups[-length:])
        found = sum(images[-length:])
        missing = 1 - found / expected if expected else 0.0
        # Most nights need no test.
        if _MISSING.level(missing) != "fine":
            p_value = compare_counts(list(zip(groups, images, strict=True))[-length:], usual)
            text = empty or f"only {found:,} images{_on(days[-length:])}; {expected:,.0f} are usual"
            yield _MISSING.change("images", missing, p_value, text, highest)


def _describe_empty(days: Sequence[datetime.date], images: Sequence[int], is_idle: bool) -> tuple[str, Level]:
    """Describe a night without images, the last one, and return the highest level that it can have."""
    last = max((i for i, count in enumerate(images) if count), default=None)
    text = "no images tonight"
    if last is not None:
        text += f"; {images[last]:,} on {days[last]}"
    if is_idle:
        return f"{text}. Most categories have none: was the plant closed, or are files missing?", "watch"
    return text, "act" if last is not None and len(days) - 1 - last <= _NO_LONGER_MADE else "watch"


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
    same = [past for past in earlier if (past.model_id, past.false_alarm_rate) == wanted]
    for now, usual, p_value in _compare_with_usual(
        [*filter(None, (past.alarm_rate for past in same)), rate], _MORE_ALARMS
    ):
        recent, before = pool(now), pool(usual).value
        nights = f"{percent(before)} on {len(usual)} nights before"
        text = f"more alarms than usual: {_describe(recent)}{_on(now)}, {nights}"
        yield _MORE_ALARMS.change("alarms", recent.value - before, p_value, text)
    what = "the threshold that a person decided lets expect" if night.decision else "the requested"
    text = f"more alarms than {what} {percent(night.false_alarm_rate)}: {_describe(rate)}"
    p_value = _above_requested(*rate, calibration_count, night.false_alarm_rate)
    rank = threshold_rank(calibration_count, night.false_alarm_rate)
    yield _ALARMS.change("alarms", rate.value - rank / (calibration_count + 1), p_value, text)


def _above_requested(alarms: int, images: int, calibration_count: int, false_alarm_rate: float) -> float:
    """Return the p-value of as many alarms or more above a calibration's threshold, beside the expected defects."""
    defects = min(math.ceil(_ALARMS.watch * images), alarms)
    if false_alarm_rate >= 1:
        # A person decided a threshold below all calibration scores.
        return 1.0
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
            yield now, usual, compare_rates(now, usual)


def _usual(rates: Sequence[Rate], margin: float) -> list[Rate]:
    """Return the rates, lowest first, without those that stand out above all lower ones by more than a margin."""
    usual: list[Rate] = []
    for rate in sorted(rates, key=lambda rate: rate.value):
        if not (usual and rate.value > pool(usual).value + margin and compare_rates([rate], usual) < _FAULT_P_VALUE):
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
    return _SCORES.change("scores", distance, p_value, f"{text}; {cause}")
