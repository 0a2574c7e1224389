"""Plant faults in simulated nights of real products, and count how many are named.

    python bench/drift.py --data DATA [--models STORE] [--categories a,b] [--plantings 100] [--clean 1000]

For each planting and each clean night a category's training images are split at random: one half is the reference, and
the night's statistics are drawn from the other half, so that a clean night has the reference's own distribution. A
night has 1,000 images, of which 3 % are defective, and follows 28 clean nights. Good images have uniform p-values
that share one calibration of 200 images. Defects are the category's test images: with a model store their p-values are
those of its model, and otherwise 80 % of them count as found.

The probability of a false verdict among the 150 of five categories and 30 nights is 5 %. A fault counts as named if the
first reason of the verdict names it; in brackets how often the verdict is to act. Then the good test images, taken at
another time than the training images, are judged as one night. With a model store, the last table shows whether a fault
matters: the share of alarms among them, at a requested rate of 1 %, while the camera has the fault.
"""

from __future__ import annotations

import datetime
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from camera_faults import blur, brighten, move, open_image
from commands import CORES, make_parser, words
from PIL import Image
from tabulate import tabulate

from stpm.data import mvtec
from stpm.data.image_statistics import COMPARED, compute_statistics
from stpm.detector import load
from stpm.line.night import CategoryNight, Night
from stpm.line.options import MonitoringOptions
from stpm.line.significance import FloatArray
from stpm.line.verdict import Reference, Sample, judge
from stpm.method.calibration import threshold_rank
from stpm.models.store import ModelStore

Transform = Callable[[Image.Image], Image.Image]

_FALSE_ALARM_RATE = 0.01
# Good images that calibrate the model, and images of a night.
_CALIBRATION = 200
_NIGHT = 1000
_USUAL_DEFECTS = 0.03
# The share of defects that a model finds, where none is given.
_FOUND = 0.8
# Nights before the one that is judged.
_EARLIER = 28
# Training images of which statistics are computed, and good test images that a model scores with each fault.
_MAX_IMAGES = 140
_MAX_SCORED = 30
# Verdicts that are given together, on one page: of five categories on 30 nights, as of one on 150.
_OPTIONS = MonitoringOptions(nights=5 * 30)
_LAST_DATE = datetime.date(2026, 11, 24)


class Fault(NamedTuple):
    """A fault of a camera: the statistics whose change names it, and its variants, of which a night has one."""

    kind: str
    size: str
    names: tuple[str, ...]
    variants: tuple[Transform, ...]


def keep(image: Image.Image) -> Image.Image:
    return image


def planted_faults() -> list[Fault]:
    """Return the camera's faults, each kind in four sizes."""
    faults = []
    for share in (0.03, 0.05, 0.1, 0.2):
        variants = tuple(partial(brighten, factor=1 + sign * share) for sign in (1, -1))
        faults.append(Fault("brightness", f"± {share:.0%}", ("brightness",), variants))
    for share in (0.001, 0.002, 0.004, 0.008):
        faults.append(Fault("blur", f"{share:.1%} of the side", ("sharpness",), (partial(blur, share=share),)))
    for share in (0.01, 0.02, 0.03, 0.05):
        places = ((share, 0.0), (-share, 0.0), (0.0, share), (0.0, -share))
        variants = tuple(partial(move, right=right, down=down) for right, down in places)
        faults.append(Fault("camera moved", f"{share:.0%} of the side", ("position_x", "position_y"), variants))
    return faults


class Product(NamedTuple):
    """A category in numbers. Statistics have a row per image.

    Args:
        name: of the category.
        clean: statistics of training images.
        test: statistics of good test images.
        faulty: statistics of the training images by fault and variant.
        defects: p-values of defective images.
        alarms: share of alarms among good test images, without a fault and with each; empty without a model.
    """

    name: str
    clean: FloatArray
    test: FloatArray
    faulty: list[list[FloatArray]]
    defects: FloatArray
    alarms: list[float]


