from __future__ import annotations

import dataclasses
import resource
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from stpm import storage
from stpm.data import decoding
from stpm.errors import DataError, ImageError
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.recipe import Recipe
from stpm.options import Size
from tests.conftest import make_preprocessing
from tests.datasets import make_category


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


def test_broken_files_are_named(tmp_path: Path) -> None:
    uris = make_images(tmp_path)
    for uri in uris[:7]:
        Path(uri).write_bytes(b"")
    with pytest.raises(DataError, match=r"7 of 9 training images cannot be read: .*000.png.*; and 2 more; repair"):
        load_images(uris, make_preprocessing(64), 2**30)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ImageError("damaged", "cut"), "repair or remove them"),
        (ImageError("out_of_memory", "no memory"), "give fewer --workers, or a machine with more memory"),
        (OSError("503"), "run the same command again when storage can be read"),
    ],
)
def test_the_advice_fits_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, advice: str
) -> None:
    uris = make_images(tmp_path)
    monkeypatch.setattr(decoding, "decode", Mock(side_effect=error))
    with pytest.raises(DataError, match=rf"9 of 9 training images cannot be read: .*000.png.*; {advice}$"):
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


def test_auto_size_reads_few_headers_and_ignores_broken_ones(
    tmp_path: Path, tiny: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = make_images(tmp_path, 100, shape=(64, 96))
    Path(uris[0]).write_bytes(b"")
    read: list[str] = []
    original = storage.read_at_most
    monkeypatch.setattr(storage, "read_at_most", lambda uri, most: read.append(uri) or original(uri, most))
    recipe = dataclasses.replace(tiny, size=Size("auto"), pixels=64 * 96)
    assert preprocessing_for(recipe, uris).size_text == "64x96"
    assert len(read) == len(set(read)) == 32
    assert {uris[0], uris[-1]} <= set(read)
    for uri in uris:
        Path(uri).write_bytes(b"")
    with pytest.raises(DataError, match=r"32 of 32 training images cannot be read: .*000.png.*; and 27 more; repair"):
        preprocessing_for(recipe, uris)
