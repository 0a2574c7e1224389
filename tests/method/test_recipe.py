import dataclasses
from typing import Any

import pytest

from stpm.errors import ConfigError, DataError
from stpm.method.recipe import PRESETS, Recipe
from stpm.options import Integers, Size


def test_presets_match_their_sources() -> None:
    paper, notebook = PRESETS["paper"], PRESETS["notebook"]
    assert (paper.optimiser, paper.learning_rate, paper.momentum, paper.weight_decay) == ("sgd", 0.4, 0.9, 1e-4)
    assert (paper.batch_size, paper.epochs, paper.size, paper.normalisation) == (32, 100, "256x256", "teacher")
    assert (notebook.optimiser, notebook.learning_rate, notebook.batch_size, notebook.epochs) == ("adam", 4e-4, 4, 20)
    assert (notebook.size, notebook.normalisation) == ("256x256", "none")
    for preset in (paper, notebook):
        assert (preset.student, preset.memory, preset.fusion, preset.resize) == ("stpm", 0, "product", "stretch")
        assert (preset.smoothing, preset.top_fraction, preset.held_out_fraction) == (0.0, 0.0, 0.2)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("levels", [Integers(), Integers((3, 1)), Integers((1, 1)), Integers((-1, 1))]),
        ("size", [Size("8"), Size("64x5000")]),
        ("pixels", [1000]),
        ("batch_size", [0]),
        ("epochs", [0]),
        ("learning_rate", [0.0, float("nan")]),
        ("loss_factor", [float("inf")]),
        ("momentum", [1.0]),
        ("weight_decay", [-1.0]),
        ("held_out_fraction", [0.0, 1.0]),
        ("seed", [-1]),
        ("smoothing", [-1.0, 101.0, float("nan")]),
        ("top_fraction", [-0.1, 1.0, float("nan")]),
        ("student_weight", [0.0, 1.0]),
        ("memory", [-1, 1_000_001]),
        ("teacher", [""]),
    ],
)
def test_recipe_refuses_values_out_of_range(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"{field.replace('_', '-')} is .*; give"):
            Recipe(**{field: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": "none"}, "student is 'none'; give --memory too"),
        ({"memory": 9}, "fusion is 'product'; give quantile: .* or give --memory 0"),
        ({"calibration_folds": 1}, "calibration-folds is 1; give 2 or more"),
        ({"memory": 9, "fusion": "sum"}, "fusion is 'sum'; give quantile"),
        (
            {"memory": 9, "fusion": "quantile", "memory_levels": Integers((2, 4))},
            "memory-levels is .* of the levels 1,2,3",
        ),
        ({"memory": 9, "fusion": "quantile", "memory_levels": Integers((3, 2))}, "memory-levels is .* increasing"),
        ({"memory": 9, "fusion": "quantile", "memory_levels": Integers((2, 2))}, "memory-levels is .* increasing"),
    ],
)
def test_recipe_refuses_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe(**changes)
    # Without a memory, its levels do not matter.
    assert Recipe(levels=Integers((1,)), memory_levels=Integers((2,))).memory == 0


def test_for_image_count_raises_epochs_to_reach_min_steps() -> None:
    recipe = Recipe(batch_size=8, epochs=5, min_steps=100)
    # 48 of 60 images are trained on: 6 steps per epoch, so 17 epochs for 100 steps.
    assert recipe.for_image_count(60).epochs == 17
    assert recipe.for_image_count(209).epochs == 5
    assert recipe.for_image_count(2).epochs == 100
    assert Recipe(batch_size=8, epochs=5).for_image_count(2).epochs == 5
    assert recipe.for_image_count(60).for_image_count(60) == recipe.for_image_count(60)


def test_held_out_count_is_fraction_within_limits() -> None:
    paper, default = PRESETS["paper"], PRESETS["default"]
    assert [paper.held_out_count(n) for n in (2, 4, 8, 209)] == [1, 1, 2, 42]
    assert [default.held_out_count(n) for n in (2, 3, 4, 8, 209)] == [1, 1, 1, 2, 42]
    one_model = dataclasses.replace(default, calibration_folds=0)
    assert [one_model.held_out_count(n) for n in (2, 3, 4, 8, 209)] == [1, 2, 2, 2, 42]


@pytest.mark.parametrize(
    ("recipe", "needed", "why"),
    [
        (PRESETS["paper"], 2, "1 to fit on and 1 to calibrate with"),
        (PRESETS["default"], 3, "1 to fit on and 2 to calibrate with"),
        (dataclasses.replace(PRESETS["default"], calibration_folds=0), 3, "1 to fit on and 2 to calibrate with"),
    ],
)
def test_check_image_count_refuses_too_few_with_reason(recipe: Recipe, needed: int, why: str) -> None:
    recipe.check_image_count(needed)
    for images in range(1, needed):
        with pytest.raises(DataError, match=f"good images: {images}; this recipe needs at least {needed}, {why}"):
            recipe.check_image_count(images)


def test_there_are_no_more_folds_than_images() -> None:
    recipe = PRESETS["default"]
    assert [recipe.fold_count(images) for images in (2, 3, 5, 6, 209)] == [2, 3, 5, 5, 5]
    alone = dataclasses.replace(recipe, memory=0, student="stpm")
    assert [each.calibration_count(14) for each in (recipe, PRESETS["paper"], alone)] == [14, 3, 3]
