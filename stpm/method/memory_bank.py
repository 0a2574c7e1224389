"""Memory banks of normal features, as pure tensor functions: the distance to the nearest vector of a coreset.

This is PatchCore (Roth et al., CVPR 2022, arXiv 2106.08265) with two differences: each pyramid level has its own banks,
and features are whitened by their covariance over normal images, which makes distances Mahalanobis distances (Rippel et
al., ICPR 2020, arXiv 2005.14140). Banks of the fine view ignore positions, so that a product may turn. Those of the
coarse view compare them too: a feature that is normal elsewhere in the image is less so here.

Convention: features are (B, C, H, W), descriptors (B, H, W, C), distance maps (B, H, W) float32, 0 or more. A mask
`valid` is (B, H, W) bool, true at valid positions, those not on padding; None: all are valid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, normalize

# `directions` are features scaled to length 1: brightness and contrast change only `features`.
Kind = Literal["features", "directions"]
KINDS: tuple[Kind, ...] = ("features", "directions")

# Dimensions of the projection in which a coreset is chosen.
_PROJECTION_DIMENSIONS = 32
# The ridge, as a fraction of the mean variance, limits the weight of directions in which normal features do not vary.
_RIDGE = 0.01
# Smallest ridge, as a fraction of the mean's mean square: above the rounding errors of features that are all the same.
_MIN_RIDGE = 1e-6
_EPS = 1e-12
# Pixels of the input from one descriptor to the next, at least.
_MIN_DESCRIPTOR_SPACING = 8
# A quarter of the input's longer side away is as far as a whitened descriptor usually is from the mean, √C.
_POSITION_WEIGHT = 4.0
# Queries per matrix product on a CPU: its result, some MiB, stays in a core's cache.
_QUERIES_PER_BLOCK = 1024
# Distances per matrix product on a GPU, where each costs a launch, and fills 256 MiB.
_GPU_DISTANCES = 2**26


@dataclass(frozen=True)
class DescriptorSpec:
    """How descriptors are made of the features of one pyramid level.

    Args:
        level_index: index of the level among all levels of the teacher's views.
        kind: `directions` scales each averaged vector to length 1.
        window: side of the square of positions that a descriptor averages; at a border, only valid ones are averaged.
        stride: positions from one descriptor to the next, in both directions; of the same parity as the window.
    """

    level_index: int
    kind: Kind
    window: int
    stride: int

    def describe(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute descriptors before whitening: for each square of `stride` positions, the average of its window.

        From (B, C, H, W) features of the level, of any float type, to (B, ⌈H/stride⌉, ⌈W/stride⌉, C) float32.
        """
        features = features.float()
        if valid is None:
            features = self._average(features)
        else:
            weight = valid[:, None].float()
            valid_fraction = self._average(weight).clamp_min(1 / self.window**2)
            features = self._average(features * weight) / valid_fraction
        if self.kind == "directions":
            features = normalize(features, dim=1)
        return features.permute(0, 2, 3, 1).contiguous()

    def _average(self, maps: Tensor) -> Tensor:
        if self.window == self.stride == 1:
            return maps
        padding = (self.window - self.stride) // 2
        return avg_pool2d(maps, self.window, self.stride, padding, ceil_mode=True, count_include_pad=False)


