"""Control of the false discovery rate over many p-values: the share of good images among those that are called defects.

Benjamini and Hochberg (JRSS B 57, 1995): of m p-values, the k smallest are discoveries, for the largest k whose k-th
smallest is at most rate · k / m. Conformal p-values that share a calibration set are positively dependent (PRDS), so
that the procedure keeps its rate: Bates, Candès, Lei, Romano and Sesia, "Testing for outliers with conformal p-values",
Annals of Statistics 51, 2023, theorem 2; Benjamini and Yekutieli, Annals of Statistics 29, 2001, theorem 1.2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from stpm.errors import join_first

# p-values are stored as float32: they may exceed the exact quotient by this factor.
_ROUNDING = 1 + 1e-6

# The number of images with each p-value: at most n + 1 entries for n calibration images.
Histogram = Mapping[float, int]


@dataclass(frozen=True)
class Discoveries:
    """The images that a false discovery rate allows to call defects: those with p ≤ `cut_off`.

    Args:
        rate: largest expected fraction of good images among the discoveries, in (0, 1).
        images: number of images tested together.
        cut_off: largest p-value of a discovery; 0 if there are none.
        categories: number of discoveries by category, without those that have none.
        needed: smallest n for which p = 1/(n + 1), the p-value of an image above all calibration images, would be a
            discovery.
        unsupported: number of calibration images of each category that has fewer, and so few that none of its images
            can be a discovery, whatever its score.
    """

    rate: float
    images: int
    cut_off: float
    categories: dict[str, int] = field(default_factory=dict)
    needed: int = 0
    unsupported: dict[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of discoveries."""
        return sum(self.categories.values())

    def describe(self) -> str:
        """Return the discoveries as a line."""
        if not self.count:
            return f"no discoveries among {self.images} images at a false discovery rate of {self.rate:g}"
        counts = join_first([f"{name} {number}" for name, number in self.categories.items()], separator=", ")
        return (
            f"{self.count} discoveries among {self.images} images at a false discovery rate of {self.rate:g} "
            f"(p ≤ {self.cut_off:.3g}): {counts}"
        )

    def warning(self) -> str:
        """Return a line that names the categories whose calibration is too small for the rate; "" if there are none."""
        if not self.unsupported:
            return ""
        few = join_first([f"{name} ({count})" for name, count in self.unsupported.items()], separator=", ")
        return (
            f"too few good images calibrate {few} for a false discovery rate of {self.rate:g} over "
            f"{self.images} images: none of their images can be a discovery unless {self.needed} or more calibrate them"
        )


def benjamini_hochberg(counts: Histogram, rate: float) -> float:
    """Return the largest p-value that is a discovery, 0 if there is none.

    >>> benjamini_hochberg({0.01: 2, 0.2: 1, 1.0: 7}, rate=0.05)
    0.01
    """
    total, at_most, cut_off = sum(counts.values()), 0, 0.0
    for p_value, count in sorted(counts.items()):
        at_most += count
        if p_value * total <= rate * at_most * _ROUNDING:
            cut_off = p_value
    return cut_off


def find_discoveries(counts: Mapping[str, Histogram], calibration: Mapping[str, int], rate: float) -> Discoveries:
    """Apply Benjamini and Hochberg's procedure to all images of a run together.

    Args:
        counts: float32 conformal p-values of each category's images.
        calibration: number of calibration images n of each category; its smallest p-value is 1/(n+1).
        rate: largest expected fraction of good images among the discoveries, in (0, 1).
    """
    together: Counter[float] = Counter()
    for histogram in counts.values():
        together.update(histogram)
    images, cut_off = sum(together.values()), benjamini_hochberg(together, rate)
    smallest = {name: float(np.float32(1 / (calibration[name] + 1))) for name in counts}
    extreme = sum(histogram.get(smallest[name], 0) for name, histogram in counts.items())
    needed = max(math.ceil(images / (rate * max(extreme, 1)) - 1 - 1e-6), 0)
    found = {name: sum(n for p, n in histogram.items() if p <= cut_off) for name, histogram in counts.items()}
    few = {name: calibration[name] for name in counts if smallest[name] > cut_off and calibration[name] < needed}
    return Discoveries(
        rate=rate,
        images=images,
        cut_off=cut_off,
        categories={name: count for name, count in sorted(found.items()) if count},
        needed=needed,
        unsupported=few,
    )
