"""A memory of normal features, as pure tensor functions: the distance to the nearest of a coreset.

After PatchCore (Roth et al., CVPR 2022, arXiv 2106.08265), with two differences: each pyramid level has banks of its
own, and features are whitened by their covariance over normal images, so that a distance is a Mahalanobis distance
(Rippel et al., ICPR 2020, arXiv 2005.14140). Where a feature lies in the image plays no part: a product may turn.

Convention: features are (B, C, H, W), descriptors (B, H, W, C), distance maps (B, H, W) float32, 0 or more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

# `features` are compared as they are, `directions` after each was scaled to length 1: brightness and contrast count
# in the former alone.
Kind = Literal["features", "directions"]
KINDS: tuple[Kind, ...] = ("features", "directions")

_PROJECTED = 32
# Of the mean variance: directions in which normal features do not vary get no more weight than this allows.
_RIDGE = 0.01
# Of the mean's mean square: above what rounding alone makes of features that are all the same.
_LEAST_RIDGE = 1e-6
_EPS = 1e-12
# Queries per matrix product: its result, some MiB, stays in a core's cache.
_QUERIES = 1024


@dataclass(frozen=True)
class MemoryBank:
    """Whitened descriptors of normal images at one pyramid level.

    Args:
        level: position of the level among those of the teacher, 0 the finest.
        kind: what is compared.
        window: side of the square of positions that a descriptor averages, odd.
        mean: (C,) float32, of normal descriptors.
        whitening: (C, C) float32; descriptors minus mean, times this, have about unit covariance.
        vectors: (M, C) float32, whitened, of values that half precision holds.
    """

    level: int
    kind: Kind
    window: int
    mean: Tensor
    whitening: Tensor
    vectors: Tensor

    def to(self, device: torch.device) -> MemoryBank:
        tensors = (tensor.to(device) for tensor in (self.mean, self.whitening, self.vectors))
        return MemoryBank(self.level, self.kind, self.window, *tensors)

    def distance_map(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Distance of each position to the nearest vector: (B, C, H, W) to (B, H, W) float32.

        Args:
            features: of the bank's level.
            valid: (B, H, W) bool, the positions that lie on the image; None: all.
        """
        described = describe(features, self.kind, self.window, valid)
        queries = (described.flatten(0, 2) - self.mean) @ self.whitening
        return nearest_distance(queries, self.vectors).reshape(described.shape[:3])


def window_of(shape: tuple[int, int], coarsest: tuple[int, int]) -> int:
    """The odd number of positions of a level that is at least as wide as one position of the coarsest level."""
    ratio = max(round(shape[0] / coarsest[0]), round(shape[1] / coarsest[1]), 1)
    return ratio + 1 - ratio % 2


def describe(features: Tensor, kind: Kind, window: int, valid: Tensor | None = None) -> Tensor:
    """Descriptors of all positions, before whitening: averages over a window.

    Args:
        features: (B, C, H, W), any float type.
        kind: `directions` scales each feature vector to length 1 after averaging.
        window: side of the window, odd; at a border, the part that lies on the image counts.
        valid: (B, H, W) bool, the positions that lie on the image; None: all.

    Returns:
        (B, H, W, C) float32.
    """
    features = features.float()
    if window > 1:
        if valid is None:
            features = _average(features, window)
        else:
            weight = valid[:, None].float()
            features = _average(features * weight, window) / _average(weight, window).clamp_min(1 / window**2)
    if kind == "directions":
        features = normalize(features, dim=1)
    return features.permute(0, 2, 3, 1).contiguous()


def fit_bank(descriptors: Tensor, level: int, kind: Kind, window: int, size: int, seed: int) -> MemoryBank:
    """A bank of normal descriptors: their mean and whitening, and a coreset of them.

    Args:
        descriptors: (N, C) float32, not whitened, N at least 1.
        level: that they are of.
        kind: that they are of.
        window: that they average.
        size: vectors to keep; all, if there are fewer.
        seed: of the coreset's projection.
    """
    mean, whitening = fit_whitening(descriptors)
    whitened = (descriptors - mean) @ whitening
    chosen = greedy_coreset(whitened, size, seed)
    return MemoryBank(level, kind, window, mean, whitening, whitened[chosen].half().float())


def fit_whitening(descriptors: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and whitening matrix of descriptors: (N, C) to (C,) and (C, C) float32.

    The matrix is U (Λ + r)^-½ of the covariance U Λ Uᵀ, with r one hundredth of the mean variance, and where next to
    nothing varies at least a millionth of the mean's mean square.
    """
    wide = descriptors.double()
    mean = wide.mean(dim=0)
    centred = wide - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(wide))
    variances = variances.clamp_min(0.0)
    ridge = torch.maximum(_RIDGE * variances.mean(), _LEAST_RIDGE * mean.square().mean() + _EPS)
    return mean.float(), (axes / (variances + ridge).sqrt()).float()


def greedy_coreset(vectors: Tensor, size: int, seed: int) -> Tensor:
    """Indices of a subset from which no vector is far: greedy k-centre (Sener and Savarese, ICLR 2018).

    Starts at the vector nearest to the mean and adds the one that is farthest from all those chosen, with distances
    taken after a random projection. The same vectors and seed give the same indices.

    Args:
        vectors: (N, D) float32.
        size: indices to return; all N, if there are no more.
        seed: of the projection.

    Returns:
        (min(size, N),) int64, in the order in which they were chosen.
    """
    if len(vectors) <= size:
        return torch.arange(len(vectors), device=vectors.device)
    points = vectors
    if vectors.shape[1] > _PROJECTED:
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(vectors.shape[1], _PROJECTED, generator=generator) / math.sqrt(_PROJECTED)
        points = vectors @ projection.to(vectors.device)
    squares = points.square().sum(dim=1)
    chosen = torch.empty(size, dtype=torch.int64, device=vectors.device)
    chosen[0] = (points - points.mean(dim=0)).square().sum(dim=1).argmin()
    nearest = torch.full_like(squares, torch.inf)
    for k in range(1, size):
        last = chosen[k - 1]
        torch.minimum(nearest, squares + squares[last] - 2 * (points @ points[last]), out=nearest)
        # Rounding may leave a chosen vector slightly away from itself.
        nearest[last] = -torch.inf
        chosen[k] = nearest.argmax()
    return chosen


def nearest_distance(queries: Tensor, vectors: Tensor) -> Tensor:
    """Euclidean distance of each query to its nearest vector: (P, D) and (M, D) to (P,), float32.

    Exact, by blocked matrix products: some thousand vectors are too few for an index to pay.
    """
    squares = vectors.square().sum(dim=1)
    transposed = vectors.T
    nearest = [
        torch.addmm(squares, block, transposed, alpha=-2).amin(dim=1) + block.square().sum(dim=1)
        for block in torch.split(queries, _QUERIES)
    ]
    return torch.cat(nearest).clamp_min(0.0).sqrt()


def _average(maps: Tensor, window: int) -> Tensor:
    return avg_pool2d(maps, window, stride=1, padding=window // 2, count_include_pad=False)
