"""docs/architecture.md names folders, files and functions that exist, and the import order that CI enforces."""

from __future__ import annotations

import ast
import re

import pytest

from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "docs" / "architecture.md").read_text()


def section(title: str) -> str:
    """Return the text under a heading."""
    return TEXT.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def defined_names(file: str) -> set[str]:
    """Return the functions, classes and methods of a module, methods as `Class.method`."""
    names = set()
    for node in ast.parse((REPOSITORY / file).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{method.name}" for method in node.body if isinstance(method, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("reference", sorted(set(re.findall(r"`(\S+\.py::\S+)`", TEXT))))
def test_function_exists(reference: str) -> None:
    file, _, name = reference.partition("::")
    assert name in defined_names(file)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+(?:[\w.]+)?|[\w.]+\.(?:toml|yaml))`", TEXT))))
def test_path_exists(path: str) -> None:
    assert (REPOSITORY / path).exists()


def test_ten_questions_are_answered_by_one_file_each() -> None:
    rows = re.findall(r"^\| (.+\?) \| `(\S+\.py)` \|$", section("Ten questions"), flags=re.MULTILINE)
    assert len(rows) == 10
    assert len(set(rows)) == 10


def test_import_order_is_that_of_the_import_linter() -> None:
    order = section("Import order").split("```\n")[1].splitlines()
    layers = (REPOSITORY / "pyproject.toml").read_text().split("layers = [")[1].split("]")[0]
    assert order == re.findall(r'"(.+?)"', layers)


def test_every_part_is_in_the_table() -> None:
    table = section("Folders")
    ignored = ("__init__.py", "__pycache__")
    for path in (REPOSITORY / "stpm").iterdir():
        if path.name not in ignored:
            assert f"| `stpm/{path.name}{'/' if path.is_dir() else ''}` |" in table, path.name
