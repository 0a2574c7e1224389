import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from stpm.errors import ImageError
from stpm.scoring.stages import decode as decode_stage
from stpm.scoring.stages.decode import Decode
from stpm.scoring.stages.decoding_child import check_in_child
from tests.conftest import make_preprocessing
from tests.datasets import CRASHING_SITECUSTOMIZE, crashing_image, encode_image
from tests.scoring.stages.helpers import PREPROCESSING, manifest

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
def test_what_comes_from_outside_is_no_error_of_the_image(
    monkeypatch: pytest.MonkeyPatch, ended: int | OSError
) -> None:
    outcome = Mock(returncode=ended) if isinstance(ended, int) else ended
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=[outcome]))
    check_in_child(IMAGE, make_preprocessing(64), seconds=60)


def test_a_child_that_takes_too_long_is_killed() -> None:
    with pytest.raises(ImageError, match=r"took more than 0\.01 s") as caught:
        check_in_child(IMAGE, make_preprocessing(64), seconds=0.01)
    assert caught.value.kind == "decode_timeout"


@pytest.mark.parametrize(("repetitions", "images"), [(0, 0), (1, 0), (2, 3)])
def test_only_a_task_that_was_repeated_twice_tries_images_in_children(
    run: Path, monkeypatch: pytest.MonkeyPatch, repetitions: int, images: int
) -> None:
    check = Mock()
    monkeypatch.setattr(decode_stage, "check_in_child", check)
    Decode(PREPROCESSING, repetitions=lambda: repetitions)(manifest(run).slice(0, 3))
    assert check.call_count == images
