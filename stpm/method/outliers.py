"""How far each good image lies from the other ones, to find defects among them, as pure tensor functions.

Each position of an image is compared with whole other images: its distance to one is that to the nearest of its
positions, and its distance to all is that to the k-th nearest image. So k images with a like defect do not hide each
other, as they do in a memory that holds them; and a part may lie anywhere. Channels are standardised, and
not whitened as in the banks: a covariance that saw a defect makes its direction a usual one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The k-th nearest image counts.
_NEIGHBOUR = 3
# Positions to compare with, at most: with more, thousands of images would take minutes. Queries per matrix product.
_MAX_REFERENCES, _QUERIES = 8_192, 512
# The fraction of an image's positions, the farthest, whose mean distance is its score.
_TOP = 0.25
# Where all images are alike, a channel's deviation, and the median distance, are this.
_MIN_DISTANCE = 1e-6


def neighbour_distances(descriptors: Tensor, valid: Tensor, seed: int) -> Tensor:
    """Compute how far each position of N images lies from the other images, as a multiple of the median.

    Of many images each is compared with some, the same for all, which the seed chooses.

    Args:
        descriptors: (N, P, C) float32, N at least 2.
        valid: (N, P) bool, true at positions that are not on padding, of each image at least one.

    Returns:
        (N, P) float32, 0 or more; 0 at positions that are not valid. The median of the others is 1, unless it was 0.
    """
    count, positions, _ = descriptors.shape
    valid = valid.to(descriptors.device)
    most = max(_MAX_REFERENCES // positions, _NEIGHBOUR + 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    compared = order[:most].sort().values.to(descriptors.device)
    normal = descriptors[compared][valid[compared]]
    scaled = (descriptors - normal.mean(dim=0)) / normal.std(dim=0, correction=0).clamp_min(_MIN_DISTANCE)
    references = scaled[compared].flatten(0, 1)
    # A reference on padding is infinitely far.
    squares = references.square().sum(dim=1).where(valid[compared].flatten(), torch.inf)
    found = []
    for images in torch.split(torch.arange(count, device=descriptors.device), max(_QUERIES // positions, 1)):
        queries = scaled[images].flatten(0, 1)
        to_all = torch.addmm(squares, queries, references.T, alpha=-2) + queries.square().sum(dim=1, keepdim=True)
        to_images = to_all.reshape(len(images), positions, len(compared), positions).amin(dim=3)
        to_others = to_images.masked_fill((images[:, None] == compared)[:, None], torch.inf)
        found.append(to_others.kthvalue(min(_NEIGHBOUR, len(compared) - 1), dim=2).values.clamp_min(0).sqrt())
    distances = torch.cat(found).where(valid, 0)
    return distances / distances[valid].median().clamp_min(_MIN_DISTANCE)


def score_images(distances: Tensor) -> Tensor:
    """Return the score of each image, the mean of its largest distances: (N, P) to (N,)."""
    return distances.topk(max(round(_TOP * distances.shape[1]), 1), dim=1).values.mean(dim=1)
