"""The examples in docstrings are correct."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from stpm import errors
from stpm.evaluation import pixels
from stpm.method import calibration, matching, scales


@pytest.mark.parametrize("module", [errors, matching, calibration, scales, pixels], ids=lambda module: module.__name__)
def test_examples_in_docstrings_are_correct(module: ModuleType) -> None:
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
