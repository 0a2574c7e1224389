"""Make the demo data set: crops of textures, with drawn defects and their masks, in the MVTec AD layout.

The textures (brick, grass, gravel) are in scikit-image, under CC0. Test crops come from a part of each texture that no
training crop touches. Training crops come from three lots, bands of the texture, and only crops of one lot overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from stpm import storage
from stpm.data.decoding import open_grey
from stpm.data.encode import encode_png
from stpm.errors import ConfigError

Grey = npt.NDArray[np.uint8]
Draw = Callable[[np.random.Generator, Grey, Grey], tuple[Grey, Grey]]

# Each texture, and the texture of its foreign bodies.
TEXTURES = {"brick": "gravel", "grass": "brick", "gravel": "brick"}
TRAIN_IMAGES = 160
GOOD_IMAGES = 20
IMAGES_PER_DEFECT = 5
# Side of a crop, pixels.
CROP = 128
LOTS = 3


def make(root: str) -> None:
    """Write the demo set under a folder, unless the folder has it. Raise ConfigError if scikit-image is missing."""
    marker = storage.join(root, ".demo-v2")
    if storage.exists(marker):
        return
    for number, (name, other) in enumerate(TEXTURES.items()):
        _make_category(storage.join(root, name), _texture(name), _texture(other), np.random.default_rng(number))
    storage.publish(marker, b"")


def _texture(name: str) -> Grey:
    try:
        import skimage
    except ImportError as error:
        raise ConfigError("the demo data set needs scikit-image; pip install 'stpm[demo]', or give --data") from error
    return np.asarray(open_grey((Path(skimage.__file__).parent / "data" / f"{name}.png").read_bytes()))


def _make_category(folder: str, texture: Grey, other: Grey, rng: np.random.Generator) -> None:
    def write(name: str, pixels: Grey) -> None:
        storage.publish(storage.join(folder, name), encode_png(Image.fromarray(pixels)))

    edge = texture.shape[1] - CROP - CROP // 4
    train, test = texture[:, :edge], texture[:, edge:]
    lots = np.array_split(train, LOTS)
    for i in range(TRAIN_IMAGES):
        write(f"train/good/lot-{i % LOTS}_{i:03}.png", _crop(rng, lots[i % LOTS]))
    for i in range(GOOD_IMAGES):
        write(f"test/good/{i:03}.png", _crop(rng, test))
    for kind, draw in _DEFECTS.items():
        for i in range(IMAGES_PER_DEFECT):
            image, mask = draw(rng, _crop(rng, test), _crop(rng, other))
            write(f"test/{kind}/{i:03}.png", image)
            write(f"ground_truth/{kind}/{i:03}_mask.png", mask)


def _crop(rng: np.random.Generator, texture: Grey) -> Grey:
    y, x = (int(rng.integers(0, n - CROP + 1)) for n in texture.shape)
    crop = texture[y : y + CROP, x : x + CROP].astype(np.float32)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    brightness = rng.uniform(0.95, 1.05)
    return np.asarray(np.clip(crop * brightness, 0, 255), np.uint8)


def _foreign(rng: np.random.Generator, image: Grey, other: Grey) -> tuple[Grey, Grey]:
    """Draw a piece of another texture."""
    mask = _blob(rng, 0.12, 0.18)
    return _blend(image, other, mask, softness=0.6), mask


def _stain(rng: np.random.Generator, image: Grey, _: Grey) -> tuple[Grey, Grey]:
    """Draw a soft dark spot through which the texture still shows."""
    mask = _blob(rng, 0.10, 0.16)
    return _blend(image, (image * 0.25).astype(np.uint8), mask, softness=2.0), mask


def _hole(rng: np.random.Generator, image: Grey, _: Grey) -> tuple[Grey, Grey]:
    """Draw a black hole with a bright rim."""
    mask = _blob(rng, 0.10, 0.15)
    inner = np.asarray(Image.fromarray(mask).filter(ImageFilter.MinFilter(5)))
    rim = _blend(image, np.full_like(image, 235), mask, softness=0.6)
    return _blend(rim, np.full_like(image, 5), inner, softness=0.6), mask


def _smear(rng: np.random.Generator, image: Grey, _: Grey) -> tuple[Grey, Grey]:
    """Blur the texture within a region, which keeps its brightness."""
    mask = _blob(rng, 0.14, 0.20)
    smooth = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(6)))
    return _blend(image, smooth, mask, softness=1.5), mask


_DEFECTS: dict[str, Draw] = {"foreign": _foreign, "hole": _hole, "smear": _smear, "stain": _stain}


def _blob(rng: np.random.Generator, smallest: float, largest: float) -> Grey:
    """Draw an uneven round region as a mask, with a mean radius between these fractions of the crop."""
    radius = rng.uniform(smallest, largest) * CROP
    centre = rng.uniform(0.25, 0.75, 2) * CROP
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    phases = rng.uniform(0, 2 * np.pi, 2)
    radii = radius * (1 + 0.2 * np.sin(2 * angles + phases[0]) + 0.1 * np.sin(5 * angles + phases[1]))
    points = [(centre[0] + r * np.cos(a), centre[1] + r * np.sin(a)) for a, r in zip(angles, radii, strict=True)]
    canvas = Image.new("L", (CROP, CROP))
    ImageDraw.Draw(canvas).polygon(points, fill=255)
    return np.asarray(canvas)


def _blend(image: Grey, other: Grey, mask: Grey, softness: float) -> Grey:
    """Replace the image by another where the mask is, with a border blurred by `softness` pixels."""
    weight = np.asarray(Image.fromarray(mask).filter(ImageFilter.GaussianBlur(softness))) / 255.0
    return np.round(image * (1 - weight) + other * weight).astype(np.uint8)
