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
from stpm.evaluation.gallery import Tile
from stpm.evaluation.options import MasksAt
from stpm.evaluation.summary import Table, escape_markdown, headline, metrics_table, summary_table
from stpm.evaluation.threshold import Threshold
from stpm.metrics.category_metrics import AUPRO_LIMITS, METRICS, CategoryMetrics
from stpm.metrics.intervals import CONFIDENCE
from stpm.models.libraries import installed_versions
from stpm.models.record import ModelRecord
from stpm.pages import render
from stpm.times import timestamp

_FIT_METRICS = ("fit_seconds", "train_loss", "validation_loss")
_AVERAGED = (*METRICS, *_FIT_METRICS, "expected_false_alarm_rate")
_JUDGED_COUNTS = ("found_count", "false_alarm_count")
_THRESHOLD = ("threshold", "threshold_rank", "expected_false_alarm_rate", "false_alarm_bound")
_COUNTS = ("train_count", "held_out_count", "calibration_count", "good_count", "defect_count", "error_count")
_METRIC_TYPES = {
    "category": pa.string(),
    "seed": pa.int64(),
    **dict.fromkeys((*METRICS, "pixel_error"), pa.float64()),
    **dict.fromkeys(("good_count", "defect_count", *_JUDGED_COUNTS), pa.int64()),
}
_DEFECTS_SCHEMA = pa.schema({**_METRIC_TYPES, "defect": pa.string()})
_REPORT_SCHEMA = pa.schema(
    {
        **_METRIC_TYPES,
        **dict.fromkeys(("error_count", "train_count", "held_out_count", "calibration_count"), pa.int64()),
        **dict.fromkeys(("epochs", "kept_epoch"), pa.int64()),
        **dict.fromkeys((*_FIT_METRICS, *_THRESHOLD), pa.float64()),
        "threshold_rank": pa.int64(),
        **dict.fromkeys(("input_size", "precision", "device", "model_id", "threshold_source"), pa.string()),
    }
)