def measure(data: str, name: str, store: str) -> Product:
    """Compute the statistics of a category's training images, with and without each fault, and its model's p-values."""
    torch.set_num_threads(1)
    category, faults = mvtec.read_category(data, name), planted_faults()
    chosen = np.random.default_rng(0).permutation(len(category.train))[:_MAX_IMAGES]
    files = [open_image(category.train[i][0]) for i in chosen]
    clean = statistics_of(files, keep)
    faulty = [[statistics_of(files, variant) for variant in fault.variants] for fault in faults]
    good = [open_image(test.uri) for test in category.test if test.label == mvtec.GOOD]
    test = statistics_of(good, keep)
    if not store:
        found = np.arange(100) < 100 * _FOUND
        return Product(name, clean, test, faulty, np.where(found, 1 / (_CALIBRATION + 1), 1.0), [])
    p_values = make_p_values(ModelStore(store), name)
    defects = p_values([open_image(test.uri) for test in category.test if test.label != mvtec.GOOD])
    variants = [(keep,), *(fault.variants for fault in faults)]
    spoilt = ([each[i % len(each)](image) for i, image in enumerate(good[:_MAX_SCORED])] for each in variants)
    alarms = [float((p_values(files) <= _FALSE_ALARM_RATE).mean()) for files in spoilt]
    return Product(name, clean, test, faulty, defects, alarms)


def statistics_of(files: Sequence[Image.Image], transform: Transform) -> FloatArray:
    """Return (N, len(COMPARED)) float32."""
    changed = map(transform, files)
    return np.array([(*image.size, *compute_statistics(image)) for image in changed], np.float32)


def make_p_values(store: ModelStore, name: str) -> Callable[[Sequence[Image.Image]], FloatArray]:
    """Return a function that scores images with a category's model, in this process."""
    detector = load(store.uri, name, backend="pytorch")

    def p_values(files: Sequence[Image.Image]) -> FloatArray:
        return np.array([result.p_value for result in detector.score(files) if not result.error], np.float32)

    return p_values


class Planted(NamedTuple):
    """A night of one product at random, and what it is judged against."""

    night: CategoryNight
    sample: Sample
    earlier: Sequence[CategoryNight]
    reference: Reference

    def judge(self) -> CategoryNight:
        nights = [
            Night(str(_LAST_DATE - datetime.timedelta(days)), (), categories={"product": each})
            for days, each in enumerate([self.night, *reversed(self.earlier)])
        ]
        return judge(nights[0], "product", self.sample, self.reference, nights[:0:-1], _OPTIONS)


