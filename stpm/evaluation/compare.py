"""Two scored runs of the same images, A and B: what each finds and the other does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import spearmanr

from stpm.data.mvtec import GOOD
from stpm.errors import DataError, UndefinedMetricError
from stpm.evaluation.category import ScoredCategory, read_models
from stpm.metrics.intervals import Flags, Scores, paired_aurocs, wilson_interval
from stpm.models.record import ModelRecord
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import check_row_count, naming_damaged_file, open_rows

_COLUMNS = ["category", "uri", "label", "score", "threshold", "is_anomalous"]


@dataclass(frozen=True)
class Run:
    """A finished run: the rows of all its images, and its models by category, each with where its own rows are."""

    folder: str
    rows: pa.Table
    models: Mapping[str, tuple[ScoredCategory, ModelRecord]]


def read_run(folder: str, models: str) -> Run:
    """Read a run, whose model store may have moved to `models`.

    Raises:
        DataError, ModelError: if it or a model cannot be read, or several runs in the folder have a category.
    """
    tables, found = [], {}
    for output in RunOutput.find_all(folder):
        check_row_count(output)
        for record in read_models(output, models)[1]:
            if record.category in found:
                raise DataError(
                    f"{folder}: several runs have scored {record.category}, of several seeds or late images; score "
                    "them with one model, by the score job, and compare that run"
                )
            found[record.category] = ScoredCategory(output, record.category, record.preprocessing), record
        with naming_damaged_file(output):
            tables.append(open_rows(output, _COLUMNS).to_table(columns=_COLUMNS))
    return Run(folder, pa.concat_tables(tables), found)


@dataclass(frozen=True)
class Comparison:
    """What B does otherwise than A: in a sentence, and as cells of a table by title.

    Args:
        changes: URIs of the images that are an alarm in one run alone, by title, those with a label first; of each
            title the clearest alarms first.
    """

    category: str
    headline: str
    rows: Sequence[Mapping[str, str]]
    changes: Mapping[str, Sequence[str]]


def compare(a: Run, b: Run) -> tuple[list[Comparison], list[str]]:
    """Compare the images that two runs have scored, paired by category and URI.

    Returns:
        A comparison of each category, and after several that of all together; and remarks on images that are left out,
        or have two labels.

    Raises:
        DataError: if there are no such images.
    """
    pairs = a.rows.join(b.rows, ["category", "uri"], join_type="full outer", right_suffix="_b")
    pairs = pairs.sort_by([("category", "ascending"), ("uri", "ascending")])
    scored = pc.field("score").is_valid() & pc.field("score_b").is_valid()
    # Every row has a label, be it "": null says that there is no row.
    label, label_b = pc.field("label"), pc.field("label_b")
    conditions = {
        "in A alone": ~label_b.is_valid(),
        "in B alone": ~label.is_valid(),
        "in both, with an error in one": label.is_valid() & label_b.is_valid() & ~scored,
        "labelled otherwise in A than in B, whose labels count": (label != label_b) & (label != "") & (label_b != ""),
    }
    remarked = {where: pairs.filter(condition)["uri"] for where, condition in conditions.items()}
    remarks = [f"{len(uris):,} images are {where}, such as {uris[0]}" for where, uris in remarked.items() if len(uris)]
    pairs = pairs.filter(scored)
    if not len(pairs):
        raise DataError(
            f"{a.folder} and {b.folder} have scored no image in common ({'; '.join(remarks) or 'both are empty'}); "
            "score the same images with both models: the same URIs, in the same categories"
        )
    names = pc.unique(pairs["category"]).to_pylist()
    found = [compare_pairs(name, pairs.filter(pc.field("category") == name)) for name in names]
    return found + ([compare_pairs("all", pairs, one_model=False)] if len(found) > 1 else []), remarks


def compare_pairs(category: str, pairs: pa.Table, *, one_model: bool = True) -> Comparison:
    """Compare one or more images; columns of B end in _b. The scores of several models are in no order."""
    # Where the labels differ, those of B count.
    labels = np.array(pc.if_else(pc.equal(pairs["label_b"], ""), pairs["label"], pairs["label_b"]).to_pylist(), str)
    scores, limits, alarms = (np.stack([pairs[name], pairs[f"{name}_b"]]) for name in _COLUMNS[3:])
    is_defect = (labels != "") & (labels != GOOD)
    clearest_first = np.argsort(-(scores - limits).max(axis=0), kind="stable")
    cells, clauses, changes = [], [], {}
    for what, verb, images, chosen in (
        ("defects found", "finds", "defects", is_defect),
        ("false alarms", "raises a false alarm for", "good images", labels == GOOD),
        ("alarms without a label", "raises an alarm for", "images without a label", labels == ""),
    ):
        if not chosen.any():
            continue
        a, b = alarms & chosen
        more = int(b.sum()) - int(a.sum())
        count = f"{abs(more):,} {'more' if more > 0 else 'fewer'}" if more else f"as many ({a.sum():,})"
        clauses.append(f"{verb} {count} of {chosen.sum():,} {images}")
        shares = (_share(each[chosen]) for each in (a, b))
        cells.append((what, *shares, f"{more:+,} ({(b & ~a).sum():,} in B alone, {(a & ~b).sum():,} in A alone)"))
        for name, alone in (("B", b & ~a), ("A", a & ~b)):
            if alone.any():
                places = clearest_first[alone[clearest_first]]
                changes[f"{what} in {name} alone"] = pairs["uri"].take(places).to_pylist()
    auroc = ""
    if one_model:
        if aurocs := _aurocs(is_defect[labels != ""], scores[:, labels != ""]):
            cells.append(("image AUROC", *aurocs))
            auroc = f"; AUROC {aurocs[-1]}"
        rho = spearmanr(*scores).statistic if np.ptp(scores, axis=1).all() else np.nan
        cells += [("threshold", *(f"{each[0]:.4g}" for each in limits), ""), ("rank correlation", "", "", f"{rho:.3f}")]
    rows = [dict(zip(("category", "", "A", "B", "B − A"), (category, *each), strict=True)) for each in cells]
    return Comparison(category, f"B {' and '.join(clauses)}{auroc}", rows, changes if one_model else {})


def _aurocs(is_defect: Flags, scores: Scores) -> list[str]:
    """Write the AUROC of A, of B, and their difference, with paired intervals; nothing where they are undefined."""
    formats = ("{:.4f} ({:.3f} to {:.3f})", "{:.4f} ({:.3f} to {:.3f})", "{:+.4f} ({:+.3f} to {:+.3f})")
    with suppress(UndefinedMetricError):
        found = paired_aurocs(is_defect, scores)
        return [each.format(value, *ends) for each, (value, ends) in zip(formats, found, strict=True)]
    return []


def _share(alarms: Flags) -> str:
    low, high = wilson_interval(alarms)
    return f"{alarms.sum():,} of {alarms.size:,} ({low:.0%} to {high:.0%})"
