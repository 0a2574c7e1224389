"""The notebook runs from top to bottom, and finds what its outputs say. `python -m tests.test_notebook` stores them."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "detect.ipynb"
MAX_BYTES = 400_000
# Machines differ in the last bits of bfloat16, about as much as seeds do.
TOLERANCE = 0.05


def execute(folder: Path) -> Any:
    """Run the notebook in a folder, and return it with its outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    )
    # Other tests share the cores, and threads that wait for each other spin.
    return client.execute(env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"})


def outputs(notebook: Any) -> list[tuple[str, list[str]]]:
    """Return the source of each cell and the kinds of its outputs: a stream's name, or types of data.

    Without stderr: there matplotlib says that it builds its cache of fonts, once on a machine.
    """
    return [
        (
            cell.source,
            [
                kind
                for output in cell.get("outputs", ())
                if output.get("name") != "stderr"
                for kind in sorted(output.get("data", [output.get("name")]))
            ],
        )
        for cell in notebook.cells
    ]


def auroc(notebook: Any) -> list[float]:
    """Return the AUROC of images and of pixels that a notebook prints."""
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    return [float(value) for value in re.findall(r"AUROC ([\d.]+)", text)]


def test_the_notebook_runs_and_finds_what_its_outputs_say(tmp_path: Path) -> None:
    stored, executed = nbformat.read(NOTEBOOK, as_version=4), execute(tmp_path)
    assert outputs(executed) == outputs(stored)
    assert auroc(executed) == pytest.approx(auroc(stored), abs=TOLERANCE)
    assert len(auroc(stored)) == 2
    assert min(auroc(stored)) > 0.9


def test_its_stored_outputs_are_small_and_name_no_path_of_a_machine() -> None:
    text = NOTEBOOK.read_text()
    assert text.count('"image/jpeg"') > 5
    assert len(text) < MAX_BYTES
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(Path(folder)), NOTEBOOK)
