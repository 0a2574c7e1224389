"""Defects drawn on good images at their own resolution, for what the test images of a data set do not have.

A part is a disc of a fifth of the image's shorter side, where the image has most structure. It is cut out, the hole is
filled smoothly from its border, and the part is blended back: at its place (`control`, of which nothing but the seam
could be seen), a tenth of the side away (`displaced`), turned by 45 to 180 degrees (`turned`), at the place of another
part (`exchanged`), or not at all (`removed`). `cracks` are one to three pixels wide. `drawn` are faint scratches and
patches from elsewhere.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter
from scipy.ndimage import gaussian_filter, gaussian_gradient_magnitude
from scipy.sparse import csr_matrix, identity
from scipy.sparse.linalg import splu

from stpm.data import decoding
from stpm.data.decoding import Pixels
from stpm.data.encode import encode_png
from stpm.metrics.pixel_metrics import Mask

_PER_IMAGE = 4
# Of the shorter side.
_RADIUS = 0.1
_DISPLACEMENT = 0.1
# Standard deviation of the seam's blur, pixels.
_SEAM = 1.5

Floats = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, Pixels], tuple[Pixels, Mask]]


def draw_defects(files: Sequence[bytes], kind: str) -> list[tuple[bytes, Mask | None]]:
    """Return good images, each followed by copies with a drawn defect of a kind, and the mask of what was drawn."""
    rng = np.random.default_rng(0)
    results: list[tuple[bytes, Mask | None]] = []
    for data in files:
        results.append((data, None))
        with Image.open(io.BytesIO(data), formats=decoding.FORMATS) as image:
            pixels = np.asarray(image.convert("RGB"))
        for _ in range(_PER_IMAGE):
            drawn, mask = KINDS[kind](rng, pixels)
            results.append((encode_png(Image.fromarray(drawn), compress_level=1), mask))
    return results


def _scratch_or_patch(rng: np.random.Generator, image: Pixels) -> tuple[Pixels, Mask]:
    """Draw a scratch, or a piece from elsewhere in the image, with random opacity."""
    height, width = image.shape[:2]
    size = min(height, width)
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    y, x = rng.uniform(0.3, 0.7, 2) * (height, width)
    if rng.random() < 0.5:
        angle, length = rng.uniform(0, np.pi), rng.uniform(0.05, 0.15) * size
        dx, dy = length * np.cos(angle), length * np.sin(angle)
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=255, width=max(round(rng.uniform(1, 4) * size / 256), 1))
        other = np.full_like(image, rng.integers(0, 256))
    else:
        rx, ry = rng.uniform(0.015, 0.06, 2) * size
        pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
        other = np.roll(image, tuple(rng.integers(size // 8, size // 2, 2)), axis=(0, 1))
    mask = np.asarray(canvas) > 0
    opacity = np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.7)))[..., None] / 255 * rng.uniform(0.3, 1.0)
    return np.round(image * (1 - opacity) + other * opacity).astype(np.uint8), mask


def _crack(rng: np.random.Generator, image: Pixels) -> tuple[Pixels, Mask]:
    """Draw a dark or bright crooked line of one to three pixels, a tenth to a third of the shorter side long."""
    height, width = image.shape[:2]
    size, steps = min(height, width), 12
    canvas = Image.new("L", (width, height))
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.35, steps))
    step = rng.uniform(0.1, 0.33) * size / steps
    start = _place(rng, image)
    points = start + np.cumsum(step * np.stack([np.sin(angles), np.cos(angles)], 1), axis=0)
    ImageDraw.Draw(canvas).line([(x, y) for y, x in points.tolist()], fill=255, width=int(rng.integers(1, 4)))
    mask = np.asarray(canvas) > 0
    darker = image[mask].mean() > 127 or rng.random() < 0.5
    opacity = mask[..., None] * rng.uniform(0.4, 0.9)
    return np.round(image * (1 - opacity) + (0 if darker else 255) * opacity).astype(np.uint8), mask


def _control(rng: np.random.Generator, image: Pixels) -> tuple[Pixels, Mask]:
    place = _place(rng, image)
    return _move(image, [(place, place, 0.0)])


def _displaced(rng: np.random.Generator, image: Pixels) -> tuple[Pixels, Mask]:
    place, angle = _place(rng, image), rng.uniform(0, 2 * np.pi)
    offset = _DISPLACEMENT * min(image.shape[:2]) * np.array([np.sin(angle), np.cos(angle)])
    return _move(image, [(place, place + offset, 0.0)])


def _turned(rng: np.random.Generator, image: Pixels) -> tuple[Pixels, Mask]:
    place = _place(rng, image)
    return _move(image, [(place, place, rng.uniform(45, 180))])


def _exchanged(rng: np.random.Generator, image: Pixels) -> tuple[Pixels, Mask]:
    one, other = _place(rng, image), _place(rng, image)
    least = 2 * _RADIUS * min(image.shape[:2])
    for _ in range(100):
        if np.hypot(*(one - other)) >= least:
            break
        one, other = _place(rng, image), _place(rng, image)
    return _move(image, [(one, other, 0.0), (other, one, 0.0)])


def _removed(rng: np.random.Generator, image: Pixels) -> tuple[Pixels, Mask]:
    place = _place(rng, image)
    hole = _disc(image, place)
    return np.round(_fill(image.astype(np.float64), hole)).astype(np.uint8), hole


KINDS: dict[str, Draw] = {
    "drawn": _scratch_or_patch,
    "cracks": _crack,
    "control": _control,
    "displaced": _displaced,
    "turned": _turned,
    "exchanged": _exchanged,
    "removed": _removed,
}


def _place(rng: np.random.Generator, image: Pixels) -> Floats:
    """Choose where a part lies, as row and column: of 20 places that of most structure."""
    margin = (_RADIUS + _DISPLACEMENT) * min(image.shape[:2])
    # At a quarter of the size, where a blur takes a hundredth of the time.
    grey = image[::4, ::4].mean(axis=2)
    structure = gaussian_filter(gaussian_gradient_magnitude(grey, 1), _RADIUS * min(grey.shape) / 2)
    low, high = np.full(2, margin), np.array(image.shape[:2]) - margin - 1
    best: Floats = max(rng.uniform(low, high, (20, 2)), key=lambda place: structure[tuple(place.astype(int) // 4)])
    return best


def _disc(image: Pixels, centre: Floats) -> Mask:
    rows, columns = np.ogrid[: image.shape[0], : image.shape[1]]
    inside: Mask = np.hypot(rows - centre[0], columns - centre[1]) < _RADIUS * min(image.shape[:2])
    return inside


def _move(image: Pixels, moves: Sequence[tuple[Floats, Floats, float]]) -> tuple[Pixels, Mask]:
    """Cut parts out, fill the holes, and blend each in at its new centre, turned by so many degrees."""
    holes = np.any([_disc(image, source) for source, _, _ in moves], axis=0)
    result, changed = _fill(image.astype(np.float64), holes), holes.copy()
    for source, target, degrees in moves:
        dy, dx = np.round(target - source).astype(int)
        whole = Image.fromarray(image)
        if degrees:
            whole = whole.rotate(degrees, Image.Resampling.BICUBIC, center=(float(source[1]), float(source[0])))
        part = np.roll(np.asarray(whole), (dy, dx), axis=(0, 1))
        disc = np.roll(_disc(image, source), (dy, dx), axis=(0, 1))
        blurred = Image.fromarray(disc.astype(np.uint8) * 255).filter(ImageFilter.GaussianBlur(_SEAM))
        opacity = np.minimum(np.asarray(blurred) / 255 * 1.5, 1)[..., None]
        result = result * (1 - opacity) + part * opacity
        changed |= disc
    return np.round(result).astype(np.uint8), changed


def _fill(image: Floats, hole: Mask) -> Floats:
    """Continue an image into a hole: each pixel there is the mean of its four neighbours (Laplace's equation)."""
    count = int(hole.sum())
    number = np.full(hole.shape, -1)
    number[hole] = np.arange(count)
    rows, columns = np.nonzero(hole)
    known = np.zeros((count, image.shape[2]))
    pairs: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0)):
        y = np.clip(rows + dy, 0, hole.shape[0] - 1)
        x = np.clip(columns + dx, 0, hole.shape[1] - 1)
        inside = hole[y, x]
        known[~inside] += image[y, x][~inside]
        pairs.append((np.flatnonzero(inside), number[y, x][inside]))
    at, of = (np.concatenate(each) for each in zip(*pairs, strict=True))
    neighbours = csr_matrix((np.ones(len(at)), (at, of)), shape=(count, count))
    solver = splu(
        (4 * identity(count) - neighbours).tocsc(), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True}
    )
    filled: Floats = image.copy()
    filled[hole] = np.clip(solver.solve(known), 0, 255)
    return filled
