"""The numbers of a run: how many images were scored, with which outcome, and how long the stages computed."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class RunStatistics:
    """The images that a run has scored since its last start, and the time that its stages computed.

    Statistics add up. An image that is scored twice, because a task was killed, counts twice.

    Args:
        images: number of images that scorers have finished.
        errors: how many of them have no score.
        anomalous: how many of them are anomalous.
        openvino_images: how many of them OpenVINO computed; PyTorch computed the others.
        decode_seconds: CPU seconds for fetching and decoding.
        score_seconds: seconds of the scorers' devices: of a CPU core, or of a GPU.
        draw_seconds: CPU seconds for drawing heatmaps.
        steady_images_per_second: measured by the progress actor, without the first quarter of the images; 0 if unknown.
    """

    images: int = 0
    errors: int = 0
    anomalous: int = 0
    openvino_images: int = 0
    decode_seconds: float = 0.0
    score_seconds: float = 0.0
    draw_seconds: float = 0.0
    steady_images_per_second: float = 0.0

    def __add__(self, other: RunStatistics) -> RunStatistics:
        return RunStatistics(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


class UnfinishedImage(NamedTuple):
    """An image without a row, and its error; the next run tries it again."""

    uri: str
    error_kind: str
    error_message: str

    def __str__(self) -> str:
        return ": ".join(self)


@dataclass(frozen=True)
class CategoryCounts:
    """The number of a category's rows, of anomalous ones, and of those without a score. Counts add up."""

    rows: int = 0
    anomalous: int = 0
    errors: int = 0

    def __add__(self, other: CategoryCounts) -> CategoryCounts:
        return CategoryCounts(self.rows + other.rows, self.anomalous + other.anomalous, self.errors + other.errors)


@dataclass(frozen=True)
class RowCounts:
    """Counts of written rows, and examples of errors.

    Args:
        rows: number of rows.
        anomalous: how many of them are anomalous.
        errors: how many of them have no score, by error kind.
        error_examples: the first of these rows by their URIs, a line each.
        categories: counts of rows by category.
        bytes_read: size of all image files.
    """

    rows: int = 0
    anomalous: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    error_examples: list[str] = field(default_factory=list)
    categories: dict[str, CategoryCounts] = field(default_factory=dict)
    bytes_read: int = 0


@dataclass(frozen=True)
class RunResult(RowCounts):
    """The rows of a run, and the time since its last start, in which it may have scored a part of them.

    Args:
        unfinished: number of images without a row, which the next run tries again.
        seconds: wall time since the last start.
        statistics: since the last start.
    """

    unfinished: int = 0
    seconds: float = 0.0
    statistics: RunStatistics = field(default_factory=RunStatistics)

    @property
    def error_count(self) -> int:
        """The number of rows without a score."""
        return sum(self.errors.values())

    @property
    def steady_images_per_second(self) -> float:
        """Images per second without the start of the run, or those of all of it if it was too short to tell."""
        whole = self.statistics.images / self.seconds if self.seconds else 0.0
        return self.statistics.steady_images_per_second or whole


def too_many_errors(errors: int, images: int, max_rate: float) -> str:
    """Say why a job whose images all have rows ends with another exit code than 0; "" if the errors are few enough."""
    if errors <= max_rate * images:
        return ""
    return (
        f"{errors} of {images} images are errors, more than --max-error-rate {max_rate:g}: see error_kind in the rows"
    )
