from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest

from stpm.evaluation.published import METRICS, MVTEC_AD, difference_of_protocol
from stpm.options import Size
from stpm.recipe import PRESETS
from stpm.record import ModelRecord
from tests.conftest import preprocessing_of
from tests.evaluation.runs import result


def test_the_categories_average_to_the_published_means() -> None:
    for metric, mean in zip(METRICS, (0.9555, 0.9702, 0.9283), strict=True):
        ours = statistics.fmean(getattr(of, metric) for of in MVTEC_AD.values())
        assert ours == pytest.approx(mean, abs=6e-4), metric
    assert sum(of.test_images for of in MVTEC_AD.values()) == 1725


def model(**changes: Any) -> ModelRecord:
    return dataclasses.replace(
        result("bottle", 0, 1.0, 1.0).model,
        recipe=dataclasses.replace(PRESETS["paper"], **changes),
        preprocessing=preprocessing_of(256),
    )


def test_only_the_same_protocol_compares() -> None:
    assert difference_of_protocol("bottle", 83, model(), "model") == ""
    assert difference_of_protocol("bottle", 83, model(epochs=3, seed=9), "model") == ""
    demo = difference_of_protocol("bottle", 83, model(teacher="demo"), "model")
    assert demo == "teacher demo instead of resnet18.tv_in1k"
    assert "original size" in difference_of_protocol("bottle", 83, model(), "original")
    assert "82 test images instead of 83" in difference_of_protocol("bottle", 82, model(), "model")


def test_what_counts_of_the_input_is_what_came_of_the_recipe() -> None:
    # Asked for otherwise, and the same.
    same = model(size=Size("auto"), resize="fit", normalisation="imagenet")
    assert difference_of_protocol("bottle", 83, same, "model") == ""
    for changes, said in (
        ({"height": 288}, "size 288x256 instead of 256x256"),
        ({"resize": "fit"}, "resize fit instead of stretch"),
        ({"interpolation": "bicubic"}, "interpolation bicubic instead of bilinear"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean (0.5, 0.5, 0.5) instead of (0.485, 0.456, 0.406)"),
    ):
        other = dataclasses.replace(model(), preprocessing=dataclasses.replace(preprocessing_of(256), **changes))
        assert difference_of_protocol("bottle", 83, other, "model") == said
