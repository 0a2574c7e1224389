import dataclasses
import io
import json
import re
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import beta

from stpm.evaluation.report import Failure, Report
from stpm.evaluation.thresholds import place_threshold
from stpm.metrics.category_metrics import Metric
from stpm.metrics.intervals import wilson_interval
from tests.conftest import MODELS, TINY, make_preprocessing
from tests.evaluation.runs import REPORT, result


def rows_of(report: Report, name: str = "report.parquet") -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO(report.files()[name])).to_pylist()


def test_the_report_averages_over_seeds_and_then_over_categories() -> None:
    report = json.loads(REPORT.files()["report.json"])
    a, b = report["categories"]["a"], report["categories"]["b"]
    assert (a["image_auroc"], a["pixel_auroc"], a["fit_seconds"]) == (0.5, pytest.approx(0.8), 2.5)
    assert a["image_auroc_std"] == pytest.approx(np.std([0.25, 0.75], ddof=1))
    assert (b["image_auroc"], b["image_auroc_std"], b["pixel_auroc"]) == (0.5, None, None)
    assert b["undefined"]["pixel_auroc"] == "no masks"
    assert report["mean"]["image_auroc"] == 0.5
    assert report["mean"]["pixel_auroc"] == pytest.approx(0.8)
    assert report["mean"]["categories"] == 2
    assert list(a["seeds"]) == ["0", "1"]
    assert a["seeds"]["1"]["model_id"] == result("a", 1, None, None).model.model_id
    assert a["image_auroc_interval"] == pytest.approx([0.4, 0.6])
    assert a["seeds"]["1"]["image_auroc_interval"] == pytest.approx([0.65, 0.85])
    assert (a["defects"]["dent"]["image_auroc"], a["defects"]["dent"]["defect_count"]) == (0.5, 5)
    assert report["recipe"]["size"] == "64x64"
    assert report["failures"] == [{"category": "c", "reason": "/data/c: no images"}]


@pytest.mark.parametrize(("name", "defect"), [("report.parquet", None), ("defects.parquet", "dent")])
def test_the_tables_have_a_row_per_category_and_seed_and_one_per_defect_type(name: str, defect: str | None) -> None:
    found = [(row["category"], row["seed"], row.get("defect"), row["image_auroc"]) for row in rows_of(REPORT, name)]
    assert found == [("a", 0, defect, 0.25), ("a", 1, defect, 0.75), ("b", 0, defect, 0.5)]


def test_counts_thresholds_and_their_promises_are_in_every_file() -> None:
    """Of the four calibration scores, the threshold of seed 0 is the second largest, and that of seed 1 the largest."""
    report = json.loads(REPORT.files()["report.json"])
    a, b, every = report["categories"]["a"], report["categories"]["b"], report["sum"]
    assert (a["found_count"], a["defect_count"], a["false_alarm_count"], a["good_count"]) == (3, 5, 1, 4)
    assert every == {"good_count": 8, "defect_count": 10, "found_count": 6, "false_alarm_count": 2}
    assert (a["threshold"], a["threshold_source"], b["threshold_source"]) == (1.125, "varies", "2nd of 4 good")
    assert b["expected_false_alarm_rate"] == 2 / 5
    assert beta.cdf(b["false_alarm_bound"], 2, 3) == pytest.approx(0.9)
    assert report["mean"]["expected_false_alarm_rate"] == pytest.approx((0.3 + 0.4) / 2)
    row, _, other = rows_of(REPORT)
    assert [row[name] for name in ("threshold", "threshold_rank", "found_count")] == [1.0, 2, 3]
    assert other["threshold_source"] == "2nd of 4 good"
    headline = "6 of 10 defects are found, and 2 of 8 good images are false alarms."
    for shown in (REPORT.text(), REPORT.page(), REPORT.markdown(), report["headline"]):
        assert headline in shown
    cells = ["b", "0.5000", "–", "–", "3 of 5", "1 of 4", "1", "2nd of 4 good", "40.00%", "67.95%"]
    assert "  ".join(cells) in re.sub(" {2,}", "  ", REPORT.text())
    assert " | ".join(cells) in re.sub(" +", " ", REPORT.markdown())
    for shown in ("0.5000 ± 0.3536", "b: pixel_auroc undefined: no masks", "c: failed: /data/c: no images"):
        assert shown in REPORT.text()


def test_the_headline_names_the_worst_category_and_the_mean_has_its_std_over_seeds() -> None:
    results = []
    for category, seed, image, found, alarms in (
        ("a", 0, 0.2, 5, 4),
        ("a", 1, 0.4, 4, 4),
        ("b", 0, 0.6, 1, 0),
        ("b", 1, 1.0, 1, 0),
    ):
        results.append(result(category, seed, image, None, found_count=found, false_alarm_count=alarms))
    contents = Report("data", results).contents
    assert contents["headline"] == (
        "5.5 of 10 defects are found (fewest of b: 1 of 5), and "
        "4 of 8 good images are false alarms (most of a: 4 of 4)."
    )
    assert contents["mean"]["image_auroc_std"] == pytest.approx(np.std([0.4, 0.7], ddof=1))
    assert contents["mean"]["pixel_auroc_std"] is None
    assert REPORT.contents["mean"]["image_auroc_std"] is None