@dataclass(frozen=True)
class CategoryResult:
    """The metrics of one model, of one category and seed; charts (SVG) and galleries are by title.

    `threshold` is None where no image was scored.
    """

    model: ModelRecord
    metrics: CategoryMetrics
    charts: Mapping[str, str] = field(default_factory=dict)
    galleries: Mapping[str, Sequence[Tile]] = field(default_factory=dict)
    threshold: Threshold | None = None

    @property
    def breaks_promise(self) -> bool:
        """Whether even the low end of the false-alarm rate's interval is above what the threshold promises."""
        interval = self.metrics.metrics["image_false_alarm_rate"].interval
        return bool(self.threshold and interval and interval[0] > self.threshold.false_alarm_bound)

    def row(self) -> dict[str, Any]:
        """Make the row of report.parquet, and the interval of each metric that has one."""
        fit = asdict(self.model.fit)
        return {
            **self._metrics_row(self.metrics),
            **(self.threshold.row() if self.threshold else dict.fromkeys((*_THRESHOLD, "threshold_source"))),
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
            "pixel_error": metrics.pixel_error,
            "good_count": metrics.good_count,
            "defect_count": metrics.defect_count,
            "found_count": metrics.found_count,
            "false_alarm_count": metrics.false_alarm_count,
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
        """What limits the meaning of the values: masks that vanish at model size, promises that thresholds break."""
        notes = []
        for name, results in self.by_category.items():
            if masks := results[0].metrics.vanished_masks:
                notes.append(
                    f"{name}: {len(masks)} masks vanish at model size, and no pixel metric counts their defects: "
                    f"{join_first(masks)}; give --masks-at original, or fit with more --pixels"
                )
            if any(result.breaks_promise for result in results):
                notes.append(
                    f"{name}: more false alarms than its threshold promises: the images that calibrate it are not like "
                    "the good ones here (docs/recipes.md#what-held-out-images-must-be)"
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
        mean = {key: _mean([values[key] for values in categories.values()]) for key in _AVERAGED}
        std = {f"{metric}_std": self._std_of_mean(metric) for metric in METRICS}
        summed = ("good_count", "defect_count", "error_count", *_JUDGED_COUNTS)
        return {
            "created": timestamp(),
            "data": self.data,
            "recipe": _in_common(asdict(result.model.recipe) for result in self.results),
            "protocol": self._protocol(),
            "categories": categories,
            "mean": {**mean, **std, "categories": len(categories)},
            "sum": {key: sum(values[key] for values in categories.values()) for key in summed},
            "notes": self.notes,
            "failures": [asdict(failure) for failure in self.failures],
        }

    def text(self) -> str:
        """Make the text that is printed: the table and headline, undefined metrics, notes, failures."""
        return "\n".join(filter(None, [self._summary.text("simple"), "", self._headline[0], *self._remarks()]))

    def markdown(self) -> str:
        """Make report.md: the same, and what the values mean."""
        protocol = self.contents["protocol"]
        meaning = (
            f"Seeds {', '.join(map(str, self.seeds)) or 'none'}; "
            f"input {protocol.get('input_size')}, {protocol.get('resize')}; masks at {protocol['mask_resolution']}; "
            f"AUPRO: {protocol['aupro']}."
        )
        parts = [escape_markdown(self._headline[0]), self._summary.text("pipe"), meaning]
        return "\n\n".join([*parts, *(f"- {escape_markdown(line)}" for line in self._remarks())]) + "\n"

    def page(self, shortfalls: Sequence[str] = ()) -> str:
        """Make report.html, with the charts and pictures of the first seed, and the shortfalls from the gate.

        Text from data is escaped. Nothing is loaded, and no script runs but the page's own.
        """
        return render(
            "evaluation/report.html",
            report=self.contents,
            headline=self._headline,
            summary=self._summary,
            all_metrics=metrics_table("category", self.contents["categories"], self._every),
            types={
                name: metrics_table("type", values["defects"])
                for name, values in self.contents["categories"].items()
                if values["defects"]
            },
            metrics=METRICS,
            first_seed={name: results[0] for name, results in self.by_category.items()},
            seeds=self.seeds,
            shortfalls=shortfalls,
        )

    def files(self) -> dict[str, bytes]:
        """Make report.json, report.parquet (a row per category and seed), defects.parquet and report.md, by name."""
        results = [result for group in self.by_category.values() for result in group]
        rows = [result.row() for result in results]
        defect_rows = [row for result in results for row in result.defect_rows()]
        return {
            "report.json": json.dumps(self.contents, indent=2, ensure_ascii=False, allow_nan=False).encode(),
            "report.parquet": storage.encode_parquet(pa.Table.from_pylist(rows, schema=_REPORT_SCHEMA)),
            "defects.parquet": storage.encode_parquet(pa.Table.from_pylist(defect_rows, schema=_DEFECTS_SCHEMA)),
            "report.md": self.markdown().encode(),
        }

    @property
    def _every(self) -> dict[str, Any]:
        """What the last row of a table shows: the means of metrics, and the sums of counts."""
        return {**self.contents["mean"], **self.contents["sum"]}

    @cached_property
    def _summary(self) -> Table:
        return summary_table(self.contents["categories"], self._every)

    @cached_property
    def _headline(self) -> tuple[str, dict[str, str]]:
        return headline(self.contents["categories"], self._every)

    def _remarks(self) -> list[str]:
        undefined: dict[tuple[str, str], list[str]] = {}
        for name, values in self.contents["categories"].items():
            for metric, reason in values["undefined"].items():
                undefined.setdefault((name, reason), []).append(metric)
        reasons = [f"{name}: {', '.join(metrics)} undefined: {why}" for (name, why), metrics in undefined.items()]
        return [*reasons, *self.notes, *(f"{failure.category}: failed: {failure.reason}" for failure in self.failures)]

    def _std_of_mean(self, metric: str) -> float | None:
        """Compute the std over seeds of the mean over categories; None unless every category has every seed."""
        by_seed: dict[int, list[float]] = {seed: [] for seed in self.seeds}
        for result in self.results:
            if (value := result.metrics.values[metric]) is not None:
                by_seed[result.model.recipe.seed].append(value)
        complete = all(len(values) == len(self.by_category) for values in by_seed.values())
        return _std([_mean(values) for values in by_seed.values()]) if complete else None

    def _protocol(self) -> dict[str, Any]:
        models = _in_common(_model_protocol(result.model) for result in self.results)
        at_model = f"model size ({models.get('input_size')}): masks by nearest neighbour"
        return models | {
            "mask_resolution": at_model if self.masks_at == "model" else "original size: maps enlarged linearly",
            "mask_threshold": "above 0",
            "aupro": f"8-connected regions, false positive rate up to {AUPRO_LIMITS['pixel_aupro']}; "
            f"pixel_aupro_05 up to {AUPRO_LIMITS['pixel_aupro_05']}",
            "pixel_metrics": "from counts by score; pixel_error bounds the difference to the exact metrics",
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
        **{key: _mean([row[key] for row in rows]) for key in (*_FIT_METRICS, *_THRESHOLD)},
        **{key: rows[0][key] for key in (*_COUNTS, "input_size")},
        "threshold_source": _in_common({"source": row["threshold_source"]} for row in rows)["source"],
        "defects": {
            name: _over_seeds([row for row in defect_rows if row["defect"] == name]) | {"undefined": metrics.undefined}
            for name, metrics in first.defects.items()
        },
        "seeds": {str(row["seed"]): {key: row[key] for key in row if key not in _COUNTS} for row in rows},
    }


def _over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute means and standard deviations over seeds; numbers of images are those of the first seed."""
    values: dict[str, Any] = {key: rows[0][key] for key in ("good_count", "defect_count")}
    values |= {key: statistics.fmean(row[key] for row in rows) for key in _JUDGED_COUNTS}
    for metric in METRICS:
        by_seed = [row[metric] for row in rows]
        values |= {metric: _mean(by_seed), f"{metric}_std": _std(by_seed)}
        if intervals := [row[f"{metric}_interval"] for row in rows if f"{metric}_interval" in row]:
            values[f"{metric}_interval"] = [statistics.fmean(ends) for ends in zip(*intervals, strict=True)]
    return values


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
    merged: dict[str, Any] = {}
    for values in dicts:
        for name, value in values.items():
            merged[name] = value if merged.setdefault(name, value) == value else "varies"
    merged.pop("seed", None)
    return merged


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _std(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None