@dataclass(frozen=True)
class MemoryBank:
    """Whitened descriptors of normal images at one pyramid level.

    Args:
        mean: (C,) float32, mean of normal descriptors.
        whitening: (C, C) float32; (descriptor − mean) @ whitening has about unit covariance.
        vectors: (M, C) float32, whitened coreset, or (M, C + 2) with weighted positions; half precision represents its
            values exactly.
    """

    spec: DescriptorSpec
    mean: Tensor
    whitening: Tensor
    vectors: Tensor

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the bank's tensors by name."""
        return {"mean": self.mean, "whitening": self.whitening, "vectors": self.vectors}

    def to(self, device: torch.device) -> MemoryBank:
        """Move all tensors to a device."""
        return MemoryBank(self.spec, **{name: tensor.to(device) for name, tensor in self.tensors.items()})

    def distance_map(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute distances to the nearest vector: (B, C, H, W) to (B, ⌈H/stride⌉, ⌈W/stride⌉) float32."""
        described = self.spec.describe(features, valid)
        queries = (described.flatten(0, 2) - self.mean) @ self.whitening
        if self.vectors.shape[1] > len(self.mean):
            positions = grid_positions(described.shape[1:3], queries.device)
            queries = _add_positions(queries, positions.repeat(len(described), 1))
        return nearest_distance(queries, self.vectors).reshape(described.shape[:3])


def banks_to_tensors(banks: Sequence[MemoryBank]) -> dict[str, Tensor]:
    """Name each tensor <level index>.<kind>.<window>.<stride>.<name>. Half precision represents the vectors exactly."""
    tensors = {}
    for bank in banks:
        spec = bank.spec
        for name, tensor in bank.tensors.items():
            path = f"{spec.level_index}.{spec.kind}.{spec.window}.{spec.stride}.{name}"
            tensors[path] = tensor.half() if name == "vectors" else tensor
    return tensors


def banks_from_tensors(tensors: Mapping[str, Tensor]) -> tuple[MemoryBank, ...]:
    """Undo `banks_to_tensors`: return the banks by level and kind, in the order in which they were fitted."""
    by_spec: dict[DescriptorSpec, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        level_index, kind, window, stride, name = path.split(".")
        spec = DescriptorSpec(int(level_index), cast("Kind", kind), int(window), int(stride))
        by_spec.setdefault(spec, {})[name] = tensor.float()
    banks = (MemoryBank(spec, **named) for spec, named in by_spec.items())
    return tuple(sorted(banks, key=lambda bank: (bank.spec.level_index, KINDS.index(bank.spec.kind))))


def stride_of(shape: tuple[int, int], input_shape: tuple[int, int]) -> int:
    """Return the stride of a level's bank: there are 8 pixels or more from one descriptor to the next.

    From one position of a finer level to the next the window's average hardly changes, and the search would take four
    times as long.
    """
    return max(_MIN_DESCRIPTOR_SPACING // max(round(input_shape[0] / shape[0]), round(input_shape[1] / shape[1])), 1)


def strided_shape(shape: tuple[int, int], stride: int) -> tuple[int, int]:
    """Return how many descriptors a level has, down and across."""
    return math.ceil(shape[0] / stride), math.ceil(shape[1] / stride)


def window_size(shape: tuple[int, int], coarsest: tuple[int, int], stride: int) -> int:
    """Return the smallest window of the stride's parity that spans one position of the coarsest level.

    Equal parity centres the window on the square of positions that the descriptor stands for. The window also covers
    `stride - 1` positions beyond the square on each side: where `stride` does not divide the level's sides, upsampling
    shifts a descriptor by up to that much.
    """
    smallest = max(round(shape[0] / coarsest[0]), round(shape[1] / coarsest[1]), 3 * stride - 2)
    return smallest + (smallest - stride) % 2


def grid_positions(shape: Sequence[int], device: torch.device) -> Tensor:
    """Return where the H × W descriptors of an image are, row by row: (HW, 2) float32, y and x, 0 to 1.

    >>> grid_positions((1, 2), torch.device("cpu"))
    tensor([[0.2500, 0.2500],
            [0.2500, 0.7500]])
    """
    rows, columns = ((torch.arange(side, device=device) + 0.5) / max(shape) for side in shape)
    return torch.cartesian_prod(rows, columns)


def fit_bank(
    descriptors: Tensor,
    spec: DescriptorSpec,
    count: int,
    seed: int,
    start: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[MemoryBank, Tensor]:
    """Fit a bank to N normal descriptors, (N, C) float32: compute mean and whitening, and choose a coreset.

    Return also the coreset's indices; `start` is as for `greedy_coreset`. With `positions`, (N, 2) as `grid_positions`
    gives them, the bank compares them too.
    """
    mean, whitening = fit_whitening(descriptors)
    whitened = (descriptors - mean) @ whitening
    if positions is not None:
        whitened = _add_positions(whitened, positions)
    chosen = greedy_coreset(whitened, count, seed, start)
    return MemoryBank(spec, mean, whitening, whitened[chosen].half().float()), chosen


def fit_whitening(descriptors: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and whitening matrix of descriptors: (N, C) to (C,) and (C, C) float32.

    The matrix is U (Λ + r)^-½ for the covariance U Λ Uᵀ. The ridge r is one hundredth of the mean variance, and at
    least a millionth of the mean's mean square, which matters where hardly anything varies.
    """
    wide = descriptors.double()
    mean = wide.mean(dim=0)
    centred = wide - mean
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(wide))
    variances = variances.clamp_min(0.0)
    ridge = torch.maximum(_RIDGE * variances.mean(), _MIN_RIDGE * mean.square().mean() + _EPS)
    return mean.float(), (axes / (variances + ridge).sqrt()).float()


