"""A data set with three fitted categories, and the stages as plain functions from table to table: no Ray runs here."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from stpm.data import mvtec
from stpm.data.image_files import ImageRef
from stpm.fitting.fit_category import last_teacher
from stpm.method.arithmetic import Arithmetic
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Recipe
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.scoring.inputs.manifest import ManifestRow, labelled_rows, make_rows
from stpm.scoring.options import OutputOptions, ScoreOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.progress import ProgressReporter
from stpm.scoring.stages.decode import Decode
from stpm.scoring.stages.draw_heatmaps import DrawHeatmaps
from stpm.scoring.stages.scorer import Scorer
from tests.conftest import MODELS, fit_model, make_preprocessing
from tests.datasets import make_category

# One model of each kind: the scorer has to keep them apart in a mixed batch.
KINDS = {"grey": "student and memory", "nut": "student", "screw": "memory"}
CATEGORIES = tuple(KINDS)
PREPROCESSING = dict.fromkeys(CATEGORIES, make_preprocessing(64))


def make_run(root: Path) -> None:
    """Make a data set, and a model of each category."""
    for name, kind in KINDS.items():
        make_category(str(root / "data"), name, grey=name == "grey", kind="JPEG" if name == "grey" else "PNG")
        fit(root, name, dataclasses.replace(MODELS[kind], held_out_fraction=0.4))


def fit(root: Path, name: str, recipe: Recipe) -> ModelRecord:
    """Fit a category of the data set in a folder, and store its model in the same folder."""
    record = fit_model(root / "data", root / "models", name, recipe)
    # No scorer runs in the process of a fit, which keeps its teacher.
    last_teacher.cache_clear()
    return record


def refit(run: Path, root: Path, **changes: Any) -> None:
    """Copy a data set and its models, and fit `nut` again with other values of its recipe."""
    shutil.copytree(run, root, dirs_exist_ok=True)
    fit(root, "nut", dataclasses.replace(MODELS[KINDS["nut"]], **changes))


def manifest(root: Path) -> pa.Table:
    """Make the manifest of all labelled images."""
    return pa.concat_tables(labelled_rows([mvtec.read_category(str(root / "data"), name) for name in CATEGORIES]))


def nut_rows(uris: Sequence[str], positions: Sequence[tuple[int, int]] = ()) -> pa.Table:
    """Make manifest rows of images of category "nut". Positions are start and length in an archive."""
    images = [ImageRef(uri, *position) for uri, position in zip(uris, positions or [()] * len(uris), strict=True)]
    return make_rows([ManifestRow(image, "nut") for image in images])


def current_models(store: ModelStore) -> dict[str, ModelRecord]:
    """Return the current model of each category of a local store."""
    return {path.parent.name: store.record(path.parent.name) for path in Path(store.uri).glob("*/current.json")}


def scorer(
    root: Path,
    progress: ProgressReporter | None = None,
    *,
    raw_maps: bool = False,
    overlays: bool = False,
    masks: bool = False,
    arithmetic: Arithmetic = Arithmetic(),  # noqa: B008  it is frozen
    **options: Any,
) -> Scorer:
    store = ModelStore(str(root / "models"))
    output = OutputOptions(raw_maps=raw_maps, overlay=overlays, masks=masks)
    return Scorer(store, current_models(store), ScoreOptions(0.3, **options), output, arithmetic, progress)


def decode(rows: pa.Table) -> pa.Table:
    return Decode(PREPROCESSING)(rows)


def score(root: Path, rows: pa.Table) -> pa.Table:
    """Decode and score manifest rows; keep everything."""
    return scorer(root, raw_maps=True, overlays=True)(decode(rows))


def write_heatmaps(
    rows: pa.Table,
    out: Path,
    heatmaps: Any = "all",
    *,
    overlays: bool = False,
    heatmaps_in: Any = "files",
    preprocessing: Mapping[str, Preprocessing] = PREPROCESSING,
) -> pa.Table:
    options = OutputOptions(heatmaps, heatmaps_in, overlays)
    return DrawHeatmaps(RunOutput.single(str(out)), options, preprocessing)(rows)
