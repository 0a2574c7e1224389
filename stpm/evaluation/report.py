"""The report: figures per category and seed, their means, and the files that they are written to."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

import pyarrow as pa
from tabulate import tabulate

from stpm import storage
from stpm.evaluation import published
from stpm.evaluation.category import AUPRO_LIMITS, METRICS, Figures, Measured
from stpm.evaluation.gallery import Tile
from stpm.evaluation.intervals import CONFIDENCE
from stpm.evaluation.options import MasksAt
from stpm.preprocessing import Preprocessing
from stpm.record import ModelRecord, library_versions

_AVERAGED = (*METRICS, "fit_seconds", "train_loss", "validation_loss")
_SHOWN = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "pixel_aupro": "AUPRO"}


@dataclass(frozen=True)
class Result:
    """What came of one category with one seed; `history` has the losses per epoch, by column."""

    model: ModelRecord
    figures: Figures
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    galleries: Mapping[str, Sequence[Tile]] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Flat: one row of report.parquet."""
        fit, figures = self.model.fit, self.figures
        return {
            "category": self.model.category,
            "seed": self.model.recipe.seed,
            **_measured(figures),
            "train_count": fit.train_count,
            "validation_count": fit.validation_count,
            "error_count": figures.error_count,
            "fit_seconds": fit.seconds,
            "epochs": fit.epochs,
            "kept_epoch": fit.kept_epoch,
            "train_loss": fit.train_loss,
            "validation_loss": fit.validation_loss,
            "input_size": self.model.preprocessing.size,
            "precision": self.model.precision,
            "device": fit.device,
            "model_id": self.model.model_id,
        }

    def defect_rows(self) -> list[dict[str, Any]]:
        """Flat: the rows of defects.parquet."""
        return [
            {"category": self.model.category, "seed": self.model.recipe.seed, "defect": name, **_measured(of)}
            for name, of in self.figures.defects.items()
        ]


