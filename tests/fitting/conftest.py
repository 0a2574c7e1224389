from __future__ import annotations

import numpy as np
import pytest

from stpm.fitting.training_images import TrainingImages
from tests.fitting.helpers import unpadded


@pytest.fixture
def images(rng: np.random.Generator) -> TrainingImages:
    return unpadded(rng.integers(90, 130, (9, 64, 64, 3), dtype=np.uint8))
