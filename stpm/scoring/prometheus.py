"""What Prometheus sees of a pass: Ray exports these from each node, and `deploy/grafana.json` draws them.

Names appear there with the prefix `ray_` and the suffix `_total`. They count work: what ran twice counts twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Literal

from ray.util import metrics

Stage = Literal["decode", "forward", "encode"]

IMAGES = "stpm_images"
ANOMALIES = "stpm_anomalies"
STAGE_SECONDS = "stpm_stage_seconds"
SCORER_WAIT_SECONDS = "stpm_scorer_wait_seconds"

_ABOUT: dict[str, tuple[str, tuple[str, ...]]] = {
    IMAGES: ('images that came through; error_kind is "" for those with a score', ("category", "error_kind")),
    ANOMALIES: ("images called anomalous", ("category",)),
    STAGE_SECONDS: ("seconds of a CPU, or of a device, that a stage computed", ("stage",)),
    SCORER_WAIT_SECONDS: ("seconds that scorers waited for images", ()),
}


@cache
def _counter(name: str) -> metrics.Counter:
    """One per process: Ray keeps them by name."""
    description, tags = _ABOUT[name]
    return metrics.Counter(name, description=description, tag_keys=tags)


def count_images(rows: Iterable[tuple[str, str, bool]]) -> None:
    """Images by category, why they have no score, and whether they are anomalous.

    The category is "" where no model knows it: names from data could be as many as there are images.
    """
    images: Counter[tuple[str, str]] = Counter()
    anomalies: Counter[str] = Counter()
    for category, error_kind, anomalous in rows:
        images[category, error_kind] += 1
        anomalies[category] += anomalous
    for (category, error_kind), number in images.items():
        _counter(IMAGES).inc(number, {"category": category, "error_kind": error_kind})
    for category, number in anomalies.items():
        if number:
            _counter(ANOMALIES).inc(number, {"category": category})


def spent(stage: Stage, seconds: float) -> None:
    """So long a stage computed."""
    if seconds > 0:
        _counter(STAGE_SECONDS).inc(seconds, {"stage": stage})


def waited(seconds: float) -> None:
    """So long a scorer had nothing to do."""
    if seconds > 0:
        _counter(SCORER_WAIT_SECONDS).inc(seconds)
