"""The good images that may not be good: which are unlike the others, a warning, and the page `fit.html`."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from stpm.data.encode import encode_jpeg
from stpm.errors import join_first
from stpm.fitting.splits import Indices
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.method.anomaly_maps import Float32Array
from stpm.method.calibration import MIN_IMAGES, count_far, spreads_above, threshold
from stpm.method.memory_bank import DescriptorSpec, strided_shape
from stpm.method.outliers import neighbour_distances, score_images
from stpm.pages import render

PAGE = "fit.html"
# Positions of an image that are compared, at most.
_MAX_POSITIONS = 64
# Images on the page, and in the warning.
_SHOWN, _NAMED = 24, 3
# Pixels: longer side of a picture, radius of the circle in it.
_PICTURE, _RADIUS = 240, 24
# The rate of the thresholds that are compared; the default of --false-alarm-rate.
_RATE = 0.01


def find_outliers(
    features: TeacherFeatures, calibrating: Indices, calibration_scores: Float32Array, seed: int
) -> tuple[str, bytes]:
    """Find the good images that are unlike all others: by their own scores, or by their distances to other images.

    The score of an image that the model has not seen names more defects, but two like ones may hide each other
    (bench/RESULTS-quality.md).

    Args:
        calibrating: indices of the n images that calibrate the model.
        calibration_scores: (n,) their scores.

    Returns:
        A warning that names them, "" if there are none, and the page.
    """
    images, distances = features.images, _compare(features, seed)
    distance = score_images(distances.flatten(1)).numpy()
    spreads, scores = spreads_above(distance), dict(zip(calibrating.tolist(), calibration_scores.tolist(), strict=True))
    if len(calibrating) >= MIN_IMAGES:
        spreads[calibrating] = np.maximum(spreads[calibrating], spreads_above(calibration_scores))
    order, far = np.argsort(-spreads, kind="stable").tolist(), count_far(spreads)

    def without(count: int) -> float | None:
        kept = ~np.isin(calibrating, order[:count])
        return threshold(np.sort(calibration_scores[kept]), _RATE) if kept.any() else None

    shown = [
        {
            "name": images.names[i],
            "spreads": spreads[i],
            "distance": distance[i],
            "score": scores.get(i),
            "picture": _draw(features, i, distances[i]),
            "without": without(n),
        }
        for n, i in enumerate(order[:_SHOWN], 1)
    ]
    sizes = Counter(f"{width:.0f} × {height:.0f}" for width, height in images.statistics[:, :2].tolist())
    page = render(
        "fitting/fit.html",
        images=shown,
        rest=spreads[order[_SHOWN:]].tolist(),
        far=far,
        rate=_RATE,
        calibrating=len(calibrating),
        threshold=without(0),
        sizes=join_first([f"{size} ({count})" for size, count in sizes.most_common()], separator=", "),
        problems=images.find_problems(),
    ).encode()
    if not far:
        return "", page
    named = join_first([f"{images.names[i]} ({spreads[i]:.3g})" for i in order[:far]], _NAMED, ", ")
    before, after = without(0), without(far)
    change = (
        "" if after in (None, before) else f"; without them the threshold would be about {after:.3g}, not {before:.3g}"
    )
    return (
        f"look at good images that are unlike all others: {named}, in spreads above the median; the next has "
        f"{spreads[order[far]]:.3g}{change}. If one has a defect, fit again without it (--exclude); the model's {PAGE} "
        "shows them"
    ), page


@torch.no_grad()
def _compare(features: TeacherFeatures, seed: int) -> Tensor:
    """Compute (N, rows, columns) distances of positions, by the coarsest level of the teacher's last view.

    Of defects that were mixed into good images, it names more than the fine view does (bench/RESULTS-quality.md).
    """
    stride = math.ceil(math.sqrt(math.prod(features.shapes[-1]) / _MAX_POSITIONS))
    shape, spec = strided_shape(features.shapes[-1], stride), DescriptorSpec(-1, "features", stride, stride)
    described, valid = [], []
    for batch in features.batches(np.arange(len(features.images))):
        _, (level,), (mask,) = features.of_student(batch, features.teacher.views[-1].levels[-1:])
        described.append(spec.describe(level, mask))
        (mask,) = features.teacher.content_masks(features.images.content[batch], [shape])
        valid.append(torch.ones(described[-1].shape[:3], dtype=torch.bool) if mask is None else mask.cpu())
    found = neighbour_distances(torch.cat(described).flatten(1, 2), torch.cat(valid).flatten(1), seed)
    return found.reshape(-1, *shape).cpu()


def _draw(features: TeacherFeatures, index: int, distances: Tensor) -> bytes:
    """Draw what the model sees of an image, with a circle where it is farthest out, as a JPEG."""
    pixels, (left, top, right, bottom) = features.images.pixels[index], features.images.content.boxes[index].tolist()
    image = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
    scale = _PICTURE / max(image.size)
    row, column = divmod(int(distances.argmax()), distances.shape[1])
    x = scale * ((column + 0.5) * pixels.shape[1] / distances.shape[1] - left)
    y = scale * ((row + 0.5) * pixels.shape[0] / distances.shape[0] - top)
    image = image.resize([max(round(side * scale), 1) for side in image.size])
    ImageDraw.Draw(image).ellipse((x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS), outline=(0, 255, 255), width=2)
    return encode_jpeg(image)
