"""Anomaly maps of a batch of images, and what is read from them, as tensors on the device that computed them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from stpm.method.device import send
from stpm.method.preprocessing import Content

Float32Array = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Number = TypeVar("Number", bound=np.generic)

_EPS = 1e-12
# Of a distance that is smoothed.
_LARGEST = 1e30
# A Gaussian is cut off at so many standard deviations.
_TRUNCATE = 3.0
# Pixels that one matrix product smooths: more multiply more zeros, fewer read more pixels twice.
_TILE = 64


@dataclass(frozen=True, eq=False)
class AnomalyMaps:
    """Anomaly maps of B images, and those of their V views, none where the total is a product or a sum.

    Args:
        total: (B, H, W) float32, of the input's shape; NaN at pixels that are not inspected, on padding too.
        views: (V, B, h, w) float32.
        content: of the same images.
        counts: (B,) inspected pixels of each image.
        inspected: (B, H, W) bool, or (1, H, W) if the same pixels are of all images; None: all pixels are.
    """

    total: Tensor
    views: Tensor
    content: Content
    counts: Indices
    inspected: Tensor | None = None

    def __len__(self) -> int:
        return len(self.total)

    @classmethod
    def smooth(cls, total: Tensor, views: Tensor, content: Content, sigma: float) -> AnomalyMaps:
        """Smooth a total by a Gaussian; what is not inspected takes no part in it.

        `sigma` is in pixels; 0: leave it as it is.
        """
        pixels = content.pixels((total.shape[1], total.shape[2]))
        if sigma:
            # An infinite distance would leave no number in its tile.
            total = total.clamp(-_LARGEST, _LARGEST)
        if pixels is None:
            counts = np.full(len(total), total[0].numel())
            return cls(gaussian(total, sigma) if sigma else total, views, content, counts)
        inspected = send(torch.from_numpy(pixels), total.device)
        if sigma:
            total = gaussian(total.where(inspected, 0.0), sigma) / gaussian(inspected.float(), sigma).clamp_min(_EPS)
        counts = np.broadcast_to(np.count_nonzero(pixels, axis=(1, 2)), len(total))
        return cls(total.where(inspected, torch.nan), views, content, counts, inspected)

    def scalars(self, top_fraction: float) -> Tensor:
        """Compute what a decision needs: (B, 3 + V) float64.

        Returns:
            The largest value; where it is, counted row by row over the input; the image's score, which is the mean of
            the highest pixels, this fraction of the inspected ones, at least one; the mean of each view's map there, at
            any of those that are equal.
        """
        ranked = self.total if self.inspected is None else self.total.where(self.inspected, -torch.inf)
        ranked = ranked.flatten(1)
        counts = np.maximum(np.rint(top_fraction * self.counts).astype(int), 1)
        values, at = _highest(ranked, int(counts.max()))
        numbers = send(torch.from_numpy(counts), values.device)[:, None]
        is_top = torch.arange(values.shape[1], device=values.device) < numbers
        # Of equal pixels, the peak is the first.
        peak = ranked.argmax(dim=1)
        read = [values]
        if len(self.views):
            rows, columns = (send(self._positions(axis), at.device) for axis in (0, 1))
            width = self.total.shape[2]
            row, column = rows.gather(1, at // width), columns.gather(1, at % width)
            image = torch.arange(len(at), device=at.device)[:, None]
            read += [view[image, row, column] for view in self.views]
        means = [each.double().where(is_top, 0.0).sum(dim=1) / numbers[:, 0] for each in read]
        return torch.stack([values[:, 0].double(), peak.double(), *means], dim=1)

    def inspected_values(self) -> Float32Array:
        """Return the values of all inspected pixels of all images, (P,) float32 on the host."""
        values: Float32Array = self.total[~self.total.isnan()].cpu().numpy()
        return values

    def _positions(self, axis: int) -> Tensor:
        """Return the position of the views' maps for each row or column of the input: (B, H) or (B, W) int64."""
        sides = self.total.shape[1 + axis], self.views.shape[2 + axis]
        spans = self.content.boxes[:, [1 - axis, 3 - axis]].tolist()
        return torch.from_numpy(np.stack([nearest_positions(start, stop, *sides) for start, stop in spans]))


