"""The marked images of a category that are new to its model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stpm import storage
from stpm.data import image_files
from stpm.detector import load
from stpm.errors import ImageError
from stpm.models.record import AddedImage, ModelRecord
from stpm.models.store import ModelStore
from stpm.options import WantedBackend
from stpm.result import Result

# Images that are in memory at a time.
_BATCH_SIZE = 16


class NewScore(NamedTuple):
    """An image's score, the largest value of its anomaly map, and its statistics in the order of COMPARED."""

    score: float
    peak: float
    statistics: tuple[float, ...]

    @classmethod
    def of(cls, result: Result) -> NewScore:
        return cls(result.score, float(result.model_map.max()), (*result.size, *(result.statistics or ())))


@dataclass(frozen=True)
class NewImages:
    """Images that are marked as good.

    Args:
        record: record of the category's current model.
        images: the images that are new to that model, each once.
        results: what that model gives to each of `images`.
        uris: URIs of the files with these images; several may be copies of one.
        known: number of files whose image was added before.
        refused: URIs of files that cannot be used, with the reason.
    """

    record: ModelRecord
    images: list[AddedImage]
    results: list[NewScore]
    uris: list[str]
    known: int
    refused: dict[str, str]

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """The scores of `images`, (n,)."""
        return np.array([result.score for result in self.results], np.float32)


def score_and_store(store: ModelStore, category: str, uris: Sequence[str], backend: WantedBackend) -> NewImages:
    """Fetch images, score those that are new to a category's current model with it, and copy them to the store.

    Raises:
        DataError: if the category's name is not allowed in a path.
        ModelError: if the category has no model, or it cannot be loaded.
    """
    detector = load(store.uri, category, backend=backend)
    before = {image.digest for image in detector.record.added_images}
    known = 0
    refused: dict[str, str] = {}
    # By digest: the URIs of the copies of an image, and what the model makes of it.
    copies: dict[str, list[str]] = {}
    results: dict[str, NewScore | ImageError] = {}
    for start in range(0, len(uris), _BATCH_SIZE):
        files: dict[str, bytes] = {}
        batch = uris[start : start + _BATCH_SIZE]
        for uri, data in zip(batch, storage.in_parallel(_fetch, batch), strict=True):
            if isinstance(data, ImageError):
                refused[uri] = str(data)
            elif (digest := storage.digest(data)) in before:
                known += 1
            elif digest in copies:
                copies[digest].append(uri)
            else:
                copies[digest], files[digest] = [uri], data
        for (digest, data), scored in zip(files.items(), detector.score(files.values()), strict=True):
            results[digest] = scored.error or NewScore.of(scored)
            if not scored.error:
                store.put_added(category, data)
    found: dict[str, NewScore] = {}
    for digest, result in results.items():
        if isinstance(result, ImageError):
            refused |= dict.fromkeys(copies[digest], str(result))
        else:
            found[digest] = result
    return NewImages(
        record=detector.record,
        images=[AddedImage(digest, copies[digest][0], fitted=False) for digest in found],
        results=list(found.values()),
        uris=[uri for digest in found for uri in copies[digest]],
        known=known,
        refused=refused,
    )


def _fetch(uri: str) -> bytes | ImageError:
    try:
        return image_files.read_uri(uri)
    except ImageError as error:
        return error
