"""The report: figures per category and seed, their means, and how they are shown."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
from tabulate import tabulate

from stpm import storage
from stpm.evaluation.category import AUPRO_LIMITS, METRICS, Figures
from stpm.models import library_versions
from stpm.recipe import Recipe
from stpm.record import ModelRecord

_AVERAGED = (*METRICS, "fit_seconds", "train_loss", "validation_loss")
_SHOWN = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_aupro": "AUPRO"}


@dataclass(frozen=True)
class Result:
    """What came of one category with one seed."""

    model: ModelRecord
    figures: Figures

    def row(self) -> dict[str, Any]:
        """Flat: one row of report.parquet."""
        fit, figures = self.model.fit, self.figures
        return {
            "category": self.model.category,
            "seed": self.model.recipe.seed,
            **dataclasses.asdict(figures.metrics),
            "pixel_error": figures.pixel_error,
            "train_count": fit.train_count,
            "validation_count": fit.validation_count,
            "good_count": figures.good_count,
            "defect_count": figures.defect_count,
            "error_count": figures.error_count,
            "fit_seconds": fit.seconds,
            "epochs": fit.epochs,
            "kept_epoch": fit.kept_epoch,
            "train_loss": fit.train_loss,
            "validation_loss": fit.validation_loss,
            "precision": self.model.precision,
            "device": fit.device,
            "model_id": self.model.model_id,
        }


@dataclass(frozen=True)
class Failure:
    """What could not be done, for which category, and why."""

    category: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The figures of a benchmark run."""

    data: str
    recipe: Recipe
    results: Sequence[Result]
    failures: Sequence[Failure]

    def categories(self) -> dict[str, list[Result]]:
        """Results by category, both in order."""
        found: dict[str, list[Result]] = {}
        for result in sorted(self.results, key=lambda r: (r.model.category, r.model.recipe.seed)):
            found.setdefault(result.model.category, []).append(result)
        return found

    def as_json(self) -> dict[str, Any]:
        """report.json: `categories.<name>` and `mean` hold means over seeds, with `_std` beside each metric."""
        categories = {name: _summary(results) for name, results in self.categories().items()}
        means = {key: _mean([values[key] for values in categories.values()]) for key in _AVERAGED}
        return {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "data": self.data,
            "recipe": {k: v for k, v in dataclasses.asdict(self.recipe).items() if k != "seed"},
            "protocol": {
                "input_size": self.recipe.size,
                "resize": f"{self.recipe.resize}, bilinear with antialiasing",
                "image_score": "maximum of the anomaly map",
                "mask_resolution": f"{self.recipe.size}×{self.recipe.size}, nearest neighbour",
                "mask_threshold": "above 0",
                "aupro": f"8-connected regions, false positive rate up to {AUPRO_LIMITS['pixel_aupro']}; "
                f"pixel_aupro_05 up to {AUPRO_LIMITS['pixel_aupro_05']}",
                "pixel_metrics": "from counts by score; pixel_error bounds what differs from the exact figures",
                "versions": library_versions(),
            },
            "categories": categories,
            "mean": means | {"categories": len(categories)},
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
        }

    def as_parquet(self) -> bytes:
        """report.parquet: one row per category and seed."""
        rows = [result.row() for results in self.categories().values() for result in results]
        return storage.parquet(pa.Table.from_pylist(rows, schema=_PARQUET))

    def as_text(self) -> str:
        """The table that is printed: a line per category, and their mean."""
        report = self.as_json()
        lines = [
            [
                name,
                *(_shown(values, metric) for metric in _SHOWN),
                f"{values['train_count']}+{values['validation_count']}",
                f"{values['good_count']}+{values['defect_count']}",
                f"{values['fit_seconds']:.1f}",
                f"{values['train_loss']:.4f}",
                f"{values['validation_loss']:.4f}",
                ",".join(values["seeds"]),
            ]
            for name, values in report["categories"].items()
        ]
        mean = report["mean"]
        if lines:
            fit = "" if mean["fit_seconds"] is None else f"{mean['fit_seconds']:.1f}"
            lines.append(["mean", *(_shown(mean, metric) for metric in _SHOWN), "", "", fit, "", "", ""])
        headers = [
            "category",
            *_SHOWN.values(),
            "train+held out",
            "good+defect",
            "fit s",
            "train loss",
            "val. loss",
            "seeds",
        ]
        align = ("left", *("right",) * (len(headers) - 1))
        text: str = tabulate(lines, headers, disable_numparse=True, colalign=align) if lines else ""
        notes = [
            f"{name}: {', '.join(metrics)} undefined: {reason}"
            for name, values in report["categories"].items()
            for reason, metrics in _by_reason(values["undefined"]).items()
        ]
        failures = [f"{failure.category}: failed: {failure.reason}" for failure in self.failures]
        return "\n".join(filter(None, [text, *notes, *failures]))

    def write(self, out: str) -> None:
        storage.publish(storage.join(out, "report.parquet"), self.as_parquet())
        data = json.dumps(self.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
        storage.publish(storage.join(out, "report.json"), data.encode())


_PARQUET = pa.schema(
    [
        ("category", pa.string()),
        ("seed", pa.int64()),
        *((metric, pa.float64()) for metric in METRICS),
        ("pixel_error", pa.float64()),
        ("train_count", pa.int64()),
        ("validation_count", pa.int64()),
        ("good_count", pa.int64()),
        ("defect_count", pa.int64()),
        ("error_count", pa.int64()),
        ("fit_seconds", pa.float64()),
        ("epochs", pa.int64()),
        ("kept_epoch", pa.int64()),
        ("train_loss", pa.float64()),
        ("validation_loss", pa.float64()),
        ("precision", pa.string()),
        ("device", pa.string()),
        ("model_id", pa.string()),
    ]
)


def _summary(results: Sequence[Result]) -> dict[str, Any]:
    rows = [result.row() for result in results]
    first = rows[0]
    summary: dict[str, Any] = {key: _mean([row[key] for row in rows]) for key in _AVERAGED}
    summary |= {f"{key}_std": _deviation([row[key] for row in rows]) for key in METRICS}
    counts = ("train_count", "validation_count", "good_count", "defect_count", "error_count")
    summary |= {key: first[key] for key in counts}
    summary["undefined"] = results[0].figures.undefined
    summary["seeds"] = {str(row["seed"]): {k: v for k, v in row.items() if k not in counts} for row in rows}
    return summary


def _by_reason(undefined: dict[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for metric, reason in undefined.items():
        grouped.setdefault(reason, []).append(metric)
    return grouped


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _deviation(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def _shown(values: dict[str, Any], key: str) -> str:
    if values[key] is None:
        return "–"
    deviation = values.get(f"{key}_std")
    return f"{values[key]:.4f}" if deviation is None else f"{values[key]:.4f} ± {deviation:.4f}"
