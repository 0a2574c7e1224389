"""The report: metrics per category and seed, their means, and the files and the page that show them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from stpm import storage
from stpm.errors import join_first
from stpm.evaluation.gallery import Gallery
from stpm.evaluation.options import MasksAt
from stpm.evaluation.summary import escape_markdown, headline, metric_rows, summary_rows, write_table
from stpm.evaluation.thresholds import Threshold
from stpm.metrics.category_metrics import AUPRO_LIMITS, METRICS, CategoryMetrics
from stpm.metrics.intervals import CONFIDENCE
from stpm.models.libraries import installed_versions
from stpm.models.record import ModelRecord
from stpm.pages import render
from stpm.times import timestamp

_IMAGE_COUNTS = ("good_count", "defect_count", "found_count", "false_alarm_count")
# Beside the metrics, what the categories have a mean of.
_AVERAGED = ("fit_seconds", "train_loss", "validation_loss", "expected_false_alarm_rate")
_METRIC_TYPES = {
    "category": pa.string(),
    "seed": pa.int64(),
    **dict.fromkeys(METRICS, pa.float64()),
    **dict.fromkeys(_IMAGE_COUNTS, pa.int64()),
}
_DEFECTS_SCHEMA = pa.schema({**_METRIC_TYPES, "defect": pa.string()})
_REPORT_SCHEMA = pa.schema(
    {
        **_METRIC_TYPES,
        **dict.fromkeys(("error_count", "train_count", "held_out_count", "calibration_count"), pa.int64()),
        **dict.fromkeys(("epochs", "kept_epoch", "threshold_rank", "far_count"), pa.int64()),
        **dict.fromkeys((*_AVERAGED, "threshold", "false_alarm_bound"), pa.float64()),
        **dict.fromkeys(("threshold_source", "input_size", "precision", "device", "model_id"), pa.string()),
    }
)


@dataclass(frozen=True)
class CategoryResult:
    """The metrics of one model, of one category and seed; charts (SVG) and galleries are by title."""

    model: ModelRecord
    metrics: CategoryMetrics
    charts: Mapping[str, str] = field(default_factory=dict)
    galleries: Mapping[str, Gallery] = field(default_factory=dict)
    threshold: Threshold = field(default_factory=Threshold)

    def row(self) -> dict[str, Any]:
        """Make the row of report.parquet, and the interval of each metric that has one."""
        fit = asdict(self.model.fit)
        return {
            **self._metrics_row(self.metrics),
            **self.threshold._asdict(),
            "fit_seconds": fit.pop("seconds"),
            **fit,
            "error_count": self.metrics.error_count,
            "input_size": self.model.preprocessing.size_text,
            "precision": self.model.precision,
            "model_id": self.model.model_id,
        }

    def defect_rows(self) -> list[dict[str, Any]]:
        """Make the rows of defects.parquet."""
        return [self._metrics_row(metrics) | {"defect": name} for name, metrics in self.metrics.defects.items()]

    def _metrics_row(self, metrics: CategoryMetrics) -> dict[str, Any]:
        return {
            "category": self.model.category,
            "seed": self.model.recipe.seed,
            **metrics.values,
            **{f"{name}_interval": metric.interval for name, metric in metrics.metrics.items() if metric.interval},
            **{name: getattr(metrics, name) for name in _IMAGE_COUNTS},
        }


@dataclass(frozen=True)
class Failure:
    """A failure in a category, and its reason."""

    category: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The results of a run on `data`, a folder or a URI, and the categories that could not be fitted or read."""

    data: str
    results: Sequence[CategoryResult]
    category_failures: Sequence[Failure] = ()
    masks_at: MasksAt = "model"

    @property
    def failures(self) -> list[Failure]:
        """All failures: of categories, and of single images and masks, which each seed finds again."""
        problems = [Failure(result.model.category, line) for result in self.results for line in result.metrics.problems]
        return list(dict.fromkeys([*self.category_failures, *problems]))

    @property
    def notes(self) -> list[str]:
        """What limits the meaning of the values: undefined metrics, vanished masks, promises that are not kept."""
        notes = []
        for name, (first, *_) in self.by_category.items():
            undefined: dict[str, list[str]] = {}
            for metric, reason in first.metrics.undefined.items():
                undefined.setdefault(reason, []).append(metric)
            notes += [f"{name}: {', '.join(metrics)} undefined: {reason}" for reason, metrics in undefined.items()]
            if masks := first.metrics.vanished_masks:
                notes.append(
                    f"{name}: {len(masks)} masks vanish at model size, and no pixel metric counts their defects: "
                    f"{join_first(masks)}; give --masks-at original, or fit with more --pixels"
                )
            if masks := first.metrics.outside_masks:
                notes.append(
                    f"{name}: {len(masks)} of {first.metrics.defect_count} defects lie wholly outside of what is "
                    f"inspected; recall and image metrics count them, pixel metrics do not: {join_first(masks)}"
                )
            found, limit = first.metrics.metrics["image_recall"].value, first.threshold
            if not first.model.decision and found != 1 and (limit.threshold_rank or 1) <= (limit.far_count or 0):
                notes.append(
                    f"{name}: its threshold is set by a good image that scores far above most others (so many do: "
                    f"{limit.far_count}); look at its model's fit.html, and leave out bad images (--exclude)"
                )
            interval = first.metrics.metrics["image_false_alarm_rate"].interval
            if interval and interval[0] > (limit.false_alarm_bound or 1):
                notes.append(
                    f"{name}: more false alarms than its threshold promises: the images that calibrate it are unlike "
                    "the good ones here (docs/recipes.md)"
                )
        return notes

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted({result.model.recipe.seed for result in self.results})

    @cached_property
    def by_category(self) -> dict[str, list[CategoryResult]]:
        """The results by category; categories and seeds are sorted."""
        groups: dict[str, list[CategoryResult]] = {}
        for result in sorted(self.results, key=lambda result: (result.model.category, result.model.recipe.seed)):
            groups.setdefault(result.model.category, []).append(result)
        return groups

    @cached_property
    def contents(self) -> dict[str, Any]:
        """The content of report.json.

        `categories.<name>` and `mean` hold means over seeds. Beside a metric, `_std` is its standard deviation over
        seeds, and `_interval` the mean over seeds of the ends of its 95 % confidence interval. `sum` adds up the
        images of all categories. Of good images, `expected_false_alarm_rate` are false alarms on average over
        calibration sets, and with nine of ten sets at most `false_alarm_bound`.
        """
        categories = {name: _category_values(results) for name, results in self.by_category.items()}
        mean = {key: _mean([values[key] for values in categories.values()]) for key in (*METRICS, *_AVERAGED)}
        std = {f"{metric}_std": self._std_of_mean(metric) for metric in METRICS}
        total = {key: sum(values[key] for values in categories.values()) for key in _IMAGE_COUNTS}
        return {
            "created": timestamp(),
            "data": self.data,
            "recipe": _in_common(asdict(result.model.recipe) for result in self.results),
            "protocol": self._protocol(),
            "headline": headline(categories, total),
            "categories": categories,
            "mean": {**mean, **std, "categories": len(categories)},
            "sum": total,
            "notes": self.notes,
            "failures": [asdict(failure) for failure in self.failures],
        }

    def text(self) -> str:
        """Make the text that is printed: the table and headline, undefined metrics, notes, failures."""
        lines = [write_table(summary_rows(self._rows()), "simple"), self.contents["headline"], *self._remarks()]
        return "\n".join(filter(None, lines))

    def markdown(self) -> str:
        """Make report.md: the same, and what the values mean."""
        protocol = self.contents["protocol"]
        meaning = (
            f"Seeds {', '.join(map(str, self.seeds)) or 'none'}; "
            f"input {protocol.get('input_size')}, {protocol.get('resize')}; masks at {protocol['mask_resolution']}; "
            f"AUPRO: {protocol['aupro']}."
        )
        parts = [escape_markdown(self.contents["headline"]), write_table(summary_rows(self._rows()), "pipe"), meaning]
        return "\n\n".join([*parts, *(f"- {escape_markdown(line)}" for line in self._remarks())]) + "\n"

    def page(self, shortfalls: Sequence[str] = ()) -> str:
        """Make report.html, with the charts and pictures of the first seed, and the shortfalls from the gate.

        Text from data is escaped. Nothing is loaded, and no script runs but the page's own.
        """
        return render(
            "evaluation/report.html",
            report=self.contents,
            summary=summary_rows(self._rows()),
            metric_rows=metric_rows,
            every=self._rows(),
            first_seed={name: results[0] for name, results in self.by_category.items()},
            seeds=self.seeds,
            shortfalls=shortfalls,
        )

    def tables(self) -> dict[str, pa.Table]:
        """Make `report`, with a row per category and seed, and `defects`, with one per defect type of each."""
        results = [result for group in self.by_category.values() for result in group]
        rows = [result.row() for result in results]
        defect_rows = [row for result in results for row in result.defect_rows()]
        return {
            "report": pa.Table.from_pylist(rows, schema=_REPORT_SCHEMA),
            "defects": pa.Table.from_pylist(defect_rows, schema=_DEFECTS_SCHEMA),
        }

    def files(self) -> dict[str, bytes]:
        """Make report.json, report.md, and a .parquet file of each of the tables, by name."""
        return {
            "report.json": json.dumps(self.contents, indent=2, ensure_ascii=False, allow_nan=False).encode(),
            **{f"{name}.parquet": storage.encode_parquet(table) for name, table in self.tables().items()},
            "report.md": self.markdown().encode(),
        }

    def _rows(self) -> dict[str, dict[str, Any]]:
        """Return the values of each category and then of all: the means of metrics, and the sums of counts."""
        contents = self.contents
        return {**contents["categories"], "mean, sum": contents["mean"] | contents["sum"]} if self.results else {}

    def _remarks(self) -> list[str]:
        return [*self.notes, *(f"{failure.category}: failed: {failure.reason}" for failure in self.failures)]

    def _std_of_mean(self, metric: str) -> float | None:
        """Compute the std over seeds of the mean over categories; None unless every category has every seed."""
        by_seed = [
            [result.metrics.values[metric] for result in self.results if result.model.recipe.seed == seed]
            for seed in self.seeds
        ]
        complete = all(None not in values and len(values) == len(self.by_category) for values in by_seed)
        return _std([_mean(values) for values in by_seed]) if complete else None

    def _protocol(self) -> dict[str, Any]:
        models = _in_common(_model_protocol(result.model) for result in self.results)
        at_model = f"model size ({models.get('input_size')}): masks by nearest neighbour"
        return models | {
            "mask_resolution": at_model if self.masks_at == "model" else "original size: maps enlarged linearly",
            "mask_threshold": "above 0",
            "aupro": f"8-connected regions, false positive rate up to {AUPRO_LIMITS['pixel_aupro']}; "
            f"pixel_aupro_05 up to {AUPRO_LIMITS['pixel_aupro_05']}",
            "pixel_metrics": "from counts by score, exact up to 131,072 distinct scores",
            "intervals": f"{CONFIDENCE:.0%}, over test sets of this size: bootstrap within good and defective images; "
            "of fractions, Wilson's",
            "versions": installed_versions(),
        }


