"""What the README promises exists, and CI runs what it prints."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPOSITORY
from tests.test_cli import job

README = (REPOSITORY / "README.md").read_text()


def test_ci_runs_the_test_line_as_printed() -> None:
    lines = re.findall(r"^pip install .*pytest$", README, flags=re.MULTILINE)
    assert lines == ["pip install -e '.[demo,test]' && python -m pytest"]
    assert r"grep -m1 -E '^pip install .*pytest$' README.md" in (REPOSITORY / ".ci" / "run").read_text()


def test_every_option_it_names_is_one() -> None:
    known = {
        flag
        for name in ("fit", "score", "benchmark", "evaluate")
        for a in job(name).parser({})._actions
        for flag in a.option_strings
    }
    ours = re.sub(r"ray job submit.*?--", "", README.replace("--generate", ""), flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", ours)) - {"--working-dir", "--address"}
    assert named
    assert named <= known, named - known


def test_every_path_it_names_is_there() -> None:
    named = set(re.findall(r"`((?:stpm|jobs|tests)/[\w/.]*)`", README)) | set(re.findall(r"\]\(([\w/.]+)\)", README))
    assert len(named) > 8
    for name in named:
        assert (REPOSITORY / name).exists(), name


def test_every_module_has_its_place_in_the_table() -> None:
    table = README[README.index("| folder or file") :]
    for module in sorted((REPOSITORY / "stpm").iterdir()):
        if module.name not in ("__init__.py", "errors.py", "__pycache__"):
            assert module.name in table, module.name


def test_every_extra_it_names_is_one() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    for extra in ("demo", "test", "s3", "gcs", "azure"):
        assert f"\n{extra} = [" in project
        assert f"`{extra}`" in README or f"{extra}]" in README


@pytest.mark.parametrize("preset", ["default", "paper", "notebook"])
def test_the_presets_are_named(preset: str) -> None:
    assert f"| `{preset}` |" in README
