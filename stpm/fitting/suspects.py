"""The good images that may not be good: which lie far from the others, the warning, and the page `fit.html`."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from stpm.data.encode import encode_jpeg
from stpm.errors import join_first
from stpm.fitting.splits import Indices
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.method.calibration import threshold
from stpm.method.fusion import Float32Array
from stpm.method.memory_bank import DescriptorSpec, strided_shape
from stpm.method.suspects import lies_far, neighbour_distances, score_images
from stpm.pages import render

# Positions of an image that are compared, at most.
_MAX_POSITIONS = 64
_SHOWN, _NAMED = 24, 3
# Pixels: sides of a picture, radius of the circle in it.
_PICTURE, _RADIUS = 240, 24
# The rate of the thresholds that are compared; the default of --false-alarm-rate.
_RATE = 0.01


@dataclass(frozen=True)
class Suspects:
    """Good images by how far they lie from the others.

    Args:
        scores: (N,) of all good images; the median position of all images is at 1.
        peaks: (N, 2) float32, where an image is farthest out: fractions of its input's width and height.
        far_count: how many of them, the first, lie far out.
        calibrating: indices of the n images that calibrate the model.
        calibration_scores: (n,) their scores.
    """

    features: TeacherFeatures
    scores: Float32Array
    peaks: Float32Array
    far_count: int
    calibrating: Indices
    calibration_scores: Float32Array

    @property
    def order(self) -> Indices:
        """The indices of all images, those that lie farthest out first."""
        return np.argsort(-self.scores, kind="stable")

    def threshold_without(self, count: int) -> float:
        """Return the model's threshold without the calibration scores of the first `count` images; NaN without any."""
        kept = ~np.isin(self.calibrating, self.order[:count])
        return threshold(np.sort(self.calibration_scores[kept]), _RATE) if kept.any() else np.nan

    def warning(self) -> str:
        """Name the images that lie far out; "" if there are none."""
        far, names = self.far_count, self.features.images.names
        if not far:
            return ""
        named = join_first([f"{names[i]} ({self.scores[i]:.3g})" for i in self.order[:far]], _NAMED, ", ")
        before, after = self.threshold_without(0), self.threshold_without(far)
        change = "" if after == before else f"; without them the threshold would be about {after:.3g}, not {before:.3g}"
        return (
            f"look at good images that are unlike all others: {named}; the next has {self.scores[self.order[far]]:.3g}"
            f"{change}. If one has a defect, fit again without it (--exclude); fit.html of the model shows them"
        )

    def page(self, category: str) -> bytes:
        """Render fit.html."""
        images = self.features.images
        shown = [
            {
                "name": images.names[i],
                "score": self.scores[i],
                "picture": self._picture(i),
                "threshold": self.threshold_without(rank),
            }
            for rank, i in enumerate(self.order[:_SHOWN].tolist(), 1)
        ]
        after = self.order[_SHOWN : _SHOWN + 1].tolist()
        sizes = Counter((int(width), int(height)) for width, height in images.statistics[:, :2])
        return render(
            "fitting/fit.html",
            category=category,
            images=shown,
            next=self.scores[after[0]] if after else None,
            count=len(images),
            far=self.far_count,
            rate=_RATE,
            threshold=self.threshold_without(0),
            calibrating=len(self.calibrating),
            sizes=join_first([f"{width} × {height} ({number})" for (width, height), number in sizes.most_common()]),
            problems=images.find_problems(self.features.teacher.preprocessing),
        ).encode()

    def _picture(self, index: int) -> bytes:
        """Draw what the model sees of an image, with a circle where it is farthest out, as a JPEG."""
        pixels = self.features.images.pixels[index]
        left, top, right, bottom = self.features.images.content[index].tolist()
        image = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
        x, y = self.peaks[index] * pixels.shape[1::-1] - (left, top)
        scale = _PICTURE / max(image.size)
        image = image.resize([max(round(side * scale), 1) for side in image.size])
        box = [scale * x - _RADIUS, scale * y - _RADIUS, scale * x + _RADIUS, scale * y + _RADIUS]
        ImageDraw.Draw(image).ellipse(box, outline=(0, 255, 255), width=2)
        return encode_jpeg(image)


@torch.no_grad()
def find_suspects(
    features: TeacherFeatures, calibrating: Indices, calibration_scores: Float32Array, seed: int
) -> Suspects:
    """Compare all good images with each other, by the teacher's features in the coarsest level of its last view.

    On products whose defects were mixed into the good images, this level names more of them than finer ones do
    (bench/RESULTS-quality.md).
    """
    images = features.images
    level = features.teacher.views[-1].levels[-1]
    height, width = features.shapes[-1]
    stride = math.ceil(math.sqrt(height * width / _MAX_POSITIONS))
    spec = DescriptorSpec(-1, "features", stride, stride)
    rows, columns = shape = strided_shape((height, width), stride)
    described, valid = [], []
    for batch in features.batches(np.arange(len(images))):
        _, (maps,), (mask,) = features.of_student(batch, [level])
        described.append(spec.describe(maps, mask).flatten(1, 2).half())
        (mask,) = features.teacher.content_masks(images.content[batch], [shape])
        valid.append(torch.ones(described[-1].shape[:2], dtype=torch.bool) if mask is None else mask.flatten(1).cpu())
    distances = neighbour_distances(torch.cat(described), torch.cat(valid).to(described[0].device), seed).cpu()
    scores = score_images(distances)
    peaks = distances.argmax(dim=1).numpy()
    centres = np.stack([(peaks % columns + 0.5) / columns, (peaks // columns + 0.5) / rows], axis=1)
    far_count = int(lies_far(scores).sum())
    return Suspects(features, scores.numpy(), centres.astype(np.float32), far_count, calibrating, calibration_scores)
