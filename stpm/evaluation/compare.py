"""Two scored runs of the same images, A and B: what each finds and the other does not, in every category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from stpm.data.mvtec import GOOD
from stpm.errors import DataError, UndefinedMetricError
from stpm.evaluation.category import ScoredCategory, read_models
from stpm.metrics.intervals import Flags, Scores, paired_auroc_intervals, wilson_interval
from stpm.models.record import ModelRecord
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import check_row_count, naming_damaged_file, open_rows

_COLUMNS = ["category", "uri", "label", "score", "threshold", "is_anomalous"]


class Run(NamedTuple):
    """A scored run: the rows of its images, and its models by category, each with where their rows are."""

    folder: str
    rows: pa.Table
    models: Mapping[str, tuple[ScoredCategory, ModelRecord]]


def read_run(folder: str, models: str = "") -> Run:
    """Read the finished run of a folder, whose model store may have moved to `models`.

    Raises:
        DataError, ModelError: if the run or one of its models cannot be read, or a category was scored several times.
    """
    tables, found = [], {}
    for output in RunOutput.find_all(folder):
        for record in read_models(output, models)[1]:
            if record.category in found:
                raise DataError(f"{folder}: several runs there have scored {record.category}; give one of them")
            found[record.category] = ScoredCategory(output, record.category, record.preprocessing), record
        check_row_count(output)
        with naming_damaged_file(output):
            tables.append(open_rows(output, _COLUMNS).to_table(columns=_COLUMNS))
    return Run(folder, pa.concat_tables(tables), found)


def pair_rows(a: pa.Table, b: pa.Table) -> tuple[pa.Table, list[str]]:
    """Pair the rows of A and B by category and URI.

    Returns:
        The pairs that both have scored, sorted; names of B's columns end in _b. And what is left out, a line for each
        reason.
    """
    pairs = a.join(b, ["category", "uri"], join_type="full outer", right_suffix="_b")
    pairs = pairs.sort_by([("category", "ascending"), ("uri", "ascending")])
    # A column that no row lacks is null where there is no row.
    in_a, in_b = (pc.field(name).is_valid() for name in ("label", "label_b"))
    scored = pc.field("score").is_valid() & pc.field("score_b").is_valid()
    left_out = {
        "in A alone": pairs.filter(in_a & ~in_b),
        "in B alone": pairs.filter(in_b & ~in_a),
        "in both, with an error in one of them": pairs.filter(in_a & in_b & ~scored),
    }
    remarks = [
        f"{len(rows):,} images are {why}, such as {rows['uri'][0]}" for why, rows in left_out.items() if len(rows)
    ]
    return pairs.filter(scored), remarks


@dataclass(frozen=True, eq=False)
class Comparison:
    """A category's N images that both runs scored, sorted by URI. Of scores and decisions, the first axis is A and B.

    Args:
        labels: (N,) "good", a defect type, or "" if neither run knows it. Where they differ, B's counts.
        scores: (2, N), larger is more anomalous.
        thresholds: (2, N), above which an image is anomalous; one value for each model.
        is_anomalous: (2, N).
    """

    category: str
    uris: Sequence[str]
    labels: npt.NDArray[np.str_]
    scores: Scores
    thresholds: Scores
    is_anomalous: Flags

    @classmethod
    def of_pairs(cls, category: str, pairs: pa.Table) -> Comparison:
        """Make a comparison of the pairs of a category, see `pair_rows`."""
        labels = pc.if_else(pc.equal(pairs["label_b"], ""), pairs["label"], pairs["label_b"])
        both = (np.stack([pairs[name], pairs[f"{name}_b"]]) for name in ("score", "threshold", "is_anomalous"))
        return cls(category, pairs["uri"].to_pylist(), np.array(labels.to_pylist(), np.str_), *both)

    @property
    def is_good(self) -> Flags:
        """True for an image with the label of a good one, (N,)."""
        return np.asarray(self.labels == GOOD)

    @property
    def is_defect(self) -> Flags:
        """True for an image with the label of a defect, (N,)."""
        return np.asarray((self.labels != "") & (self.labels != GOOD))

    @cached_property
    def aurocs(self) -> list[tuple[float, float, float]]:
        """The AUROC of A, of B, and B's minus A's, with paired intervals; empty if labels or scores define none."""
        chosen = self.labels != ""
        is_defect, scores = self.is_defect[chosen], self.scores[:, chosen]
        try:
            intervals = paired_auroc_intervals(is_defect, scores)
        except UndefinedMetricError:
            return []
        a, b = (float(roc_auc_score(is_defect, each)) for each in scores)
        return [(value, *ends) for value, ends in zip((a, b, b - a), intervals, strict=True)]

    @property
    def changes(self) -> dict[str, list[int]]:
        """The images that are an alarm in one run alone, by title, labelled ones first, the clearest alarms first."""
        a, b = self.is_anomalous
        kinds = {
            "Defects that B finds and A misses": self.is_defect & b & ~a,
            "Defects that A finds and B misses": self.is_defect & a & ~b,
            "False alarms of B alone": self.is_good & b & ~a,
            "False alarms of A alone": self.is_good & a & ~b,
            "Images without a label that are alarms in B alone": (self.labels == "") & b & ~a,
            "Images without a label that are alarms in A alone": (self.labels == "") & a & ~b,
        }
        above = (self.scores - self.thresholds).max(axis=0)
        return {
            title: sorted(np.flatnonzero(flags).tolist(), key=lambda i: -above[i])
            for title, flags in kinds.items()
            if flags.any()
        }

    @property
    def rows(self) -> list[dict[str, str]]:
        """The cells of a table by title, a row for A, for B and for their difference."""
        rows = []
        for i, model in enumerate(("A", "B", "B − A")):
            auroc = "–"
            if self.aurocs:
                auroc = ("{:+.4f} ({:+.3f} to {:+.3f})" if i == 2 else "{:.4f} ({:.3f} to {:.3f})").format(
                    *self.aurocs[i]
                )
            row = {"category": self.category if i == 0 else "", "model": model, "image AUROC": auroc}
            row |= {"defects found": self._share(i, self.is_defect), "false alarms": self._share(i, self.is_good)}
            row["all alarms"] = self._share(i, np.ones_like(self.is_good))
            row["threshold"] = "" if i == 2 or np.isnan(self.thresholds[i, 0]) else f"{self.thresholds[i, 0]:.4g}"
            rows.append(row)
        return rows

    @property
    def headline(self) -> str:
        """Say in a sentence what B does otherwise than A."""
        clauses = []
        for flags, verb, thing, kind in (
            (self.is_defect, "finds", "", "defects"),
            (self.is_good, "raises", " false alarms", "good images"),
            (self.labels == "", "raises", " alarms", "images without a label"),
        ):
            if flags.any():
                a, b = self.is_anomalous[:, flags].sum(axis=1)
                more = int(b) - int(a)
                count = f"{abs(more):,} {'more' if more > 0 else 'fewer'}" if more else "as many"
                clauses.append(f"{verb} {count}{thing[: -1 if abs(more) == 1 else None]} of {flags.sum():,} {kind}")
        auroc = "; AUROC {:+.3f} ({:+.3f} to {:+.3f})".format(*self.aurocs[2]) if self.aurocs else ""
        return f"{self.category}: B {' and '.join(clauses)}{auroc}"

    @property
    def agreement(self) -> str:
        """Say how far the two agree: on decisions, and by Spearman's correlation on the order of the images."""
        a, b = self.is_anomalous
        rho = spearmanr(*self.scores).statistic if np.ptp(self.scores, axis=1).all() else np.nan
        return f"{(a != b).sum():,} of {len(a):,} decisions differ; the rank correlation of the scores is {rho:.3f}"

    def _share(self, model: int, chosen: Flags) -> str:
        """Count the alarms of A or B among the chosen images, with their interval; of 2, how they differ."""
        if not chosen.any():
            return "–"
        a, b = self.is_anomalous[:, chosen]
        if model == 2:
            return f"{int(b.sum()) - int(a.sum()):+,} ({(b & ~a).sum():,} new, {(a & ~b).sum():,} gone)"
        alarms = (a, b)[model]
        low, high = (round(100 * end) for end in wilson_interval(alarms))
        return f"{alarms.sum():,} of {alarms.size:,} ({low}–{high} %)"


def compare(a: Run, b: Run) -> tuple[list[Comparison], Comparison, list[str]]:
    """Compare two runs.

    Returns:
        The comparison of each category of which both have scored an image; that of all together, where the scores of
        several categories are NaN, since they do not compare; and the remarks of `pair_rows`.

    Raises:
        DataError: if there is no such image.
    """
    pairs, remarks = pair_rows(a.rows, b.rows)
    if not len(pairs):
        raise DataError(
            f"{a.folder} and {b.folder} have scored no image in common ({'; '.join(remarks) or 'both are empty'}); "
            "score the same images with both models: the same URIs, in the same categories"
        )
    names = pc.unique(pairs["category"]).to_pylist()
    found = [Comparison.of_pairs(name, pairs.filter(pc.field("category") == name)) for name in names]
    every = Comparison.of_pairs("all", pairs)
    every = replace(every, scores=every.scores * np.nan, thresholds=every.thresholds * np.nan)
    return found, every if len(found) > 1 else found[0], remarks
