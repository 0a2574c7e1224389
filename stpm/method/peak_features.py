"""What an anomaly looks like, as a short vector: two whose vectors are near each other look alike.

It is where the features at the anomaly map's peak lie from normal ones: the whitened descriptors there of the memory
banks of features. Whitening makes unlike anomalies about orthogonal, for any product, so that one distance fits all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

from stpm.method.anomaly_maps import Indices, nearest_positions
from stpm.method.memory_bank import DescriptorSpec, MemoryBank

DIMENSIONS = 64


def peak_features(
    banks: Sequence[MemoryBank],
    features: Sequence[Tensor],
    peak: tuple[int, int],
    content: Sequence[int],
    shape: tuple[int, int],
) -> Tensor | None:
    """Describe the peak of one image's anomaly map.

    Each bank's descriptor is scaled to length 1, and all of them are projected to 64 dimensions, by the same random
    matrix for every model with as many channels (Johnson and Lindenstrauss, 1984: angles stay about the same).

    Args:
        banks: a model's memory.
        features: the teacher's, (Cₗ, Hₗ, Wₗ) of each level.
        peak: column and row in the input, in the content box.
        content: the image's content box.
        shape: height and width of the input, pixels.

    Returns:
        (64,) float32 of length 1 in values of half precision, all 0 if the peak is just as normal ones in the memory;
        None if the model has no memory of features.
    """
    described = [
        (_descriptor(bank.spec, features[bank.spec.level_index], peak, content, shape) - bank.mean) @ bank.whitening
        for bank in banks
        if bank.spec.kind == "features"
    ]
    if not described:
        return None
    joined = torch.cat([normalize(each, dim=0) for each in described])
    projected = joined @ _projection(len(joined), joined.device)
    return normalize(projected, dim=0).half().float()


def _descriptor(
    spec: DescriptorSpec, level: Tensor, peak: tuple[int, int], content: Sequence[int], shape: tuple[int, int]
) -> Tensor:
    """Compute the one descriptor of `DescriptorSpec.describe` that stands for the peak: (C,) float32."""
    left, top, right, bottom = content
    rows = nearest_positions(top, bottom, shape[0], level.shape[1])
    columns = nearest_positions(left, right, shape[1], level.shape[2])
    x, y = peak
    window = _window(spec, rows, y), _window(spec, columns, x)
    return level[:, window[0], window[1]].float().mean(dim=(1, 2))


def _window(spec: DescriptorSpec, positions: Indices, pixel: int) -> slice:
    """Return the valid positions of one axis that are averaged, given the nearest one to each pixel of the content."""
    start = positions[pixel] // spec.stride * spec.stride - (spec.window - spec.stride) // 2
    return slice(max(start, positions[0]), min(start + spec.window, positions[-1] + 1))


@cache
def _projection(channels: int, device: torch.device) -> Tensor:
    return torch.randn(channels, DIMENSIONS, generator=torch.Generator().manual_seed(0)).to(device)
