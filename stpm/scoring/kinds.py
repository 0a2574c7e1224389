"""Kinds of alarms: those of one model that look alike, so that a person judges them at one glance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Row = Mapping[str, Any]

# Alarms of a model that are compared with each other: a distance for each pair of them takes 32 MB.
COMPARED = 2000
# No two alarms of a kind are farther from each other, as cosine distance. Unlike ones are about 1 apart.
_DIAMETER = 0.8


def find_kinds(vectors: npt.NDArray[np.float32], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Group alarms of one model that look alike, by agglomerative clustering with complete linkage.

    More than 2,000 are not compared with each other: 2,000, evenly spaced in the given order, make the kinds, and each
    other one joins the kind with the nearest mean within the same distance, or none.

    Args:
        vectors: (N, D) of length 1, from `stpm.method.peak_features`, the most anomalous first.
        names: N different names. The order of up to 2,000 has no effect but by them.

    Returns:
        (N,) int64: 0 for each alarm of the largest kind, and so on; of kinds of one size the one with the first name
        comes first. -1 for an alarm that looks like no other one.
    """
    from sklearn.cluster import AgglomerativeClustering

    compared = np.linspace(0, len(vectors) - 1, min(len(vectors), COMPARED)).astype(int)
    order = np.array(sorted(compared.tolist(), key=names.__getitem__), np.int64)
    labels = np.full(len(vectors), -1, np.int64)
    if len(order) > 1:
        clustering = AgglomerativeClustering(None, metric="cosine", linkage="complete", distance_threshold=_DIAMETER)
        labels[order] = clustering.fit_predict(vectors[order].astype(np.float64))
    kept = [label for label, count in zip(*np.unique(labels[order], return_counts=True), strict=True) if count > 1]
    if kept and len(vectors) > COMPARED:
        means = np.stack([vectors[labels == label].mean(axis=0) for label in kept])
        others = np.setdiff1d(np.arange(len(vectors)), order)
        near = vectors[others] @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
        labels[others] = np.where(near.max(axis=1) >= 1 - _DIAMETER, np.array(kept)[near.argmax(axis=1)], -1)
    members = {label: np.flatnonzero(labels == label) for label in kept}
    ranked = sorted(kept, key=lambda label: (-len(members[label]), min(names[int(i)] for i in members[label])))
    kinds = np.full(len(vectors), -1, np.int64)
    for kind, label in enumerate(ranked):
        kinds[members[label]] = kind
    return kinds


def group_alarms(rows: Sequence[Row]) -> list[list[Row]]:
    """Group rows of OUTPUT, the most anomalous first: kinds of two alarms and more by size, then each other row."""
    by_model: defaultdict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row["is_anomalous"] and row["peak_features"] is not None:
            by_model[row["model_id"]].append(i)
    kinds: list[list[Row]] = []
    grouped: set[int] = set()
    for alarms in by_model.values():
        vectors = np.array([rows[i]["peak_features"] for i in alarms], np.float32)
        found = find_kinds(vectors, [rows[i]["uri"] for i in alarms])
        for kind in range(found.max() + 1):
            members = [alarms[i] for i in np.flatnonzero(found == kind)]
            grouped.update(members)
            kinds.append([rows[i] for i in members])
    return sorted(kinds, key=len, reverse=True) + [[row] for i, row in enumerate(rows) if i not in grouped]
