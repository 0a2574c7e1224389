"""The gate: values that a report must reach, such as that of a nightly benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stpm import storage
from stpm.errors import ConfigError
from stpm.evaluation.options import ReportOptions
from stpm.metrics.category_metrics import LOWER_IS_BETTER, METRICS
from stpm.records import parse_json

# Entries of the protocol that do not change what a value means.
_NOT_COMPARED = frozenset({"versions", "pixel_metrics", "intervals"})


@dataclass(frozen=True)
class Requirement:
    """A value that a metric of a category, or of the `mean`, must reach, within a tolerance."""

    category: str
    metric: str
    value: float
    tolerance: float = 0.0

    def shortfall(self, report: Mapping[str, Any]) -> str:
        """Describe how the content of a report.json falls short, or return ""."""
        values = {**report["categories"], "mean": report["mean"]}.get(self.category)
        name = f"{self.category}.{self.metric}"
        if values is None:
            return f"{name}: the category is not in the report; {self.value:.4f} was required"
        value = values[self.metric]
        if value is None:
            return f"{name} is undefined; {self.value:.4f} was required"
        lower = self.metric in LOWER_IS_BETTER
        if value <= self.value + self.tolerance if lower else value >= self.value - self.tolerance:
            return ""
        within = f" (within {self.tolerance:g})" if self.tolerance else ""
        return f"{name} is {value:.4f}; at {'most' if lower else 'least'} {self.value:.4f}{within} was required"


@dataclass(frozen=True)
class Gate:
    """Requirements, and the protocol of the baseline that some of them come from."""

    requirements: tuple[Requirement, ...]
    protocol: Mapping[str, Any]

    def shortfalls(self, report: Mapping[str, Any]) -> list[str]:
        """Describe how the content of a report.json falls short, one line each."""
        protocol = report["protocol"]
        differences = [
            f"the baseline's {name} is {value!r} and this report's {protocol.get(name)!r}: they cannot be compared"
            for name, value in self.protocol.items()
            if name not in _NOT_COMPARED and value != protocol.get(name)
        ]
        return differences + [line for requirement in self.requirements if (line := requirement.shortfall(report))]


def read_gate(options: ReportOptions) -> Gate:
    """Read the requirements and the baseline, before any work is done. Raise ConfigError if one cannot be read."""
    requirements = [_parse_requirement(text) for text in options.require]
    if not options.baseline:
        return Gate(tuple(requirements), {})
    try:
        report = parse_json(storage.read(storage.absolute(options.baseline)))
        protocol: dict[str, Any] = dict(report["protocol"])
        requirements += [
            Requirement(category, metric, float(values[metric]), options.tolerance)
            for category, values in {**report["categories"], "mean": report["mean"]}.items()
            for metric in METRICS
            if values.get(metric) is not None
        ]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--baseline {options.baseline} cannot be read: {error!r}; give the report.json of an earlier run"
        ) from error
    return Gate(tuple(requirements), protocol)


def _parse_requirement(text: str) -> Requirement:
    """Parse a requirement such as `bottle.image_auroc=0.97`."""
    name, _, number = text.partition("=")
    category, _, metric = name.strip().rpartition(".")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not category or not 0 <= value <= 1:
        raise ConfigError(f"--require is {text!r}; write it as mean.image_auroc=0.95, with a value from 0 to 1")
    if metric not in METRICS:
        raise ConfigError(f"--require names {metric!r}; there are {', '.join(METRICS)}")
    return Requirement(category, metric, value)
