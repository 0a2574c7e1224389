"""docs/architecture.md names folders, files and functions that exist."""

import ast
import re

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


def test_paths_and_functions_exist() -> None:
    paths = set(re.findall(r"`((?:\w+/)+(?:[\w.]+)?|[\w.]+\.(?:toml|yaml))`", TEXT))
    functions = set(re.findall(r"`(\S+\.py)::(\S+)`", TEXT))
    assert len(paths) > 20
    assert len(functions) > 20
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []
    assert [(file, name) for file, name in functions if name not in defined_names(file)] == []


def test_every_part_is_in_the_table() -> None:
    table = section("Folders")
    for path in (REPOSITORY / "stpm").iterdir():
        if path.is_dir() and path.name != "__pycache__":
            assert f"| `stpm/{path.name}/` |" in table, path.name
