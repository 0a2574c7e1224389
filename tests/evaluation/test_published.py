from __future__ import annotations

import dataclasses
import statistics

import pytest

from stpm.evaluation.published import METRICS, MVTEC_AD, difference_of_protocol
from stpm.recipe import PRESETS


def test_the_categories_average_to_the_published_means() -> None:
    for metric, mean in zip(METRICS, (0.9555, 0.9702, 0.9283), strict=True):
        ours = statistics.fmean(getattr(of, metric) for of in MVTEC_AD.values())
        assert ours == pytest.approx(mean, abs=6e-4), metric
    assert sum(of.test_images for of in MVTEC_AD.values()) == 1725


def test_only_the_same_protocol_compares() -> None:
    paper = PRESETS["paper"]
    assert difference_of_protocol("bottle", 83, paper, "model") == ""
    assert difference_of_protocol("bottle", 83, dataclasses.replace(paper, epochs=3, seed=9), "model") == ""
    demo = dataclasses.replace(paper, teacher="demo")
    assert difference_of_protocol("bottle", 83, demo, "model") == "teacher demo instead of resnet18.tv_in1k"
    assert "original size" in difference_of_protocol("bottle", 83, paper, "original")
    assert "82 test images instead of 83" in difference_of_protocol("bottle", 82, paper, "model")
