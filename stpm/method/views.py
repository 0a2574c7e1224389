"""The views of an image: the sizes at which a teacher sees it, and the pyramid levels that are used at each."""

from __future__ import annotations

from dataclasses import dataclass

from stpm.method.backbones import describe_levels
from stpm.method.preprocessing import Preprocessing
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
    if not preprocessing.coarse_shape:
        return (View(shape, tuple(recipe.levels)),)
    fine, coarse = choose_memory_levels(recipe)
    of_student = recipe.levels if recipe.student != "none" else ()
    return View(shape, fine), View(preprocessing.coarse_shape, tuple(sorted({*coarse, *of_student})))


def levels_of_teacher(recipe: Recipe) -> tuple[int, ...]:
    """Return the pyramid levels of all views, finest first. Raise ConfigError as `choose_views` does."""
    coarse = choose_memory_levels(recipe)[1] if recipe.max_views > 1 else ()
    return tuple(sorted({*recipe.levels, *coarse}))


def choose_memory_levels(recipe: Recipe) -> list[tuple[int, ...]]:
    """Return the levels with memory banks in each view: those that the recipe names, or else its defaults."""
    levels = tuple(recipe.levels)
    chosen = [tuple(recipe.memory_levels) or _wide_levels(recipe.teacher, levels)]
    if recipe.max_views > 1:
        coarse = tuple(recipe.coarse_levels)
        if not coarse:
            known = describe_levels(recipe.teacher, levels)
            next_level = (levels[-1] + 1,) if known.has_next else ()
            coarse = levels if known.is_transformer else levels[1:] + next_level
            coarse = _wide_levels(recipe.teacher, coarse or levels)
        chosen.append(coarse)
    return chosen


def _wide_levels(teacher: str, levels: tuple[int, ...]) -> tuple[int, ...]:
    channels = describe_levels(teacher, levels).channels
    return tuple(level for level, count in zip(levels, channels, strict=True) if count >= _MIN_CHANNELS) or levels[-1:]