def _highest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the highest values of each row, (B, count), the highest first, and where they are."""
    if values.device.type != "cpu" or count == 1:
        return values.topk(count)
    # NumPy takes a third of torch's time to find them.
    at = torch.from_numpy(np.argpartition(values.numpy(), -count)[:, -count:])
    found, order = values.gather(1, at).sort(descending=True)
    return found, at.gather(1, order)


def select_maps(parts: Iterable[AnomalyMaps], chosen: Flags) -> Iterator[Tensor]:
    """Yield the totals of chosen images, (n, H, W) of each part; `chosen` is (B,), of the images of all parts."""
    start = 0
    for part in parts:
        flags = chosen[start : start + len(part)]
        start += len(part)
        # Most parts are one image.
        numbers = torch.from_numpy(np.flatnonzero(flags))
        yield part.total if flags.all() else part.total[send(numbers, part.total.device)]


def cut_out(values: npt.NDArray[Number], box: Sequence[int]) -> npt.NDArray[Number]:
    """Copy the part of an (H, W) array that is in a box: it outlives a batch."""
    left, top, right, bottom = box
    return np.array(values[top:bottom, left:right])


def nearest_positions(start: int, stop: int, length: int, positions: int) -> Indices:
    """Return the position of a level nearest to each pixel of an axis of the input, of those that are no padding.

    The level has `positions` over the `length` pixels of the axis, of which the content has those from `start` to
    `stop`. A position's centre is in [start, stop), as in `content_mask`; where there is none, it is the one that holds
    the middle.

    >>> nearest_positions(5, 12, length=16, positions=4)
    array([1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    centres = (np.arange(positions) + 0.5) * length / positions
    inside = np.flatnonzero((start <= centres) & (centres < stop))
    if not len(inside):
        inside = np.array([(start + stop) * positions // (2 * length)])
    return np.clip(np.arange(length) * positions // length, inside[0], inside[-1])


def gaussian(maps: Tensor, sigma: float) -> Tensor:
    """Smooth maps, (B, H, W), by a Gaussian that is cut off at three standard deviations (pixels).

    Pixels at a border are repeated beyond it. As products with a band matrix, tile by tile: faster than a convolution.
    """
    radius = int(_TRUNCATE * sigma + 0.5)
    kernel = _band(radius, sigma, maps.device)
    across, down = kernel, kernel.T.expand(len(maps), -1, -1)
    padded = pad(maps, (radius,) * 4, mode="replicate")
    height, width = maps.shape[1:]
    tiles = [
        torch.bmm(down[:, : stop - start, : stop - start + 2 * radius], padded[:, start : stop + 2 * radius])
        for start, stop in _tiles(height)
    ]
    rows = torch.cat(tiles, dim=1)
    tiles = [
        rows[:, :, start : stop + 2 * radius] @ across[: stop - start + 2 * radius, : stop - start]
        for start, stop in _tiles(width)
    ]
    return torch.cat(tiles, dim=2)


def _tiles(length: int) -> list[tuple[int, int]]:
    return list(pairwise([*range(0, length, _TILE), length]))


@lru_cache(maxsize=8)
def _band(radius: int, sigma: float, device: torch.device) -> Tensor:
    """Make the matrix whose column j has the kernel from row j on: (tile + 2 radius, tile) float32."""
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    band = np.zeros((_TILE + 2 * radius, _TILE))
    for column in range(_TILE):
        band[column : column + 2 * radius + 1, column] = kernel / kernel.sum()
    return torch.from_numpy(band.astype(np.float32)).to(device)
