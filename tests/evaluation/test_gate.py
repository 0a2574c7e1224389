import json
from pathlib import Path
from typing import Any

import pytest

from stpm.errors import ConfigError
from stpm.evaluation.gate import read_gate
from stpm.evaluation.options import ReportOptions
from stpm.metrics.category_metrics import METRICS
from stpm.options import Names


def report(protocol: str = "model size", **values: float) -> dict[str, Any]:
    metrics = dict.fromkeys(METRICS) | {"image_auroc": 0.9, "image_false_alarm_rate": 0.02} | values
    meaning = {"mask_resolution": protocol, "versions": {"torch": str(values)}, "intervals": str(values)}
    return {"categories": {"nut.v2": metrics}, "mean": metrics, "protocol": meaning}


@pytest.mark.parametrize(
    ("require", "line"),
    [
        ("mean.image_auroc=0.9", ""),
        ("nut.v2.image_auroc=0.5", ""),
        ("mean.image_false_alarm_rate=0.02", ""),
        ("nut.v2.image_auroc=0.95", "nut.v2.image_auroc is 0.9000; at least 0.9500 was required"),
        ("mean.image_false_alarm_rate=0.01", "mean.image_false_alarm_rate is 0.0200; at most 0.0100 was required"),
        ("mean.pixel_auroc=0.9", "mean.pixel_auroc is undefined; 0.9000 was required"),
        ("bolt.image_auroc=0.1", "bolt.image_auroc: the category is not in the report; 0.1000 was required"),
    ],
)
def test_a_shortfall_names_both_values(require: str, line: str) -> None:
    gate = read_gate(ReportOptions(require=Names([require, "mean.image_auroc=0.1"])))
    assert gate.shortfalls(report()) == ([line] if line else [])


@pytest.mark.parametrize("text", ["image_auroc=0.9", "mean.image_auroc", "mean.auroc=0.9", "mean.image_auroc=95", "="])
def test_an_invalid_requirement_is_an_error_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"mean\.image_auroc=0\.95|there are image_auroc"):
        read_gate(ReportOptions(require=Names([text])))


def test_a_baseline_of_the_same_protocol_is_reached_within_the_tolerance(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report()))
    gate = read_gate(ReportOptions(baseline=str(path), tolerance=0.01))
    assert gate.shortfalls(report(image_auroc=0.895, image_false_alarm_rate=0.025)) == []
    assert gate.shortfalls(report(image_auroc=0.95, image_false_alarm_rate=0.0)) == []
    worse = gate.shortfalls(report(image_auroc=0.88))
    assert len(worse) == 2
    assert "nut.v2.image_auroc is 0.8800; at least 0.9000 (within 0.01) was required" in worse
    more = gate.shortfalls(report(image_false_alarm_rate=0.5))
    assert "mean.image_false_alarm_rate is 0.5000; at most 0.0200 (within 0.01) was required" in more
    assert gate.shortfalls(report("original size")) == [
        "the baseline's mask_resolution is 'model size' and this report's 'original size': they cannot be compared"
    ]


@pytest.mark.parametrize(
    "content",
    [
        None,
        "no json",
        "[]",
        "{}",
        "[" * 200_000,
        '{"categories": {}, "mean": {}, "protocol": [1]}',
        '{"categories": {}, "mean": {"image_auroc": "high"}, "protocol": {}}',
        '{"categories": {}, "mean": {"image_auroc": [1]}, "protocol": {}}',
        '{"categories": {"nut": null}, "mean": {}, "protocol": {}}',
        '{"categories": {}, "mean": null, "protocol": {}}',
    ],
)
def test_an_invalid_baseline_is_an_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="baseline"):
        read_gate(ReportOptions(baseline=str(path)))
