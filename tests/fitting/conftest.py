from collections.abc import Callable

import numpy as np
import pytest

from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.training_images import TrainingImages
from stpm.method.recipe import Recipe
from stpm.method.teacher import Teacher
from tests.fitting.helpers import RAM, FeaturesOf, unpadded


@pytest.fixture
def images(rng: np.random.Generator) -> TrainingImages:
    return unpadded(rng.integers(90, 130, (9, 64, 64, 3), dtype=np.uint8))


@pytest.fixture
def features_of(images: TrainingImages, make_teacher: Callable[[Recipe], Teacher]) -> FeaturesOf:
    """Return a function that gives an untrained teacher's features of images; cached, unless there is no RAM."""

    def features_of(recipe: Recipe, images: TrainingImages = images, ram: int = RAM) -> TeacherFeatures:
        features = TeacherFeatures(make_teacher(recipe), images, ram)
        assert features.cached == (ram > 0)
        return features

    return features_of
