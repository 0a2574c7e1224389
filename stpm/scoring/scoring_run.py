"""A scoring run, as the jobs give it: what to score, with which models, and where to write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from stpm.method.calibration import warn_about_few_good_images
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions
from stpm.scoring.options import CollectionOptions, OutputOptions, ScoreOptions
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

    @classmethod
    def of_collection(
        cls,
        collection: CollectionOptions,
        images: tuple[str, ...],
        rows: Callable[[], Iterable[pa.Table]],
        kept: OutputOptions,
        options: ScoreOptions,
        cluster: ClusterOptions,
        output: RunOutput,
    ) -> ScoringRun:
        """Make the run of a job's options: of a collection whose sources are `images`, and what is kept of each."""
        config = ScoringConfig(
            images=images,
            false_alarm_rate=options.false_alarm_rate,
            region_rate=options.region_rate,
            output=kept,
            category=collection.category,
            category_from=collection.category_from,
            allow=tuple(collection.allow),
        )
        store = ModelStore(collection.models)
        return cls(rows, config, store, options, output, collection.top, cluster, collection.coco)

    def warn_about_few_good_images(self, models: ModelRecords) -> None:
        """Log which of the models have too few calibration images for the rate that sets their thresholds."""
        by_rate = {name: record for name, record in models.items() if not record.decision}
        counts = {name: (record.good_count, record.fit.calibration_count) for name, record in by_rate.items()}
        warn_about_few_good_images(counts, self.options.false_alarm_rate)
