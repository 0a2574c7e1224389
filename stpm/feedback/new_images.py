"""The marked images of a category that are new to its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stpm import storage
from stpm.data import image_files
from stpm.detector import Detector
from stpm.errors import ImageError

# Files that are fetched at a time.
_BATCH_SIZE = 16


class NewImage(NamedTuple):
    """An image that a model has not seen, and what the model makes of it.

    Args:
        digest: SHA-256 of its file.
        uris: where the file is; several may be copies of one.
        score: of the image.
        peak: largest value of its anomaly map.
        statistics: of the image, in the order of `stpm.data.image_statistics.COMPARED`.
    """

    digest: str
    uris: list[str]
    score: float
    peak: float
    statistics: tuple[float, ...]


def score_new(detector: Detector, uris: Sequence[str]) -> tuple[list[NewImage], dict[str, str]]:
    """Fetch images, and score those that were not added to the detector's model before.

    Returns:
        The new images, each once; and by URI, why an image cannot be used.
    """
    before = {image.digest for image in detector.record.added_images}
    copies: dict[str, list[str]] = {}
    refused: dict[str, str] = {}

    def new_files() -> Iterator[bytes]:
        for start in range(0, len(uris), _BATCH_SIZE):
            batch = uris[start : start + _BATCH_SIZE]
            for uri, data in zip(batch, storage.in_parallel(_fetch, batch), strict=True):
                if isinstance(data, ImageError):
                    refused[uri] = str(data)
                elif (digest := storage.digest(data)) in copies:
                    copies[digest].append(uri)
                elif digest not in before:
                    copies[digest] = [uri]
                    yield data

    outcomes = [
        result.error or (result.score, float(result.model_map.max()), (*result.size, *(result.statistics or ())))
        for result in detector.score(new_files())
    ]
    found = []
    for (digest, same), outcome in zip(copies.items(), outcomes, strict=True):
        if isinstance(outcome, ImageError):
            refused |= dict.fromkeys(same, str(outcome))
        else:
            found.append(NewImage(digest, same, *outcome))
    return found, refused


def _fetch(uri: str) -> bytes | ImageError:
    try:
        return image_files.read_uri(uri)
    except ImageError as error:
        return error
