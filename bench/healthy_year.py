"""Judge years of healthy categories, and planted faults: does a verdict cry wolf, and how soon does it name a fault?

    python bench/healthy_year.py [--years 4] [--categories 200] [--trials 200]

Nothing but random numbers, judged by the nightly job's own code. A healthy category has half an image to 1,000 images
on a working night, a pattern of weekdays (most rest on Sundays, some at weekends), numbers of images and rates of
alarms and errors that differ from night to night, images whose statistics move a little together, and a new model every
few weeks. A year begins without earlier nights. A month is 30 nights; one with any to watch or act on is false.

A planted fault begins after 91 healthy nights, 45 of them with the current model, of a category that works every night
and is judged as one of 200 on a page of 30 nights. It is found if a verdict names its kind on the first night, by the
second, or by the third. The oracle is the best test that there can be of the alarms or images of the three nights: it
knows the usual rate and how much nights differ, and spends on them all that the rate of false verdicts allows.

Ends with 1 if a promise is not kept: at most 5 % of the months are false, and brightness ± 10 %, twice the alarms and
half of the images, at 100 images a night, are each named within three nights in 90 % of the trials.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from tabulate import tabulate

from stpm.data.image_statistics import COMPARED
from stpm.line.night import CategoryNight, Night
from stpm.line.options import MonitoringOptions
from stpm.line.verdict import EARLIER, Reference, Sample, judge
from stpm.method.calibration import threshold_rank

_OPTIONS = MonitoringOptions()
_MONTH = 30
_FIRST = datetime.date(2026, 1, 1)
_RATE = 0.01
_SIZES = (0.5, 3, 5, 20, 100, 300, 1000)
# Images of a weekday, Monday first, as a share of a working day's.
_EVERY_DAY = (1.0,) * 7
_WEEKS = (
    _EVERY_DAY,
    (1, 1, 1, 1, 1, 1, 0),
    (1, 1, 1, 1, 1, 0.5, 0),
    (1, 1, 1, 1, 0.9, 0, 0),
    (1, 1, 1.1, 1, 0.8, 0.2, 0.05),
)
# Mean, and standard deviation among a product's images, of each statistic.
_STATISTICS = np.array(
    [(640, 0), (480, 0), (110, 3), (0.6, 0.03), (0.15, 0.01), (1, 0.01), (0.9, 0.01), (0.5, 0.01), (0.45, 0.02)]
).T
# A night's images share a shift, of this part of that deviation.
_SHARED = 0.15
_GOOD = 100
_SAMPLE = 1000
# Nights for which a model is the current one, on average.
_MODEL_NIGHTS = 45
# Trials: categories that are judged together, nights within which a fault is to be named, and how often.
_CATEGORIES = 200
_NAMED = 3
_POWER = 0.9
# Twice the alarms and half of the images, as `trials` plants them.
_PROMISED_ALARMS = (2.0, 0.03, 1 / 3, 100)
_PROMISED_IMAGES = (0.5, 100, 0.1)


class Product(NamedTuple):
    """What does not change in a healthy category. Variations are standard deviations from night to night over the mean.

    Args:
        images: mean number on a working night.
        images_vary: variation of that number, beside that of chance (Poisson).
        week: factor of each weekday.
        alarms: mean share of images with an alarm.
        alarms_vary: variation of that share.
        errors: mean share of images with an error, which varies by 100 %.
    """

    images: float
    images_vary: float = 0.0
    week: Sequence[float] = _EVERY_DAY
    alarms: float = 0.03
    alarms_vary: float = 1 / 3
    errors: float = 0.0


class Fault(NamedTuple):
    """Factors of what a fault changes, and the kinds of changes that name it."""

    names: tuple[str, ...] = ()
    images: float = 1.0
    alarms: float = 1.0
    brightness: float = 1.0


class Line:
    """A category and its current model."""

    def __init__(self, product: Product, rng: np.random.Generator) -> None:
        self.product, self._rng, self._models = product, rng, 0
        self.refit()

    def refit(self) -> None:
        """Make a new model: a calibration, and statistics of good images."""
        rng = self._rng
        self._models += 1
        count = int(rng.choice([50, 100, 200, 500]))
        self._calibration = np.sort(rng.random(count))
        self.reference = Reference(count, self._statistics(_GOOD))

    def night(self, date: datetime.date, fault: Fault = Fault()) -> tuple[CategoryNight, Sample]:  # noqa: B008
        """Make a night, without a verdict."""
        rng, product = self._rng, self.product
        mean = product.images * product.week[date.weekday()] * fault.images
        images = int(rng.poisson(mean * self._vary(product.images_vary)))
        errors = int(rng.binomial(images, min(product.errors * self._vary(1.0), 1.0)))
        calibration, scored = self._calibration, images - errors
        rank = threshold_rank(len(calibration), _RATE)
        # The model finds all defects; the rest of the alarms are good images above its threshold.
        share = min(product.alarms * fault.alarms * self._vary(product.alarms_vary), 1.0)
        found = rng.random(scored)
        scores = np.where(found < share, 2.0, rng.random(scored) * calibration[-rank])
        p_values = (1 + len(calibration) - np.searchsorted(calibration, scores)) / (len(calibration) + 1)
        record = CategoryNight(
            model_id=f"model-{self._models}",
            images=images,
            alarms=int((found < share).sum()),
            errors={"damaged": errors} if errors else {},
            false_alarm_rate=_RATE,
        )
        statistics = self._statistics(min(scored, _SAMPLE), _SHARED, fault.brightness)
        return record, {"p_value": p_values[:_SAMPLE].astype(np.float32), **statistics}

    def _vary(self, variation: float) -> float:
        return float(self._rng.gamma(variation**-2, variation**2)) if variation else 1.0

    def _statistics(self, count: int, shared: float = 0.0, brightness: float = 1.0) -> dict[str, np.ndarray]:
        mean, deviation = _STATISTICS
        noise = self._rng.standard_normal((count, len(COMPARED))) + shared * self._rng.standard_normal(len(COMPARED))
        values = (mean + deviation * noise).astype(np.float32)
        values[:, COMPARED.index("brightness")] *= brightness
        return dict(zip(COMPARED, values.T, strict=True))


class Year(NamedTuple):
    """Verdicts on one year of healthy categories: months with any to watch or act on, and what they said, by level."""

    months: int
    false: Counter[str]
    reasons: Counter[str]


def healthy_year(seed: int, categories: int, nights: int = 360) -> Year:
    """Judge healthy categories from their first night on."""
    rng = np.random.default_rng(seed)
    lines = {f"product-{i:03}": Line(draw_product(rng), rng) for i in range(categories)}
    earlier: list[Night] = []
    levels: list[set[str]] = []
    reasons = Counter[str]()
    for number in range(nights):
        for line in lines.values():
            if rng.random() < 1 / _MODEL_NIGHTS:
                line.refit()
        made = {name: line.night(_FIRST + datetime.timedelta(number)) for name, line in lines.items()}
        night = judged(lines, made, _FIRST + datetime.timedelta(number), earlier, _OPTIONS)
        earlier = [*earlier, night][-EARLIER:]
        if number % _MONTH == 0:
            levels.append(set())
        for record in night.categories.values():
            if record.level in ("watch", "act"):
                levels[-1].add(record.level)
                reasons[f"{record.level}: {record.reasons[0]}"] += 1
    false = Counter(level for month in levels for level in month) + Counter(any=sum(map(bool, levels)))
    return Year(len(levels), false, reasons)


def draw_product(rng: np.random.Generator) -> Product:
    """Draw a category at random."""
    return Product(
        images=float(rng.choice(_SIZES)),
        images_vary=float(rng.choice([0.0, 0.1, 0.2])),
        week=_WEEKS[rng.integers(len(_WEEKS))],
        alarms=float(rng.uniform(0.01, 0.04)),
        alarms_vary=float(rng.choice([0.0, 0.2, 1 / 3])),
        errors=float(rng.choice([0.0, 0.001, 0.005])),
    )


def judged(
    lines: Mapping[str, Line],
    made: Mapping[str, tuple[CategoryNight, Sample]],
    date: datetime.date,
    earlier: Sequence[Night],
    options: MonitoringOptions,
) -> Night:
    """Judge a night of all categories."""
    night = Night(date.isoformat(), (), categories={name: record for name, (record, _) in made.items()})
    categories = {
        name: judge(night, name, sample, lines[name].reference, earlier, options) for name, (_, sample) in made.items()
    }
    return replace(night, categories=categories)


class Trial(NamedTuple):
    """A fault of a category, in words; the category; and whether it is promised that the fault is named."""

    text: str
    product: Product
    fault: Fault
    is_promised: bool = False

    def oracle(self) -> float | None:
        """Return the power of the best test of alarms or images over the nights; None for another fault."""
        product, fault = self.product, self.fault
        if fault.alarms == fault.images == 1:
            return None
        more = fault.alarms > 1
        mean, vary = product.images, product.images_vary
        if more:
            mean, vary = mean * product.alarms, product.alarms_vary
        level = _NAMED * _OPTIONS.false_verdict_rate / (_CATEGORIES * _OPTIONS.nights)
        usual, faulty = _total(mean, vary), _total(mean * fault.alarms * fault.images, vary)
        # The likelihood ratio is monotone in the total; at the limit itself, toss a coin.
        limit = usual.isf(level) if more else usual.ppf(level)
        beyond = [each.sf(limit) if more else each.cdf(limit - 1) for each in (usual, faulty)]
        return float(beyond[1] + (level - beyond[0]) / usual.pmf(limit) * faulty.pmf(limit))


def _total(mean: float, vary: float) -> Any:
    """Return the distribution of what is counted on the nights of a fault together."""
    if not vary:
        return stats.poisson(_NAMED * mean)
    shape = _NAMED / vary**2
    return stats.nbinom(shape, shape / (shape + _NAMED * mean))


def trials() -> Iterator[Trial]:
    """Yield the faults that are planted."""
    for share in (0.05, -0.05, 0.1, -0.1):
        fault = Fault(("brightness",), brightness=1 + share)
        yield Trial(f"brightness {share:+.0%}", Product(100, 0.1), fault, abs(share) == 0.1)
    for factor, rate, vary, images in (
        *((2.0, 0.03, vary, images) for vary in (1 / 3, 0.1, 0.0) for images in (100, 300, 1000, 3000)),
        *((2.0, 0.1, vary, 100) for vary in (0.1, 0.0)),
        *((factor, 0.03, 1 / 3, images) for factor in (3.0, 5.0, 8.0) for images in (100, 1000)),
    ):
        product = Product(images, 0.1, alarms=rate, alarms_vary=vary)
        text = f"alarms × {factor:g}, from {rate:.0%} ± {rate * vary:.1%}"
        yield Trial(text, product, Fault(("alarms",), alarms=factor), (factor, rate, vary, images) == _PROMISED_ALARMS)
    for factor, images, vary in (
        *((0.5, images, vary) for images in (20, 100, 1000) for vary in (0.0, 0.1, 0.2)),
        *((0.0, images, 0.2) for images in (5, 20, 100)),
    ):
        fault = Fault(("images",), images=factor)
        text = f"images × {factor:g}, from {images} ± {images * vary:.0f}"
        yield Trial(text, Product(images, vary), fault, (factor, images, vary) == _PROMISED_IMAGES)


def named_by(trial: Trial, seed: int) -> int:
    """Plant a fault; return the number of nights after which it was named, more than _NAMED if it was not."""
    rng = np.random.default_rng(seed)
    line = Line(trial.product, rng)
    options = replace(_OPTIONS, nights=_OPTIONS.nights * _CATEGORIES)
    dates = [_FIRST + datetime.timedelta(day) for day in range(EARLIER + _NAMED)]
    earlier: list[Night] = []
    for number, date in enumerate(dates[:-_NAMED]):
        if number == EARLIER - _MODEL_NIGHTS:
            line.refit()
        record, _ = line.night(date)
        earlier.append(Night(date.isoformat(), (), categories={"product": replace(record, level="fine")}))
    for number, date in enumerate(dates[-_NAMED:], 1):
        night = judged({"product": line}, {"product": line.night(date, trial.fault)}, date, earlier, options)
        if any(change.name in trial.fault.names for change in night.categories["product"].changes):
            return number
        earlier.append(night)
    return _NAMED + 1


def find(trial: Trial, number: int) -> list[float]:
    """Return the share of trials in which the fault is named on the first night, by the second, and by the third."""
    nights = [named_by(trial, seed) for seed in range(number)]
    return [sum(night <= last for night in nights) / number for last in range(1, _NAMED + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--years", type=int, default=4, help="default: 4")
    parser.add_argument("--categories", type=int, default=_CATEGORIES, help=f"default: {_CATEGORIES}")
    parser.add_argument("--trials", type=int, default=200, help="categories with each fault (default: 200)")
    options = parser.parse_args()
    planted = list(trials())
    with ProcessPoolExecutor(os.cpu_count()) as processes:
        years = list(processes.map(partial(healthy_year, categories=options.categories), range(options.years)))
        found = list(processes.map(partial(find, number=options.trials), planted))
    months = sum(year.months for year in years)
    false = sum((year.false for year in years), Counter[str]())
    print(f"months with a false verdict, of {months}: {false['any']} (act {false['act']}, watch {false['watch']})")
    for reason, count in sum((year.reasons for year in years), Counter[str]()).most_common(10):
        print(f"  {count} × {reason}")
    promises = {"false verdicts in at most 5 % of the months": false["any"] <= 0.05 * months}
    rows = []
    for trial, shares in zip(planted, found, strict=True):
        oracle = trial.oracle()
        best = "" if oracle is None else f"{oracle:.0%}"
        rows.append([trial.text, f"{trial.product.images:,.0f}", *(f"{share:.0%}" for share in shares), best])
        if trial.is_promised:
            promises[f"{trial.text}, named within {_NAMED} nights in {_POWER:.0%} of the trials"] = shares[-1] >= _POWER
    headers = ["fault", "images a night", "night 1", "by night 2", "by night 3", "oracle"]
    print(tabulate(rows, headers, "github"))
    for promise, is_kept in promises.items():
        print(f"{'kept' if is_kept else 'NOT KEPT'}: {promise}")
    sys.exit(not all(promises.values()))


if __name__ == "__main__":
    main()
