import dataclasses
import resource
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from stpm import storage
from stpm.data import decoding
from stpm.data.image_statistics import COMPARED
from stpm.errors import DataError, ImageError
from stpm.fitting.training_images import TrainingImages, load_images, preprocessing_for
from stpm.method.recipe import Recipe
from stpm.options import Size
from tests.conftest import make_preprocessing, record_calls
from tests.datasets import make_category
from tests.fitting.helpers import unpadded


def make_images(root: Path, count: int = 9, **options: Any) -> list[str]:
    make_category(str(root), "nut", train=count, **options)
    return [str(path) for path in sorted((root / "nut" / "train" / "good").iterdir())]


def test_full_disk_is_reported(tmp_path: Path, tiny: Recipe) -> None:
    uris = make_images(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(DataError, match=r"no room for .* GiB of decoded images in .*--worker-ram-gib"):
            load_images(uris, preprocessing_for(tiny, uris), budget=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ImageError("damaged", "cut"), "repair or remove them"),
        (ImageError("out_of_memory", "no memory"), "give fewer --workers, or a machine with more memory"),
        (OSError("503"), "run the same command again when storage can be read"),
    ],
)
def test_unreadable_files_are_named_with_advice_that_fits_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    uris = make_images(tmp_path)
    decoded = decoding.decode(Path(uris[0]).read_bytes(), make_preprocessing(64))
    monkeypatch.setattr(decoding, "decode", Mock(side_effect=[error] * 7 + [decoded] * 2))
    with pytest.raises(DataError, match=rf"7 of 9 training images cannot be read: .*00\d.png.*; and 2 more; {advice}$"):
        load_images(uris, make_preprocessing(64), 2**30)


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris, decode = make_images(tmp_path), decoding.decode
    at_once, most = 0, 0

    def counted(*args: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.02)
        at_once -= 1
        return decode(*args)

    monkeypatch.setattr(decoding, "decode", counted)
    load_images(uris, make_preprocessing(64), 2**30)
    assert most > 1
    monkeypatch.setattr(decoding, "read_size", lambda data: (10_000, 5_000))
    most = 0
    load_images(uris, make_preprocessing(64), 2**30)
    assert most == 1


def test_normalisation_follows_the_recipe(tiny: Recipe) -> None:
    for name, mean, std in (
        ("teacher", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ):
        preprocessing = preprocessing_for(dataclasses.replace(tiny, normalisation=name), [])  # type: ignore[arg-type]
        assert (preprocessing.mean, preprocessing.std) == (mean, std)
    assert preprocessing_for(dataclasses.replace(tiny, teacher="demo"), []).interpolation == "bicubic"


def test_auto_size_reads_a_few_sound_headers(tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = make_images(tmp_path, 100, shape=(64, 96))
    Path(uris[0]).write_bytes(b"")
    calls = record_calls(monkeypatch, storage, "read_at_most")
    recipe = dataclasses.replace(tiny, size=Size("auto"), pixels=64 * 96)
    assert preprocessing_for(recipe, uris).size_text == "64x96"
    read = [uri for uri, _ in calls]
    assert len(read) == len(set(read)) == 32
    assert {uris[0], uris[-1]} <= set(read)
    for uri in uris:
        Path(uri).write_bytes(b"")
    with pytest.raises(DataError, match=r"32 of 32 training images cannot be read: .*000.png.*; and 27 more; repair"):
        preprocessing_for(recipe, uris)


BRIGHTNESS = COMPARED.index("brightness")


def with_sizes(*sizes: tuple[int, int], brightness: float = 100.0) -> TrainingImages:
    """Make images of these sizes (width, height), each of another brightness. Their pixels are not needed."""
    images, statistics = unpadded(np.empty((len(sizes), 1, 1, 3), np.uint8)), np.ones((len(sizes), len(COMPARED)), "f4")
    statistics[:, COMPARED.index("contrast")] = 0
    statistics[:, :2] = sizes
    statistics[:, BRIGHTNESS] = brightness + np.arange(len(sizes)) / len(sizes)
    return dataclasses.replace(images, statistics=statistics, preprocessing=make_preprocessing(256, 256, "fit"))


def test_almost_black_images_and_copies_are_reported() -> None:
    assert with_sizes(*[(1024, 1024)] * 20, (900, 1000)).find_problems() == []
    (problem,) = with_sizes(*[(512, 512)] * 20, brightness=14.5).find_problems()
    assert problem.startswith("all images are almost black (mean brightness at most 15 of 255); if these are values")
    for column, value in ((BRIGHTNESS, 25.0), (COMPARED.index("contrast"), 1.5)):
        # One image is brighter, or has bright parts.
        dark = with_sizes(*[(512, 512)] * 20, brightness=14.5)
        dark.statistics[7, column] = value
        assert dark.find_problems() == []
    copied = with_sizes(*[(512, 512)] * 20)
    copied.statistics[[3, 5, 9]] = copied.statistics[4]
    (problem,) = copied.find_problems()
    assert problem == (
        "3 of 20 images (/good/4.png, /good/5.png, /good/9.png) are copies of others; remove them: the threshold "
        "counts each as a good image of its own"
    )


@pytest.mark.parametrize(("name", "what"), [("brightness", "dark"), ("sharpness", "blurred")])
def test_dark_and_blurred_images_are_named(name: str, what: str) -> None:
    images = with_sizes(*[(512, 512)] * 20)
    column = COMPARED.index(name)
    images.statistics[[2, 7], column] = np.array([0.55, 0.56]) * np.median(images.statistics[:, column])
    assert images.find_problems() == []
    images.statistics[[2, 7], column] *= 0.8
    (problem,) = images.find_problems()
    assert problem.startswith(f"2 of 20 images (/good/2.png, /good/7.png) are {what} beside the others")


def test_images_of_another_kind_of_pixels_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    uris = make_images(tmp_path)
    for number, pixels in ((1, "u2"), (4, "LA"), (6, "RGBA"), (7, "L")):
        image = rng.integers(90, 130, (48, 40), dtype=np.uint8)
        wide = Image.fromarray(image.astype("u2") * 257) if pixels == "u2" else Image.fromarray(image).convert(pixels)
        wide.save(uris[number])
    images = load_images(uris, make_preprocessing(64), 2**30)
    (problem,) = images.find_problems()
    assert problem == (
        f"4 of 9 images ({uris[1]}, {uris[4]}, {uris[6]}, and 1 more) are of another kind of pixels "
        "(I;16, LA, RGBA, L; most are RGB); save all alike"
    )


def test_images_that_turn_are_reported() -> None:
    turning = dataclasses.replace(
        with_sizes(*[(1600, 400)] * 12, *[(400, 1600)] * 8), preprocessing=make_preprocessing(192, 768, "fit")
    )
    assert turning.scale_range() == (192 / 1600, 768 / 1600)
    (problem,) = turning.find_problems()
    assert "the model sees them at 12% to 48% of their size" in problem
