"""docs/faults.md is what bench/faults.py makes, and each of its lines names a test that there is."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from tests.conftest import REPOSITORY


def faults() -> Any:
    spec = importlib.util.spec_from_file_location("faults", REPOSITORY / "bench" / "faults.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FAULTS


def test_each_line_names_a_test_that_there_is() -> None:
    for fault in faults():
        file, _, name = fault.test.partition("::")
        text = (REPOSITORY / file).read_text()
        assert not name or re.search(rf"^def {re.escape(name.split('[')[0])}\(", text, re.MULTILINE), fault.test


def test_the_table_has_every_fault_and_its_outcome() -> None:
    table = (REPOSITORY / "docs" / "faults.md").read_text()
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(lines) == len(faults()) >= 12
    for fault, line in zip(faults(), lines, strict=True):
        assert fault.what in line
        assert fault.outcome in line
        assert line.endswith(("| passed |", "| not run |")), "a fault that is not survived has no place in a release"
