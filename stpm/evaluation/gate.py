"""The gate: figures that a report must reach, so that a nightly benchmark can be a check."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stpm import storage
from stpm.errors import ConfigError
from stpm.evaluation.category import METRICS, SMALLER_IS_BETTER
from stpm.evaluation.options import GateOptions

_MEAN = "mean"

# Of a report's protocol, what tells of the software and not of what a figure means.
_INCIDENTAL = "versions"


@dataclass(frozen=True)
class Requirement:
    """A metric of a category, or of the mean, and what it must be at least; the false-alarm rate at most."""

    category: str
    metric: str
    value: float
    tolerance: float = 0.0

    @classmethod
    def of(cls, text: str) -> Requirement:
        """From `bottle.image_auroc=0.97`.

        Raises:
            ConfigError: if it is written otherwise, or there is no such metric.
        """
        name, _, number = text.partition("=")
        category, _, metric = name.strip().rpartition(".")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not category or not 0 <= value <= 1:
            raise ConfigError(f"require is {text!r}; write it as mean.image_auroc=0.95, with a value from 0 to 1")
        if metric not in METRICS:
            raise ConfigError(f"require names {metric!r}; there are {', '.join(METRICS)}")
        return cls(category, metric, value)

    def shortfall(self, report: Mapping[str, Any]) -> str:
        """What a report falls short of, in words, or ""."""
        of = report[_MEAN] if self.category == _MEAN else report["categories"].get(self.category)
        name = f"{self.category}.{self.metric}"
        if of is None:
            return f"{name}: the category is not in the report; {self.value:.4f} was required"
        value = of[self.metric]
        if value is None:
            return f"{name} is undefined; {self.value:.4f} was required"
        if self.metric in SMALLER_IS_BETTER:
            reached, word = value <= self.value + self.tolerance, "most"
        else:
            reached, word = value >= self.value - self.tolerance, "least"
        within = f" (within {self.tolerance:g})" if self.tolerance else ""
        return "" if reached else f"{name} is {value:.4f}; at {word} {self.value:.4f}{within} was required"


@dataclass(frozen=True)
class Gate:
    """Requirements, and the protocol that a baseline's figures were made by."""

    requirements: tuple[Requirement, ...]
    protocol: Mapping[str, Any]

    @classmethod
    def of(cls, options: GateOptions) -> Gate:
        """Reads the baseline: before the work, so that a wrong path costs nothing.

        Raises:
            ConfigError: if a requirement or the baseline cannot be read.
        """
        wanted = [Requirement.of(text) for text in options.require]
        if not options.baseline:
            return cls(tuple(wanted), {})
        report = _report(options.baseline)
        for category, of in {**report["categories"], _MEAN: report[_MEAN]}.items():
            known = {metric: of[metric] for metric in METRICS if of.get(metric) is not None}
            wanted += [Requirement(category, metric, value, options.tolerance) for metric, value in known.items()]
        return cls(tuple(wanted), _meaning(report["protocol"]))

    def shortfalls(self, report: Mapping[str, Any]) -> Sequence[str]:
        """What a report falls short of, a line each."""
        ours = _meaning(report["protocol"])
        other = [
            f"the baseline's {name} is {value!r} and this report's {ours.get(name)!r}: they do not compare"
            for name, value in self.protocol.items()
            if ours.get(name) != value
        ]
        return other + [line for each in self.requirements if (line := each.shortfall(report))]


def _meaning(protocol: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in protocol.items() if name != _INCIDENTAL}


def _report(uri: str) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(storage.read(storage.absolute(uri)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"baseline {uri}: cannot be read: {error}; name the report.json of an earlier run") from error
    if not isinstance(report, dict) or not {"categories", _MEAN, "protocol"} <= report.keys():
        raise ConfigError(f"baseline {uri}: not a report.json of this program")
    return report
