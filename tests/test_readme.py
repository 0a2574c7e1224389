"""All pages name options, paths and links that exist; CI runs the test line of the README."""

import re
import shlex
from pathlib import Path

import pytest

from stpm.commands import COMMANDS
from stpm.method.recipe import PRESETS
from tests.conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
RESULTS = sorted((REPOSITORY / "bench").glob("*.md"))
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md", *DOCS, *RESULTS]
# They show how to start a job.
NAMED = ("tutorial", "scoring", "nightly", "feedback")
# Options of other programs, and of `stpm` itself.
OTHER_OPTIONS = {"--complete", "--working-dir", "--address", "--generate", "--check", "--dist"}


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def test_ci_runs_the_test_line_as_printed() -> None:
    lines = re.findall(r"^pip install .*pytest.*$", README, flags=re.MULTILINE)
    assert lines == ["pip install -e '.[demo,test]' -c deploy/constraints.txt && python -m pytest -n 2 --dist loadfile"]
    assert r"grep -m1 -E '^pip install .*pytest' README.md" in (REPOSITORY / ".ci" / "run").read_text()


@each_page
def test_options_exist(page: Path) -> None:
    known = {flag for each in COMMANDS.values() for flag in each.flags()}
    # Benchmarks and uv have options of their own.
    text = re.sub(r"(python bench/\S+\.py|uv pip compile)(.*\\\n)*.*", "", page.read_text())
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named <= known | OTHER_OPTIONS, named - known - OTHER_OPTIONS


@each_page
def test_commands_parse(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    shown = r"^ *(?:.* (?:&&|--) +)?(?:stpm |python jobs/)(\w+)(?:\.py)?((?: .*)?)$"
    commands = re.findall(shown, text, flags=re.MULTILINE)
    for name, options in commands:
        COMMANDS[name].parse(shlex.split(options, comments=True))
    assert commands or page not in (REPOSITORY / "README.md", *(REPOSITORY / "docs" / f"{name}.md" for name in NAMED))


@each_page
def test_paths_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"`((?:stpm|jobs|tests|bench|deploy)/[\w/.]*)`|(bench/\w+\.py)", text):
        assert (REPOSITORY / "".join(name)).exists(), name


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([\w/.-]*)#?([\w-]*)\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_picture_is_shown() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for picture in (REPOSITORY / "docs").glob("*.jpg"):
        assert f"{picture.name})" in text


def test_the_index_names_every_page() -> None:
    index = (REPOSITORY / "docs" / "README.md").read_text()
    for page in DOCS:
        assert page.name == "README.md" or f"({page.name})" in index


def test_every_benchmark_is_named_in_the_docs_or_used_by_another() -> None:
    docs = "".join(page.read_text() for page in (*DOCS, *RESULTS))
    code = {file: file.read_text() for file in sorted((REPOSITORY / "bench").glob("*.py"))}
    for file, own in code.items():
        others = "".join(text for other, text in code.items() if other != file)
        if 'if __name__ == "__main__":' in own:
            assert f"bench/{file.name}" in docs or f'"{file.name}"' in others, file
        else:
            assert f"from {file.stem} import" in others, file


def test_every_extra_and_every_preset_is_named() -> None:
    project = (REPOSITORY / "pyproject.toml").read_text()
    for extra in ("demo", "test", "s3", "gcs", "azure"):
        assert f"\n{extra} = [" in project
        assert f"`{extra}`" in README or f"{extra}]" in README
    recipes = (REPOSITORY / "docs" / "recipes.md").read_text()
    assert all(f"| `{preset}` |" in recipes for preset in PRESETS)
