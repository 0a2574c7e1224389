"""Decoding, here and in a child process."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pytest

from stpm import storage
from stpm.data import decoding, image_files, mvtec
from stpm.data.decoding import Decoded
from stpm.data.image_files import ImageRef
from stpm.data.image_statistics import COMPARED
from stpm.errors import ImageError
from stpm.models.store import ModelStore
from stpm.scoring.stages import decode as decode_stage
from stpm.scoring.stages.decode import Decode
from stpm.scoring.stages.decoding_child import check_in_child
from tests.conftest import make_preprocessing
from tests.datasets import CRASHING_SITECUSTOMIZE, crashing_image, encode_image, with_column
from tests.scoring.stages.helpers import PREPROCESSING, decode, manifest, nut_rows


def test_a_parquet_file_that_hangs_delays_no_other(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Path(manifest(run)["uri"][0].as_py()).read_bytes()
    for name in ("hangs", "works"):
        storage.publish(f"{tmp_path}/{name}.parquet", storage.encode_parquet(pa.table({"image": pa.array([good] * 3)})))
    release = threading.Event()
    original = image_files.pq.ParquetFile

    def open_parquet(file: Any, **options: Any) -> Any:
        if "hangs.parquet" in str(file):
            release.wait(60)
        return original(file, **options)

    monkeypatch.setattr(image_files.pq, "ParquetFile", open_parquet)
    # More images hang than are fetched at the same time: without new threads the last ones would never start.
    rows = [(name, row) for row in range(3) for name in ("hangs", "works")]
    uris = [f"{tmp_path}/{name}.parquet#{row}" for name, row in rows]
    out = Decode(PREPROCESSING, seconds=1.0, fetchers=2)(nut_rows(uris, [(row, 1) for _, row in rows]))
    release.set()
    assert out["error_kind"].to_pylist() == ["fetch_timeout", ""] * 3


def test_an_image_that_hangs_while_it_is_decoded_takes_no_other_with_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = manifest(run).slice(0, 12)
    hanging = [Path(rows["uri"][i].as_py()).read_bytes() for i in (0, 5)]
    release = threading.Event()
    original = decoding.decode
    monkeypatch.setattr(
        decoding, "decode", lambda data, *how: (data in hanging and release.wait(60), original(data, *how))[1]
    )
    out = Decode(PREPROCESSING, seconds=1.0)(rows)
    release.set()
    assert out["error_kind"].to_pylist() == ["decode_timeout" if i in (0, 5) else "" for i in range(12)]


def test_images_are_decoded_one_at_a_time_with_no_limit_to_the_wait(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of them are fetched at the same time than `fetchers`."""
    fetching = threading.BoundedSemaphore(3)
    read_small = image_files.read_small

    def fetch(image: ImageRef) -> bytes | None:
        assert fetching.acquire(blocking=False), "more images are fetched at the same time"
        time.sleep(0.02)
        fetching.release()
        return read_small(image)

    monkeypatch.setattr(image_files, "read_small", fetch)
    # The eight images take several times the limit of each.
    turn = threading.Lock()
    original = decoding.decode

    def decode_slowly(data: bytes, *how: Any) -> Decoded:
        assert turn.acquire(blocking=False), "two images are decoded at the same time"
        time.sleep(0.2)
        turn.release()
        return original(data, *how)

    monkeypatch.setattr(decoding, "decode", decode_slowly)
    out = Decode(PREPROCESSING, seconds=1.0, fetchers=3)(manifest(run).slice(0, 8))
    assert out["error_kind"].to_pylist() == [""] * 8


def test_a_large_file_is_fetched_when_it_is_its_turn(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = manifest(run).slice(0, 3)
    expected = decode(rows)
    monkeypatch.setattr(image_files, "SMALL_BYTES", 10)
    assert decode(rows).equals(expected)
    original = image_files.read
    monkeypatch.setattr(image_files, "read", lambda image, limit=20: original(image, limit))
    assert decode(rows)["error_kind"].to_pylist() == ["too_large"] * 3


def test_a_row_with_an_error_is_not_read_and_has_no_statistics(run: Path, tmp_path: Path) -> None:
    (row,) = decode(with_column(manifest(run).slice(0, 1), "error_kind", ["not_allowed"])).to_pylist()
    assert (row["error_kind"], row["pixels"], row["bytes"]) == ("not_allowed", b"", None)
    (row,) = decode(nut_rows([str(tmp_path / "missing.png")])).select(COMPARED).to_pylist()
    assert set(row.values()) == {None}


def test_statistics_are_those_that_fitting_stored_of_the_same_images(run: Path) -> None:
    store = ModelStore(str(run / "models"))
    stored = store.image_statistics(store.record("nut"))
    uris = [uri for uri, _ in mvtec.read_category(str(run / "data"), "nut").train]
    found = decode(nut_rows(uris)).select(COMPARED)
    assert found.cast(stored.schema).equals(stored)
    assert len(set(stored["brightness"].to_pylist())) == len(uris)


IMAGE = encode_image(np.full((20, 30, 3), 100, np.uint8))


def test_a_crash_of_the_child_is_an_error_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASHING_SITECUSTOMIZE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ImageError, match="decoding it crashes the process with SIGSEGV; repair or remove the file"):
        check_in_child(crashing_image(), make_preprocessing(64), seconds=60)
    # An image that crashes nothing passes, even if it cannot be decoded.
    for data in (IMAGE, IMAGE[:60], b""):
        check_in_child(data, make_preprocessing(64), seconds=60)


@pytest.mark.parametrize("ended", [-signal.SIGKILL, -signal.SIGTERM, 1, BlockingIOError("no more processes")])
def test_what_comes_from_outside_is_no_images_error(monkeypatch: pytest.MonkeyPatch, ended: int | OSError) -> None:
    outcome = Mock(returncode=ended) if isinstance(ended, int) else ended
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=[outcome]))
    check_in_child(IMAGE, make_preprocessing(64), seconds=60)


def test_a_child_that_takes_too_long_is_killed() -> None:
    with pytest.raises(ImageError, match=r"took more than 0\.01 s") as caught:
        check_in_child(IMAGE, make_preprocessing(64), seconds=0.01)
    assert caught.value.kind == "decode_timeout"


@pytest.mark.parametrize(("repetitions", "images"), [(0, 0), (1, 0), (2, 3)])
def test_a_task_repeated_twice_tries_children(
    run: Path, monkeypatch: pytest.MonkeyPatch, repetitions: int, images: int
) -> None:
    check = Mock()
    monkeypatch.setattr(decode_stage, "check_in_child", check)
    Decode(PREPROCESSING, repetitions=lambda: repetitions)(manifest(run).slice(0, 3))
    assert check.call_count == images
