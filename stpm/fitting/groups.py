"""Groups of images that are held out together: pictures of one part, lot or video, and near-duplicates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.nn.functional import adaptive_avg_pool2d

from stpm.data.decoding import Pixels
from stpm.errors import DataError, join_first
from stpm.fitting.splits import Indices, split_batches
from stpm.method.recipe import Recipe

_THUMBNAIL = 32
_BATCH = 32
# Two images are near-duplicates if they differ by less than this fraction of what two images of the category differ by,
# in the median, and by less than one grey level, root mean square: a category may have two colours.
# Of six products, two different images differ by a tenth and two levels or more, two files of one by half a level.
_NEAR, _NEAR_LEVELS = 0.05, 1.0


def group_images(names: Sequence[str], pixels: Pixels, recipe: Recipe) -> Indices:
    """Return the number of each image's group, (N,): its name's group, if the recipe has some, and near-duplicates.

    Args:
        names: path or URI of each image, or "".
        pixels: (N, H, W, 3) uint8.

    Raises:
        DataError: if the recipe takes groups from names, and some names have none, or all images are of one group.
    """
    edges = near_duplicates(pixels)
    if recipe.group_from:
        groups = [recipe.groups.find(name) for name in names]
        if missing := [
            name or "an image without a name" for name, group in zip(names, groups, strict=True) if not group
        ]:
            raise DataError(f"--group-from {recipe.group_from!r} finds no group in {join_first(missing)}")
        first = {group: i for i, group in reversed([*enumerate(groups)])}
        edges = np.vstack([edges, [(i, first[group]) for i, group in enumerate(groups)]])
    size = len(names)
    count, found = connected_components(coo_array((np.ones(len(edges)), edges.T), (size, size)), directed=False)
    if count > 1:
        return np.asarray(found, np.int64)
    if recipe.group_from and size > 1:
        raise DataError(f"--group-from {recipe.group_from!r} puts all images into one group; they need two or more")
    return np.arange(size)


def near_duplicates(pixels: Pixels) -> npt.NDArray[np.int64]:
    """Find pairs of images that hardly differ, by thumbnails: (N, H, W, 3) uint8 to (K, 2) indices."""
    everything = np.arange(len(pixels))
    batches = split_batches(everything, _BATCH)
    thumbnails = torch.cat([_thumbnails(pixels[batch]) for batch in batches])
    # Far from 0, rounding errors would hide copies where images hardly differ.
    thumbnails -= thumbnails.mean(dim=0)
    # The median of a sample: of 10,000 images there are 50 million pairs.
    typical = torch.pdist(thumbnails[np.linspace(0, len(pixels) - 1, min(len(pixels), 1000)).astype(int)]).median()
    limit = min(_NEAR * float(typical), _NEAR_LEVELS * _THUMBNAIL)
    near = [torch.cdist(thumbnails[batch], thumbnails) < limit for batch in batches]
    return torch.nonzero(torch.cat(near)).numpy()


def _thumbnails(pixels: Pixels) -> torch.Tensor:
    grey = torch.from_numpy(pixels).float().mean(dim=-1)
    return adaptive_avg_pool2d(grey[:, None], _THUMBNAIL).flatten(1)
