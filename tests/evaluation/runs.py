"""A scored run folder, and results, made without scoring."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from stpm import storage
from stpm.data.heatmaps import palette_png
from stpm.data.mvtec import read_category
from stpm.evaluation.category import MasksAt, ScoredCategory, read_scores
from stpm.evaluation.report import CategoryResult, Failure, Report
from stpm.evaluation.thresholds import place_threshold
from stpm.method.preprocessing import Preprocessing
from stpm.method.recipe import Recipe
from stpm.method.scales import HeatmapScale
from stpm.metrics.category_metrics import METRICS, CategoryMetrics, Metric, measure_category
from stpm.models.record import FitRecord, ModelRecord, StoredFile
from stpm.scoring.inputs.manifest import labelled_rows
from stpm.scoring.output import RunOutput
from stpm.scoring.run_state import RunState, ScoringConfig
from stpm.scoring.run_statistics import RunResult
from tests.conftest import TINY, make_preprocessing
from tests.datasets import make_category, make_output, write_rows

SIZE = 64
PREPROCESSING = make_preprocessing(SIZE)
# Scores of a model's calibration images; the threshold of `scored_run` is the second largest.
CALIBRATION = np.array([0.25, 0.5, 1.0, 1.25], np.float32)


def scored_run(
    root: Path,
    *,
    masks: bool = True,
    broken: int = 0,
    unlabelled: int = 0,
    maps: bool = True,
    views: bool = False,
    types: tuple[str, ...] = ("square",),
    preprocessing: Preprocessing = PREPROCESSING,
) -> ScoredCategory:
    """Write a category "nut" as scoring does, with random maps; defects score a little higher.

    The first images, which are good, may be broken or without a label; defects take the types in turn. Of a score with
    views, the student gives a quarter.
    """
    make_category(str(root / "data"), "nut", good=6, defects=6, masks=masks)
    rng = np.random.default_rng(1)
    (manifest,) = labelled_rows([read_category(str(root / "data"), "nut")])
    output = RunOutput.named(str(root / "run"), "seed-0")
    shape = preprocessing.content_shape(40, 48)
    columns = make_output(manifest.num_rows).to_pydict()
    columns |= {name: manifest[name].to_pylist() for name in manifest.schema.names if name in columns}
    for i, label in enumerate(columns["label"]):
        anomaly_map = rng.random(shape, np.float32)
        anomaly_map[14:34, 14:34] += 0.3 if label != "good" else 0.0
        score, heatmap = float(anomaly_map.max()), f"heatmaps/{i}.png"
        storage.publish(f"{output.folder}/{heatmap}", palette_png(np.full(shape, 255, np.uint8)))
        row: dict[str, object] = {"width": 40, "height": 48, "error_kind": "", "error_message": "", "heatmap": heatmap}
        row |= {"score": score, "threshold": 1.0, "is_anomalous": score > 1.0}
        row |= {"coarse_score": 0.25 * score, "fine_score": 0.75 * score} if views else {}
        row["anomaly_map"] = anomaly_map.tobytes() if maps else None
        if i < broken:
            row |= dict.fromkeys(("score", "threshold", "is_anomalous", "anomaly_map"))
            row |= {"error_kind": "damaged", "error_message": "cut off", "heatmap": ""}
        row["label"] = "" if i < unlabelled else label if label == "good" else types[i % len(types)]
        for name, value in row.items():
            columns[name][i] = value
    # The other run in the same folder must not be read.
    for run in (output, RunOutput.named(output.folder, "seed-1")):
        write_rows(run, make_output(manifest.num_rows, **columns))
    return ScoredCategory(output, "nut", preprocessing)


def finish_run(output: RunOutput, model_id: str, store: str, rows: int = 0) -> None:
    """Write the state of a finished run of the category `nut`."""
    state = RunState(output.state_folder)
    state.start(ScoringConfig((), 0.01))
    state.bind_models({"nut": model_id}, store)
    state.finish(RunResult(rows=rows))


def measured(category: ScoredCategory, masks_at: MasksAt = "model") -> CategoryMetrics:
    return measure_category(read_scores(category, masks_at))


def result(
    category: str, seed: int, image: float | None, pixel: float | None, recipe: Recipe = TINY, **metrics_changes: Any
) -> CategoryResult:
    part, losses = ("memory", (0, 0, None, None)) if recipe.student == "none" else ("student", (3, 2, 0.5, 0.6))
    record = ModelRecord(
        category=category,
        recipe=dataclasses.replace(recipe, seed=seed),
        preprocessing=PREPROCESSING,
        precision="float32",
        teacher_digest="t",
        teacher_licence="apache-2.0",
        heatmap_scale=HeatmapScale(0.1, 1.0),
        distance_scales=(),
        fit=FitRecord(2.0 + seed, *losses, 8, 2, 2, "cpu"),
        files={f"{part}.safetensors": StoredFile(f"{seed}" * 64, 9)},
        library_versions={},
        created="now",
    )
    metrics = dict.fromkeys(METRICS, Metric(undefined="not measured"))
    if image is not None:
        metrics["image_auroc"] = Metric(image, (image - 0.1, image + 0.1))
    metrics["pixel_auroc"] = Metric(undefined="no masks") if pixel is None else Metric(pixel)
    measured = CategoryMetrics(metrics, 4, 5, 3, 1)
    measured = dataclasses.replace(measured, defects={"dent": measured}, **metrics_changes)
    return CategoryResult(record, measured, threshold=place_threshold(1.0 + 0.25 * seed, CALIBRATION))


REPORT = Report(
    "data",
    [result("b", 0, 0.5, None), result("a", 1, 0.75, 0.9), result("a", 0, 0.25, 0.7)],
    [Failure("c", "/data/c: no images")],
)
