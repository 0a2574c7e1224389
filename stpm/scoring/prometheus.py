"""The Prometheus metrics of scoring. Ray exports them from each node, and `deploy/grafana.json` draws them.

Ray adds the prefix `ray_` and the suffix `_total` to their names. An image that is scored twice counts twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Literal

from ray.util import metrics

Stage = Literal["decode", "score", "draw"]

IMAGES = "stpm_images"
ANOMALIES = "stpm_anomalies"
STAGE_SECONDS = "stpm_stage_seconds"
SCORER_WAIT_SECONDS = "stpm_scorer_wait_seconds"

# Description and tags of each metric.
_METRICS: dict[str, tuple[str, tuple[str, ...]]] = {
    IMAGES: ('images that were processed; error_kind is "" for those with a score', ("category", "error_kind")),
    ANOMALIES: ("images called anomalous", ("category",)),
    STAGE_SECONDS: ("seconds of a CPU, or of a device, that a stage computed", ("stage",)),
    SCORER_WAIT_SECONDS: ("seconds that scorers waited for images", ()),
}


@cache
def _counter(name: str) -> metrics.Counter:
    """Return the process's counter of this name: Ray allows one."""
    description, tags = _METRICS[name]
    return metrics.Counter(name, description=description, tag_keys=tags)


def count_images(rows: Iterable[tuple[str, str, bool]]) -> None:
    """Count images, given as (category, error kind, is anomalous).

    The category of an image without a model must be "": category names come from data, and may be as many as images.
    """
    for name, error_kind, anomalous in rows:
        # Ray takes no other characters.
        category = name.encode("ascii", "backslashreplace").decode()
        _counter(IMAGES).inc(tags={"category": category, "error_kind": error_kind})
        if anomalous:
            _counter(ANOMALIES).inc(tags={"category": category})


def count_stage_seconds(stage: Stage, seconds: float) -> None:
    """Count the seconds that a stage computed."""
    if seconds > 0:
        _counter(STAGE_SECONDS).inc(seconds, {"stage": stage})


def count_wait_seconds(seconds: float) -> None:
    """Count the seconds that a scorer waited for images."""
    if seconds > 0:
        _counter(SCORER_WAIT_SECONDS).inc(seconds)
