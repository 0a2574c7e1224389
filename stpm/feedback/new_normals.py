"""The marked images of a category that are new to its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stpm import storage
from stpm.errors import ImageError
from stpm.feedback.local_scorer import BATCH_SIZE, LocalScore, LocalScorer
from stpm.models.record import AddedNormal, ModelRecord
from stpm.models.store import ModelStore
from stpm.options import WantedBackend
from stpm.scoring.inputs import image_files


@dataclass(frozen=True)
class NewNormals:
    """Images that are marked as good.

    Args:
        record: record of the category's current model.
        images: the images that are new to that model, each once.
        scores: score of each of `images` by that model.
        known: number of images that were added before, or are here twice.
        refused: URIs of images that cannot be used, with the reason.
    """

    record: ModelRecord
    images: list[AddedNormal]
    scores: list[LocalScore]
    known: int
    refused: dict[str, str]

    @property
    def values(self) -> npt.NDArray[np.float32]:
        """The scores alone, (n,)."""
        return np.array([score.score for score in self.scores], np.float32)


def collect(store: ModelStore, category: str, uris: Sequence[str], backend: WantedBackend) -> NewNormals:
    """Fetch images, score them with a category's current model, and copy the new ones to the store.

    Raises:
        DataError: if the category's name is not allowed in a path.
        ModelError: if the category has no model, or it cannot be loaded.
    """
    scorer = LocalScorer(store, category, "", backend)
    found: dict[str, tuple[AddedNormal, LocalScore]] = {}
    before = {image.digest for image in scorer.record.added_normals}
    refused: dict[str, str] = {}
    for start in range(0, len(uris), BATCH_SIZE):
        files: dict[str, tuple[str, bytes]] = {}
        batch = uris[start : start + BATCH_SIZE]
        for uri, data in zip(batch, storage.in_parallel(_fetch, batch), strict=True):
            if isinstance(data, ImageError):
                refused[uri] = str(data)
            elif (digest := storage.digest(data)) not in before and digest not in found:
                files.setdefault(digest, (uri, data))
        scores = scorer(data for _, data in files.values())
        for (digest, (uri, data)), score in zip(files.items(), scores, strict=True):
            if isinstance(score, ImageError):
                refused[uri] = str(score)
            else:
                store.put_normal(category, data)
                found[digest] = AddedNormal(digest, uri, fitted=False), score
    return NewNormals(
        record=scorer.record,
        images=[image for image, _ in found.values()],
        scores=[score for _, score in found.values()],
        known=len(uris) - len(refused) - len(found),
        refused=refused,
    )


def _fetch(uri: str) -> bytes | ImageError:
    try:
        return image_files.read_uri(uri)
    except ImageError as error:
        return error
