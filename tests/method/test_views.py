import dataclasses

import pytest

from stpm.method.backbones import describe_levels
from stpm.method.recipe import PRESETS
from stpm.method.views import View, choose_memory_levels, choose_views, levels_of_teacher
from stpm.options import Integers
from tests.conftest import make_preprocessing


@pytest.mark.parametrize(
    ("teacher", "named", "levels"),
    [
        ("resnet18.tv_in1k", (), (1, 2, 3)),
        ("demo", (), (2, 3)),
        # Its levels have 24, 32 and 48 channels.
        ("test_efficientnet", (), (2, 3)),
        ("demo", (1, 3), (1, 3)),
    ],
)
def test_levels_with_many_channels_or_names_have_banks(
    teacher: str, named: tuple[int, ...], levels: tuple[int, ...]
) -> None:
    recipe = dataclasses.replace(PRESETS["default"], teacher=teacher, memory_levels=Integers(named))
    assert choose_memory_levels(recipe)[0] == levels


@pytest.mark.parametrize(
    ("teacher", "levels", "known"),
    [
        ("demo", (1, 2, 3), (False, 32, True)),
        ("convnext_tiny", (1, 2, 3), (False, 32, False)),
        ("vit_small_patch14_dinov2", (5, 11), (True, 14, False)),
        # Its input has a fixed size, and it cannot interpolate.
        ("maxvit_tiny_rw_224", (1, 2), (False, 32, True)),
    ],
)
def test_levels_are_told_without_weights(teacher: str, levels: tuple[int, ...], known: tuple[bool, int, bool]) -> None:
    assert describe_levels(teacher, levels)[1:] == known


def test_the_coarse_view_is_small_and_has_the_students_levels() -> None:
    recipe = dataclasses.replace(PRESETS["default"], teacher="demo")
    assert levels_of_teacher(recipe) == (1, 2, 3, 4)
    fine, coarse = choose_views(recipe, dataclasses.replace(make_preprocessing(576, 832), coarse_shape=(160, 224)))
    assert fine == View((576, 832), (2, 3))
    assert coarse == View((160, 224), (1, 2, 3, 4))
    assert choose_views(recipe, make_preprocessing(64)) == (View((64, 64), (1, 2, 3)),)
    alone = dataclasses.replace(recipe, memory=0)
    assert (alone.max_views, levels_of_teacher(alone)) == (1, (1, 2, 3))