@pytest.mark.parametrize(("alarms", "is_broken"), [(0, False), (3, False), (4, True)])
def test_more_false_alarms_than_the_threshold_promises_are_a_note(alarms: int, is_broken: bool) -> None:
    """The bound is 0.68; Wilson's interval of 30 in 40 good images begins at 0.60, and that of all of them at 0.91."""
    made = result("nut", 0, 0.5, None)
    flags = np.arange(40) < 10 * alarms
    rate = Metric(float(flags.mean()), wilson_interval(flags))
    metrics = dataclasses.replace(made.metrics, metrics={**made.metrics.metrics, "image_false_alarm_rate": rate})
    report = Report("data", [dataclasses.replace(made, metrics=metrics)])
    assert ("nut: more false alarms than its threshold promises" in report.text()) == is_broken


def test_an_empty_report_is_written() -> None:
    empty = Report("data", [], [Failure("c", "gone")])
    assert empty.text() == "0 of 0 defects are found, and 0 of 0 good images are false alarms.\nc: failed: gone"
    assert "1 failed" in empty.page()
    assert empty.contents["mean"]["image_auroc"] is None
    assert rows_of(empty) == []


def test_an_image_that_fails_with_each_seed_is_one_failure() -> None:
    problem = "1.png: cannot be decoded"
    damaged = [result("a", seed, None, None, problems=(problem,)) for seed in (0, 1)]
    assert Report("data", damaged).failures == [Failure("a", problem)]


def test_the_protocol_has_the_inputs_values_in_common() -> None:
    protocol = REPORT.contents["protocol"]
    assert (protocol["input_size"], protocol["resize"]) == ("64x64", "stretch, bilinear with antialiasing")
    assert protocol["normalisation"] == "mean 0.485, 0.456, 0.406; std 0.229, 0.224, 0.225"
    assert "(64x64)" in protocol["mask_resolution"]
    long = result("long", 0, 0.5, None)
    long = dataclasses.replace(long, model=dataclasses.replace(long.model, preprocessing=make_preprocessing(96, 32)))
    both = Report("data", [result("a", 0, 0.5, None), long], [])
    assert both.contents["protocol"]["input_size"] == "varies"
    assert [both.contents["categories"][name]["input_size"] for name in ("a", "long")] == ["64x64", "96x32"]
    assert [row["input_size"] for row in rows_of(both)] == ["64x64", "96x32"]
    assert "input varies, stretch, bilinear" in both.markdown()
    # The image score, as the fraction of pixels that it is the mean of.
    words = {0.0: "maximum of the anomaly map", 0.005: "mean of the highest 0.5 % of the anomaly map"}
    fitted = []
    for fraction, expected in words.items():
        fitted.append(result(f"{fraction}", 0, 0.5, None, dataclasses.replace(TINY, top_fraction=fraction)))
        assert Report("data", fitted[-1:]).contents["protocol"]["image_score"] == expected
    assert Report("data", fitted).contents["protocol"]["image_score"] == "varies"


def test_a_model_without_a_student_is_reported_without_losses() -> None:
    report = Report("data", [result("a", seed, 0.5, None, MODELS["memory"]) for seed in (0, 1)], [])
    values = json.loads(report.files()["report.json"])
    a = values["categories"]["a"]
    assert (a["train_loss"], a["validation_loss"]) == (None, None)
    assert (values["recipe"]["student"], values["recipe"]["memory"]) == ("none", 50)
    assert [row["train_loss"] for row in rows_of(report)] == [None, None]
    assert "0.5000" in report.text()


def test_the_markdown_table_escapes_names() -> None:
    report = Report("data", [result("a|b", 0, 0.5, None)], [Failure("c", "<b>\n| x")])
    text = report.markdown()
    table = text.split("\n\n")[1].splitlines()
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "0.5000" in table[2]
    assert "\\<b\\>" in text
    assert "<b>" not in text


@pytest.mark.parametrize(("largest", "recall", "is_noted"), [(40.0, 0.9, True), (40.0, 1.0, False), (2.5, 0.9, False)])
def test_a_threshold_that_an_odd_good_image_sets_is_noted(largest: float, recall: float, is_noted: bool) -> None:
    """It is not where every defect was found nevertheless."""
    scores = np.append(np.linspace(1, 2, 20), largest).astype(np.float32)
    made = dataclasses.replace(result("nut", 0, 0.5, None), threshold=place_threshold(largest, scores))
    made.metrics.metrics["image_recall"] = Metric(recall)
    text = Report("data", [made]).text()
    assert ("nut: its threshold is set by a good image that scores far above most others" in text) == is_noted
