"""triage.html: the most anomalous images of a pass on one static page, for the person who decides what to look at."""

from __future__ import annotations

import heapq
from typing import Any

import jinja2

from stpm import storage
from stpm.scoring.target import Target

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("stpm.scoring", "."), autoescape=True, undefined=jinja2.StrictUndefined
)
_COLUMNS = ["uri", "category", "score", "threshold", "p_value", "is_anomalous", "overlay", "peak_x", "peak_y"]


def write_triage(target: Target, most: int) -> int:
    """Write the page beside the run's record; returns how many images are on it.

    Images of different models are ordered by how far they are above their model's threshold, as a ratio.

    Args:
        target: a pass that has ended.
        most: images on the page.
    """
    rows = most_anomalous(target, most)
    page = _TEMPLATES.get_template("triage.html").render(rows=rows, out=target.out)
    storage.publish(target.triage, page.encode())
    return len(rows)


def most_anomalous(target: Target, most: int) -> list[dict[str, Any]]:
    """The rows with the largest scores in units of their threshold, largest first; a few in memory at a time."""
    best: list[tuple[float, str, dict[str, Any]]] = []
    for batch in target.dataset().to_batches(_COLUMNS):
        for row in batch.to_pylist():
            if row["score"] is not None:
                excess = row["score"] / row["threshold"] if row["threshold"] else float("inf")
                heapq.heappush(best, (excess, row["uri"], row | {"excess": excess}))
                if len(best) > most:
                    heapq.heappop(best)
    return [row for _, _, row in sorted(best, key=lambda entry: entry[:2], reverse=True)]
