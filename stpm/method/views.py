"""The views of an image: the sizes at which a teacher sees it, and the pyramid levels that are used at each."""

from __future__ import annotations

from dataclasses import dataclass

from stpm.method.backbones import level_channels
from stpm.method.preprocessing import Preprocessing, coarse_shape
from stpm.method.recipe import Recipe

# By default a level has banks if it has at least this many channels: banks of a level with 24 made detection worse
# (docs/recipes.md).
_MIN_CHANNELS = 32


@dataclass(frozen=True)
class View:
    """Height and width of an input, in pixels, and the pyramid levels of its features, finest first."""

    input_shape: tuple[int, int]
    levels: tuple[int, ...]


def choose_views(recipe: Recipe, preprocessing: Preprocessing) -> tuple[View, ...]:
    """Return a model's views, the fine one first. The last one is the student's.

    Raises:
        ConfigError: if the teacher's architecture is unknown, or does not have the levels.
    """
    shape = preprocessing.input_shape
    if not recipe.coarse_pixels:
        return (View(shape, tuple(recipe.levels)),)
    of_student = recipe.levels if recipe.student != "none" else ()
    coarse = tuple(sorted({*recipe.coarse_levels, *of_student}))
    return View(shape, choose_memory_levels(recipe)[0]), View(coarse_shape(shape, recipe.coarse_pixels), coarse)


def choose_memory_levels(recipe: Recipe) -> list[tuple[int, ...]]:
    """Return the levels with memory banks in each view: the recipe's, or else those with enough channels."""
    chosen = [tuple(recipe.memory_levels) or _wide_levels(recipe.teacher, tuple(recipe.levels))]
    return chosen + ([_wide_levels(recipe.teacher, tuple(recipe.coarse_levels))] if recipe.coarse_pixels else [])


def _wide_levels(teacher: str, levels: tuple[int, ...]) -> tuple[int, ...]:
    channels = level_channels(teacher, levels)
    return tuple(level for level, count in zip(levels, channels, strict=True) if count >= _MIN_CHANNELS) or levels[-1:]
