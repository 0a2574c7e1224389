"""A scoring run, as the jobs give it: what to score, with which models, and where to write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions
from stpm.scoring.options import ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.run_state import ScoringConfig

# By category.
ModelRecords = Mapping[str, ModelRecord]


@dataclass(frozen=True)
class ScoringRun:
    """What to score, with which models, and where to write.

    Args:
        rows: lists the images, as rows for the manifest. It is not called if an earlier run wrote the manifest, and
            called twice if rows of an earlier run are replaced: first to see that there is something to score.
        config: all that decides the rows, except the models.
        triage_images: images on the page of the most anomalous ones; 0: no page.
        coco: whether the anomalous images and their regions are written for tools that label images.
    """

    rows: Callable[[], Iterable[pa.Table]]
    config: ScoringConfig
    store: ModelStore
    options: ScoreOptions
    output: RunOutput
    triage_images: int = 0
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    coco: bool = False
