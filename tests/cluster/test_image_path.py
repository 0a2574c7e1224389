"""The files that an image enters, from its URI to its row, in all processes of a score job."""

from pathlib import Path

import pytest

from stpm import storage
from tests.cluster.conftest import fit, read_rows, run_job
from tests.conftest import REPOSITORY
from tests.datasets import make_category
from tests.test_architecture import section

pytestmark = pytest.mark.cluster

MAX_FILES = 14
NAME = "the-only-image"
# What the steps compute and read with: these folders know nothing of scoring.
LIBRARIES = ("stpm/method/", "stpm/storage/", "stpm/names.py")
# In each Python process: write the files of this package whose functions get the image, or return it.
HOOK = """
import sys, threading
ROOT, OUT, NAME = {root!r}, {out!r}, {name!r}
seen = set()

def carries(value, depth=0):
    kind = type(value).__name__
    if kind in ("Table", "RecordBatch"):
        return value.num_rows > 0 and "uri" in value.schema.names
    if isinstance(value, (list, tuple, dict)) and depth < 2:
        inner = value.values() if isinstance(value, dict) else value
        return any(carries(each, depth + 1) for each in list(inner)[:40])
    return kind in ("Decoded", "Result") or (isinstance(value, str) and NAME in value)

def hook(frame, event, value):
    code = frame.f_code
    if code.co_filename in seen or not code.co_filename.startswith(ROOT + "stpm/") or event not in ("call", "return"):
        return
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if carries(value) if event == "return" else any(carries(frame.f_locals.get(each)) for each in arguments):
        seen.add(code.co_filename)
        with open(OUT, "a") as file:
            file.write(code.co_filename.removeprefix(ROOT) + "\\n")

sys.setprofile(hook)
threading.setprofile(hook)
"""


def test_an_image_enters_few_files_and_those_that_the_page_names(tmp_path: Path) -> None:
    make_category(str(tmp_path / "data"), "nut", train=6)
    fit(tmp_path / "data", tmp_path / "models")
    good = next((tmp_path / "data" / "nut" / "train" / "good").iterdir())
    storage.publish(f"{tmp_path}/images/{NAME}.png", good.read_bytes())
    hook = HOOK.format(root=f"{REPOSITORY}/", out=str(tmp_path / "entered"), name=NAME)
    (tmp_path / "sitecustomize.py").write_text(hook)
    options = ["--models", str(tmp_path / "models"), "--images", str(tmp_path / "images"), "--category", "nut"]
    # The page of anomalous images reads rows that are written.
    options += ["--out", str(tmp_path / "out"), "--scorers", "1", "--top", "0"]
    assert run_job("score", *options, PYTHONPATH=f"{tmp_path}:{REPOSITORY}").returncode == 0
    assert len(read_rows(tmp_path / "out")) == 1
    lines = (tmp_path / "entered").read_text().splitlines()
    entered = [file for file in dict.fromkeys(lines) if not file.startswith(LIBRARIES)]
    assert len(entered) <= MAX_FILES, entered
    page = section("An image, from URI to row")
    assert not [file for file in entered if f"`{file}" not in page]
    # No way back: whoever starts the run is not asked for the image again.
    assert not {"stpm/jobs/score.py", "stpm/scoring/run.py", "stpm/scoring/pipeline.py"} & {*entered}
