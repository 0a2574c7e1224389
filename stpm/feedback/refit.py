"""Fit models again, with images that a person marked as good among the training images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stpm.data import mvtec
from stpm.detector import load
from stpm.feedback.new_images import NewImages
from stpm.fitting.fit_categories import fit_categories, read_categories
from stpm.fitting.options import WorkerOptions
from stpm.fitting.task import FitResult
from stpm.method.recipe import Recipe
from stpm.models.record import AddedImage
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions, WantedBackend


@dataclass(frozen=True)
class Refit:
    """How to fit again.

    Args:
        data: URI of the data set in the MVTec AD layout.
        recipe: recipe of the models, with their seed.
        workers: number and resources of the workers.
    """

    data: str
    recipe: Recipe
    workers: WorkerOptions

    def fit(
        self, store: ModelStore, new: Mapping[str, Sequence[AddedImage]], cluster: ClusterOptions, wait: bool
    ) -> dict[str, FitResult]:
        """Fit and stage the models of those categories that are in the data set; for `wait` see `fit_categories`.

        Raises:
            ConfigError: as `fit_categories` does.
            DataError: if the data set is missing or empty.
        """
        names = sorted(new.keys() & set(mvtec.find_categories(self.data)))
        categories = read_categories(self.data, names)[0] if names else []
        if not categories:
            return {}
        stores = {self.recipe.seed: store.uri}
        results = fit_categories(categories, self.recipe, stores, self.workers, cluster, wait, new)
        return {result.task.category: result for result in results}

    def scores(
        self, store: ModelStore, new: NewImages, model_id: str, backend: WantedBackend
    ) -> npt.NDArray[np.float32]:
        """Score new images with a new model, (n,)."""
        category = new.record.category
        detector = load(store.uri, category, model_id, backend=backend)
        files = (store.added_uri(category, image.digest) for image in new.images)
        return np.array([result.score for result in detector.score(files) if not result.error], np.float32)
