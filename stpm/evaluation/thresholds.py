"""What the thresholds of a model promise: false alarms by its calibration, recall by labelled images, and costs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from tabulate import tabulate

from stpm import storage
from stpm.console import log_lines
from stpm.data.mvtec import GOOD
from stpm.errors import DataError, ModelDamagedError, ModelError
from stpm.evaluation.category import ScoredCategory
from stpm.evaluation.charts import draw_thresholds
from stpm.method.calibration import count_far, log_normal_limit, promised_rates, spreads_above
from stpm.metrics.intervals import Scores, wilson_interval
from stpm.models.options import Costs, ModelsOptions
from stpm.models.record import Decision, ModelRecord
from stpm.models.store import ModelStore
from stpm.pages import render
from stpm.scoring.output import RunOutput

# Thresholds of a category that are listed, at most; and that which is in force.
_LISTED = 12
# Rates that few images do not support, whose thresholds are guessed, and the smallest number of images for that.
_BEYOND, _MIN_TO_GUESS = (0.01, 0.001), 20

log = logging.getLogger(__name__)


class Threshold(NamedTuple):
    """A threshold, as report.parquet has it; without values where no image was scored.

    Args:
        threshold: scores above it are anomalous.
        threshold_rank: one more than there are calibration scores above it: 1 is the largest of them.
        threshold_source: where it comes from, in words.
        expected_false_alarm_rate: fraction of new good images above it, on average over calibration sets.
        false_alarm_bound: the fraction that nine of ten calibration sets keep to.
        far_count: calibration images whose scores are far above the others'.
    """

    threshold: float | None = None
    threshold_rank: int | None = None
    threshold_source: str = ""
    expected_false_alarm_rate: float | None = None
    false_alarm_bound: float | None = None
    far_count: int | None = None


def place_threshold(value: float, scores: Scores, decision: Decision | None = None) -> Threshold:
    """Find the place of a threshold, whoever set it, among n calibration scores; NaN: no image was scored.

    >>> place_threshold(2.0, np.array([1, 2, 3], np.float32))[:4]
    (2.0, 2, '2nd of 3 good', 0.5)
    """
    if np.isnan(value):
        return Threshold()
    count, rank = len(scores), 1 + int((scores > np.float32(value)).sum())
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(0 if rank % 100 in (11, 12, 13) else rank % 10, "th")
    source = f"{'largest' if rank == 1 else f'{rank}{suffix}'} of {count} good"
    if decision:
        source = f"set by {decision.by}"
    return Threshold(value, rank, source, *promised_rates(scores, value), count_far(spreads_above(scores)))


@dataclass(frozen=True)
class CategoryThresholds:
    """The thresholds of a category's current model.

    Args:
        scores: of its n calibration images, (n,) ascending.
        current: the threshold in force.
        defects: scores of labelled defects; None: none are known.
        note: what their recall holds for, or why it is not known; "" if that was not asked.
        costs: of errors, which need defects; None: not known.
    """

    model: ModelRecord
    scores: Scores
    current: float
    defects: Scores | None = None
    note: str = ""
    costs: Costs | None = None

    @cached_property
    def beyond(self) -> dict[float, float]:
        """The rates that the scores are too few for, by the threshold that they have if scores are log-normal."""
        n = len(self.scores)
        rates = (rate for rate in _BEYOND if rate * (n + 1) < 1 and n >= _MIN_TO_GUESS)
        return {float(np.float32(log_normal_limit(self.scores, rate))): rate for rate in rates}

    @property
    def listed(self) -> list[float]:
        """The thresholds to choose from, the highest first: some scores down to the median, and the current one."""
        ranks = np.unique(np.geomspace(1, len(self.scores) // 2 + 1, _LISTED).round()).astype(int)
        return sorted({*self.scores[-ranks].tolist(), float(np.float32(self.current)), *self.beyond}, reverse=True)

    @property
    def rows(self) -> list[dict[str, str]]:
        """The cells of each threshold by title."""
        rows, costs = [], []
        for threshold in map(np.float32, self.listed):
            expected, bound = promised_rates(self.scores, threshold)
            guessed = self.beyond.get(float(threshold))
            # The shortest text of the same number: copied, the threshold is the same.
            row = {"": "in force" if threshold == np.float32(self.current) else "", "threshold": str(threshold)}
            row |= {"false-alarm rate": f"{expected:.4f}", "expected of 1,000 good": f"{1000 * expected:.1f}"}
            row["in 9 of 10 cases at most"] = f"{1000 * bound:.1f}"
            if self.beyond:
                row["if log-normal"] = f"{1000 * guessed:g}" if guessed else ""
            if self.defects is not None:
                is_found = self.defects > threshold
                recall, (low, high) = is_found.mean(), wilson_interval(is_found)
                row["found"] = f"{is_found.sum()} of {len(is_found)}"
                row["recall"] = f"{recall:.3f} ({low:.3f} to {high:.3f})"
                if self.costs:
                    costs.append(self.costs.of_thousand_images(expected, float(recall)))
                    row["cost of 1,000 images"] = f"{costs[-1]:.4g}"
            rows.append(row)
        if costs:
            cheapest = rows[int(np.argmin(costs))]
            cheapest[""] = f"{cheapest['']} least cost".strip()
        return rows

    @property
    def remarks(self) -> list[str]:
        """What the numbers mean."""
        decided = f"The threshold in force is {self.model.decision}." if self.model.decision else ""
        promise = (
            f"{len(self.scores)} good images calibrate {self.model.model_id}. Of 1,000 new ones like them, so many "
            "score above the threshold on average over calibrations; 9 of 10 calibrations keep the second number."
        )
        if self.beyond:
            promise += " A third number is a guess, as if scores were log-normal: the images are too few for that rate."
        return list(filter(None, [decided, promise, self.note, str(self.costs or "")]))

    def chart(self) -> str:
        """Draw the thresholds on the curve of the calibration scores, as SVG."""
        return draw_thresholds(self.scores, self.listed, self.current, self.defects, self.model.category)


def show_thresholds(store: ModelStore, categories: Sequence[str], options: ModelsOptions) -> set[str]:
    """Log the thresholds of some categories, and write their page, if one is wanted; return the categories that failed.

    Raises:
        DataError: if there is no labelled run.
    """
    runs = RunOutput.find_all(storage.absolute(options.labelled)) if options.labelled else []
    tables, failed = [], set()
    for category in categories:
        try:
            record = store.record(category)
            scores = store.calibration_scores(record)["score"].to_numpy()
            defects, note = _read_defects(store, record, runs) if runs else (None, "")
        except (DataError, ModelError) as error:
            failed.add(category)
            log.error(f"{category}: failed: {error}", extra={"category": category})
            continue
        current = record.threshold(scores, options.false_alarm_rate)
        table = CategoryThresholds(record, scores, current, defects, note, None if defects is None else options.costs)
        tables.append(table)
        log_lines(f"{category}\n{tabulate(table.rows, 'keys', disable_numparse=True, stralign='right')}")
        for line in table.remarks:
            log.info(line)
    if options.page:
        page = storage.absolute(options.page)
        storage.publish(page, render("evaluation/thresholds.html", tables=tables).encode())
        log.info(f"the thresholds and a picture of them are in {page}")
    return failed


def _read_defects(store: ModelStore, record: ModelRecord, runs: Sequence[RunOutput]) -> tuple[Scores | None, str]:
    """Read the scores of a category's labelled defects from the first run that has scored as the model does.

    Returns:
        The (N,) scores, None if their recall would flatter; and what the recall holds for, or why there is none.

    Raises:
        DataError: if there is no such run, or it is not finished, or no defect has a label.
    """
    for output in runs:
        _, models = output.state.store_and_model_ids()
        with suppress(ModelDamagedError):
            if store.record(record.category, models.get(record.category, "none")).scored_by == record.scored_by:
                break
    else:
        raise DataError(
            f"{runs[0].folder}: no run there has scored {record.category} with a model of this store that scores as "
            f"{record.model_id} does; score the labelled images with it"
        )
    # The rows of an unfinished one are no random part.
    output.state.result()
    category = ScoredCategory(output, record.category, record.preprocessing)
    rows = category.rows(("uri", "label", "score", "is_anomalous", "error_kind"))
    rows = rows.filter((pc.field("label") != "") & (pc.field("error_kind") == ""))
    defects = rows.filter(pc.field("label") != GOOD)["score"].to_numpy()
    if not len(defects):
        raise DataError(f"{output.folder}: no image of {record.category} has the label of a defect")
    if pc.all(rows["is_anomalous"]).as_py():
        return None, (
            f"The recall is not known: each of the {len(rows)} labelled images was an alarm in {output.folder}, and "
            "labels of alarms alone say nothing of the defects that raised none. Label all images, or a random part."
        )
    return defects, (
        f"The recall is that of {len(defects)} defects with a label in {output.folder}, with its 95 % interval. It "
        "holds for other defects only if all images had a label, or a random part: labels of alarms alone flatter."
    )