class Nights:
    """Nights of one product at random, each after some earlier ones without a fault."""

    def __init__(self, product: Product) -> None:
        self._product = product
        # The nights do not depend on the other categories.
        self._rng = np.random.default_rng(zlib.crc32(product.name.encode()))

    def clean(self) -> Planted:
        """Split the images and draw a calibration anew, for these nights and what the other methods change in them."""
        product, rng = self._product, self._rng
        order = rng.permutation(len(product.clean))
        self._half = order[: len(order) // 2]
        reference = Reference(_CALIBRATION, by_name(product.clean[order[len(order) // 2 :]]))
        self._calibration = np.sort(rng.random(_CALIBRATION))
        earlier = [replace(self._night(_USUAL_DEFECTS)[0], level="fine") for _ in range(_EARLIER)]
        return Planted(*self._night(_USUAL_DEFECTS), earlier, reference)

    def camera_fault(self, number: int) -> Planted:
        clean = self.clean()
        variants = self._product.faulty[number]
        chosen = variants[self._rng.integers(len(variants))]
        return clean._replace(sample={**clean.sample, **by_name(chosen[self._half])})

    def more_defects(self, share: float) -> Planted:
        clean = self.clean()
        night, sample = self._night(_USUAL_DEFECTS + share)
        return clean._replace(night=night, sample=sample)

    def empty(self) -> Planted:
        clean = self.clean()
        nothing = dict.fromkeys(("p_value", *COMPARED), np.empty(0, np.float32))
        return clean._replace(night=replace(clean.night, images=0, alarms=0), sample=nothing)

    def repeated(self) -> Planted:
        clean = self.clean()
        chosen = np.full(len(self._half), self._half[0])
        p_values = np.full(len(chosen), clean.sample["p_value"][0])
        return clean._replace(sample={"p_value": p_values, **by_name(self._product.clean[chosen])})

    def test(self) -> Planted:
        """Make one night of the test images, without earlier ones."""
        clean, product = self.clean(), self._product
        reference = Reference(_CALIBRATION, by_name(product.clean))
        p_values = self._rng.choice(clean.sample["p_value"], len(product.test))
        return Planted(clean.night, {"p_value": p_values, **by_name(product.test)}, [], reference)

    def _night(self, defects: float) -> tuple[CategoryNight, Sample]:
        rng = self._rng
        at_least = _CALIBRATION - np.searchsorted(self._calibration, rng.random(_NIGHT))
        p_values = (1 + at_least) / (_CALIBRATION + 1)
        bad = rng.random(_NIGHT) < defects
        p_values[bad] = rng.choice(self._product.defects, int(bad.sum()))
        limit = threshold_rank(_CALIBRATION, _FALSE_ALARM_RATE) / (_CALIBRATION + 1)
        counts = CategoryNight(
            model_id="model",
            images=_NIGHT,
            errors={},
            alarms=int((p_values <= limit + 1e-6).sum()),
            false_alarm_rate=_FALSE_ALARM_RATE,
        )
        return counts, {"p_value": p_values[: len(self._half)], **by_name(self._product.clean[self._half])}


def by_name(rows: FloatArray) -> dict[str, FloatArray]:
    return dict(zip(COMPARED, rows.T, strict=True))


class Count(NamedTuple):
    """The number of verdicts whose first reason has one of some names, and of those that are to act."""

    named: int
    act: int


def count_named(make: Callable[[], Planted], names: Sequence[str], number: int) -> Count:
    verdicts = [make().judge() for _ in range(number)]
    named = [each for each in verdicts if each.changes and each.changes[0].name in names]
    return Count(len(named), sum(each.level == "act" for each in named))


def rows(products: Sequence[Product], plantings: int, clean: int) -> Iterator[list[str]]:
    """Yield the rows of the table: kind, size, and a cell for each product."""
    nights = [Nights(product) for product in products]
    anything = (*COMPARED, "images", "repeated", "errors", "alarms", "scores")

    def row(kind: str, size: str, names: Sequence[str], number: int, make: Callable[[Nights], Planted]) -> list[str]:
        counts = [count_named(partial(make, each), names, number) for each in nights]
        return [kind, size, *(f"{count.named} ({count.act})" for count in counts)]

    for number, fault in enumerate(planted_faults()):
        yield row(fault.kind, fault.size, fault.names, plantings, partial(Nights.camera_fault, number=number))
    for share in (0.02, 0.05, 0.1):
        yield row("more defects", f"+ {share:.0%}", ("alarms",), plantings, partial(Nights.more_defects, share=share))
    yield row("empty night", "", ("images",), plantings, Nights.empty)
    yield row("one repeated image", "", ("repeated",), plantings, Nights.repeated)
    yield row(f"none, {clean} nights", "", anything, clean, Nights.clean)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="data set in the MVTec AD layout")
    parser.add_argument("--models", default="", help="model store, whose models give the p-values (default: none)")
    parser.add_argument("--categories", type=words, default="", help="separated by commas (default: all)")
    parser.add_argument("--plantings", type=int, default=100, help="nights with each fault (default: 100)")
    parser.add_argument("--clean", type=int, default=1000, help="nights without a fault (default: 1000)")
    options = parser.parse_args()
    names = mvtec.find_categories(options.data, options.categories)
    with ProcessPoolExecutor(CORES) as processes:
        products = list(processes.map(partial(measure, options.data, store=options.models), names))
    print(f"verdicts that name the fault first, of {options.plantings} (to act)")
    print(tabulate(list(rows(products, options.plantings, options.clean)), ["fault", "size", *names], "github"))
    for product in products:
        found = Nights(product).test().judge()
        print(f"{product.name}, {len(product.test)} good test images: {found.level} {'; '.join(found.reasons)}")
    if options.models:
        print(f"\nalarms of good test images, {_FALSE_ALARM_RATE:.0%} requested")
        kinds = [("none", ""), *((fault.kind, fault.size) for fault in planted_faults())]
        cells = zip(*(product.alarms for product in products), strict=True)
        table = [
            [*kind, *(f"{100 * value:.0f} %" for value in values)] for kind, values in zip(kinds, cells, strict=True)
        ]
        print(tabulate(table, ["fault", "size", *names], "github"))


if __name__ == "__main__":
    main()
