"""Each line of docs/faults.md names a test that exists."""

import re

from tests.conftest import REPOSITORY


def test_each_fault_names_a_test() -> None:
    lines = (REPOSITORY / "docs" / "faults.md").read_text().splitlines()
    tests = [match[1] for line in lines if (match := re.match(r"\| (?!fault|-).*`(tests/\S+\.py\S*)` \|$", line))]
    headers = lines.count("| fault | outcome | test |")
    assert len(tests) == sum(line.startswith("| ") for line in lines) - headers > 12
    for test in tests:
        file, _, name = test.partition("::")
        text = (REPOSITORY / file).read_text()
        assert not name or re.search(rf"^def {re.escape(name)}\(", text, re.MULTILINE), test