@dataclass(frozen=True)
class Failure:
    """What could not be done, for which category, and why."""

    category: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The figures of a benchmark run."""

    data: str
    results: Sequence[Result]
    failures: Sequence[Failure]
    masks_at: MasksAt = "model"

    def categories(self) -> dict[str, list[Result]]:
        """Results by category, both in order."""
        found: dict[str, list[Result]] = {}
        for result in sorted(self.results, key=lambda r: (r.model.category, r.model.recipe.seed)):
            found.setdefault(result.model.category, []).append(result)
        return found

    def as_json(self) -> dict[str, Any]:
        """report.json: `categories.<name>` and `mean` hold means over seeds, with `_std` beside each metric.

        `_interval` beside an image metric has the ends of its 95 % interval over test sets, in the mean over seeds.
        """
        return self._json

    @cached_property
    def _json(self) -> dict[str, Any]:
        """Every form of the report is made of it."""
        recipe = _in_common(dataclasses.asdict(result.model.recipe) for result in self.results)
        categories = {name: self._summary(name, results) for name, results in self.categories().items()}
        means = {key: _mean([values[key] for values in categories.values()]) for key in _AVERAGED}
        means |= {f"{key}_std": self._deviation_of_mean(key) for key in METRICS}
        return {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "data": self.data,
            "recipe": recipe,
            "protocol": self._protocol(),
            "categories": categories,
            "mean": means | {"categories": len(categories)},
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
        }

    def _deviation_of_mean(self, metric: str) -> float | None:
        """Over seeds, of the mean over categories; None unless every category has every seed."""
        by_seed: dict[int, list[float | None]] = {}
        for result in self.results:
            by_seed.setdefault(result.model.recipe.seed, []).append(result.row()[metric])
        whole = all(len(values) == len(self.categories()) and None not in values for values in by_seed.values())
        return _deviation([_mean(values) for values in by_seed.values()]) if whole else None

    def _protocol(self) -> dict[str, Any]:
        inputs = _in_common(_input(result.model.preprocessing) for result in self.results)
        at_model = f"model size ({inputs.get('input_size')}): masks by nearest neighbour"
        return inputs | {
            "image_score": _score_in_words({result.model.recipe.top_fraction for result in self.results}),
            "mask_resolution": at_model if self.masks_at == "model" else "original size: maps enlarged linearly",
            "mask_threshold": "above 0",
            "aupro": f"8-connected regions, false positive rate up to {AUPRO_LIMITS['pixel_aupro']}; "
            f"pixel_aupro_05 up to {AUPRO_LIMITS['pixel_aupro_05']}",
            "pixel_metrics": "from counts by score; pixel_error bounds what differs from the exact figures",
            "intervals": f"{CONFIDENCE:.0%}, over test sets of this size: bootstrap within good and defective images; "
            "of shares, Wilson's",
            "versions": library_versions(),
        }

    def _summary(self, category: str, results: Sequence[Result]) -> dict[str, Any]:
        rows = [result.row() for result in results]
        first, figures = rows[0], results[0].figures
        summary: dict[str, Any] = {key: _mean([row[key] for row in rows]) for key in _AVERAGED}
        summary |= {f"{key}_std": _deviation([row[key] for row in rows]) for key in METRICS}
        summary |= _intervals([result.figures for result in results])
        summary |= {key: first[key] for key in _COUNTS}
        summary["input_size"] = first["input_size"]
        summary["undefined"] = figures.undefined
        summary["defects"] = {
            name: _summary_of([r.figures.defects[name] for r in results if name in r.figures.defects])
            for name in figures.defects
        }
        if category in published.MVTEC_AD:
            images = sum(first[key] for key in ("good_count", "defect_count", "error_count"))
            theirs = published.MVTEC_AD[category]
            summary["published"] = {metric: getattr(theirs, metric) for metric in published.METRICS} | {
                "difference_of_protocol": published.difference_of_protocol(
                    category, images, results[0].model, self.masks_at
                )
            }
        summary["seeds"] = {
            str(row["seed"]): {k: v for k, v in row.items() if k not in _COUNTS}
            | {f"{name}_interval": list(ends) for name, ends in result.figures.intervals.items()}
            for row, result in zip(rows, results, strict=True)
        }
        return summary

    def as_parquet(self) -> bytes:
        """report.parquet: one row per category and seed."""
        rows = [result.row() for results in self.categories().values() for result in results]
        return storage.parquet(pa.Table.from_pylist(rows, schema=_PARQUET))

    def defects_as_parquet(self) -> bytes:
        """defects.parquet: one row per category, seed and defect type, each against all good images."""
        rows = [row for results in self.categories().values() for result in results for row in result.defect_rows()]
        return storage.parquet(pa.Table.from_pylist(rows, schema=_DEFECTS))

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
                *("" if values[loss] is None else f"{values[loss]:.4f}" for loss in ("train_loss", "validation_loss")),
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

    def as_markdown(self) -> str:
        """report.md: a table to paste."""
        report = self.as_json()
        rows = [
            [
                _escaped(name),
                *(_shown(values, metric) for metric in _SHOWN),
                values["good_count"],
                values["defect_count"],
            ]
            for name, values in report["categories"].items()
        ]
        if rows:
            rows.append(["**mean**", *(_shown(report["mean"], metric) for metric in _SHOWN), "", ""])
        headers = ["category", *_SHOWN.values(), "good", "defects"]
        table: str = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
        protocol = report["protocol"]
        notes = [
            f"Seeds {', '.join(map(str, sorted({r.model.recipe.seed for r in self.results}))) or 'none'}; "
            f"input {protocol.get('input_size')}, {protocol.get('resize')}; masks at {protocol['mask_resolution']}; "
            f"AUPRO: {protocol['aupro']}.",
            *(f"- {_escaped(failure.category)}: failed: {_escaped(failure.reason)}" for failure in self.failures),
        ]
        return "\n\n".join([table, *notes]) + "\n"

    def write(self, out: str) -> None:
        """Write report.json, report.parquet, defects.parquet and report.md under a URI."""
        data = json.dumps(self.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
        contents = {
            "report.parquet": self.as_parquet(),
            "defects.parquet": self.defects_as_parquet(),
            "report.md": self.as_markdown().encode(),
            "report.json": data.encode(),
        }
        for name, content in contents.items():
            storage.publish(storage.join(out, name), content)


_COUNTS = ("train_count", "validation_count", "good_count", "defect_count", "error_count")
_MEASURED = [
    *((metric, pa.float64()) for metric in METRICS),
    ("pixel_error", pa.float64()),
    ("good_count", pa.int64()),
    ("defect_count", pa.int64()),
]
_DEFECTS = pa.schema([("category", pa.string()), ("seed", pa.int64()), ("defect", pa.string()), *_MEASURED])
_PARQUET = pa.schema(
    [
        ("category", pa.string()),
        ("seed", pa.int64()),
        *_MEASURED,
        ("train_count", pa.int64()),
        ("validation_count", pa.int64()),
        ("error_count", pa.int64()),
        ("fit_seconds", pa.float64()),
        ("epochs", pa.int64()),
        ("kept_epoch", pa.int64()),
        ("train_loss", pa.float64()),
        ("validation_loss", pa.float64()),
        ("input_size", pa.string()),
        ("precision", pa.string()),
        ("device", pa.string()),
        ("model_id", pa.string()),
    ]
)


def _input(preprocessing: Preprocessing) -> dict[str, str]:
    mean, std = (", ".join(map(str, values)) for values in (preprocessing.mean, preprocessing.std))
    return {
        "input_size": preprocessing.size,
        "resize": f"{preprocessing.resize}, {preprocessing.interpolation} with antialiasing",
        "normalisation": f"mean {mean}; deviation {std}",
    }


def _score_in_words(fractions: set[float]) -> str:
    means = [f"mean of the highest {100 * f:g} % of the anomaly map" for f in sorted(fractions) if f]
    return ", or ".join(["maximum of the anomaly map"] * (0.0 in fractions) + means)


def _in_common(values: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Fields with their value, or "varies"; the seed, which does, left out."""
    found: dict[str, Any] = {}
    for each in values:
        for name, value in each.items():
            found[name] = value if found.setdefault(name, value) == value else "varies"
    found.pop("seed", None)
    return found


def _measured(of: Measured) -> dict[str, Any]:
    return {
        **dataclasses.asdict(of.metrics),
        "pixel_error": of.pixel_error,
        "good_count": of.good_count,
        "defect_count": of.defect_count,
    }


def _summary_of(seeds: Sequence[Measured]) -> dict[str, Any]:
    """Means over seeds of one defect type."""
    rows = [_measured(of) for of in seeds]
    means: dict[str, Any] = {metric: _mean([row[metric] for row in rows]) for metric in METRICS}
    counts = {key: rows[0][key] for key in ("good_count", "defect_count")}
    return means | counts | _intervals(seeds) | {"undefined": seeds[0].undefined}


def _intervals(seeds: Sequence[Measured]) -> dict[str, list[float] | None]:
    """The ends of each image metric's interval, in the mean over seeds."""
    found: dict[str, list[float] | None] = {}
    for metric in METRICS:
        ends = [of.intervals[metric] for of in seeds if metric in of.intervals]
        if ends:
            found[f"{metric}_interval"] = [statistics.fmean(end) for end in zip(*ends, strict=True)]
    return found


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


def _escaped(text: str) -> str:
    """For a cell of a Markdown table, where HTML and bars would mean something."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#&" else " " if c in "\r\n" else c for c in text)