def greedy_coreset(vectors: Tensor, count: int, seed: int, start: Tensor | None = None) -> Tensor:
    """Choose a subset that is near every vector: greedy k-centre (Sener and Savarese, ICLR 2018).

    Start at the vector nearest to the mean, or with some that are chosen already, up to `count`; then repeatedly add
    the vector farthest from all chosen ones, by distance after a random projection. The same vectors, (N, D) float32,
    seed and start, (K,) int64 indices, give the same indices: (min(count, N),) int64, in the order of the choice.
    """
    if len(vectors) <= count:
        return torch.arange(len(vectors), device=vectors.device)
    points = vectors
    if vectors.shape[1] > _PROJECTION_DIMENSIONS:
        generator = torch.Generator().manual_seed(seed)
        projection = torch.randn(vectors.shape[1], _PROJECTION_DIMENSIONS, generator=generator) / math.sqrt(
            _PROJECTION_DIMENSIONS
        )
        points = vectors @ projection.to(vectors.device)
    squares = points.square().sum(dim=1)
    if start is None or not len(start):
        start = (points - points.mean(dim=0)).square().sum(dim=1).argmin()[None]
    chosen = torch.empty(count, dtype=torch.int64, device=vectors.device)
    chosen[: len(start)] = start
    nearest = nearest_distance(points, points[start]).square()
    # Rounding may leave a chosen vector slightly away from itself.
    nearest[start] = -torch.inf
    for k in range(len(start), count):
        # A tensor of one dimension: to index by one of none waits for a GPU.
        last = chosen[k : k + 1] = nearest.argmax()[None]
        farther = squares + squares[last] - 2 * (points @ points[last][0])
        torch.minimum(nearest, farther, out=nearest)
        nearest[last] = -torch.inf
    return chosen


def nearest_distance(queries: Tensor, vectors: Tensor) -> Tensor:
    """Compute the Euclidean distance of each query to its nearest vector: (P, D) and (M, D) to (P,), float32.

    The search is exact, by blocked matrix products: for a few thousand vectors an index is no faster.
    """
    squares = vectors.square().sum(dim=1)
    transposed = vectors.T
    size = _QUERIES_PER_BLOCK
    if queries.device.type != "cpu":
        size = max(_GPU_DISTANCES // len(vectors), size)
    nearest = [
        torch.addmm(squares, block, transposed, alpha=-2).amin(dim=1) + block.square().sum(dim=1)
        for block in torch.split(queries, size)
    ]
    return torch.cat(nearest).clamp_min(0.0).sqrt()


def _add_positions(whitened: Tensor, positions: Tensor) -> Tensor:
    """Append weighted positions to descriptors: (N, C) and (N, 2) to (N, C + 2)."""
    return torch.cat([whitened, positions * (_POSITION_WEIGHT * math.sqrt(whitened.shape[1]))], dim=1)