def _category_values(results: Sequence[CategoryResult]) -> dict[str, Any]:
    first = results[0].metrics
    rows = [result.row() for result in results]
    defect_rows = [row for result in results for row in result.defect_rows()]
    return {
        **_over_seeds(rows),
        "undefined": first.undefined,
        "defects": {
            name: _over_seeds([row for row in defect_rows if row["defect"] == name]) | {"undefined": metrics.undefined}
            for name, metrics in first.defects.items()
        },
        "seeds": {str(row["seed"]): row for row in rows},
    }


def _over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the rows of several seeds: numbers become their means, and a text that differs "varies"."""
    merged: dict[str, Any] = {}
    for key in (key for key in rows[0] if key not in ("category", "defect", "seed")):
        values = [row[key] for row in rows if row.get(key) is not None]
        if key.endswith("_interval"):
            merged[key] = [statistics.fmean(ends) for ends in zip(*values, strict=True)]
        elif len(set(values)) < 2:
            merged[key] = values[0] if values else None
        else:
            merged[key] = "varies" if isinstance(values[0], str) else statistics.fmean(values)
        if key in METRICS:
            merged[f"{key}_std"] = _std(values)
    return merged


def _model_protocol(model: ModelRecord) -> dict[str, str]:
    preprocessing, top_fraction = model.preprocessing, model.recipe.top_fraction
    mean, std = (", ".join(map(str, values)) for values in (preprocessing.mean, preprocessing.std))
    highest = f"mean of the highest {100 * top_fraction:g} %" if top_fraction else "maximum"
    return {
        "input_size": preprocessing.size_text,
        "resize": f"{preprocessing.resize}, {preprocessing.interpolation} with antialiasing",
        "normalisation": f"mean {mean}; std {std}",
        "teacher_licence": model.teacher_licence or "not known",
        "image_score": f"{highest} of the anomaly map",
    }


def _in_common(dicts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Merge dicts, with "varies" for values that differ; the seed, which always differs, is left out."""
    first, *others = [*dicts] or [{}]
    return {
        name: value if all(each[name] == value for each in others) else "varies"
        for name, value in first.items()
        if name != "seed"
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _std(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None
