"""The stages of the pipeline as plain functions from batch to batch: no Ray runs here."""

from __future__ import annotations

import dataclasses
import io
import os
import shutil
import tarfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from stpm import storage
from stpm.data import mvtec
from stpm.data.images import decode
from stpm.fitting.fit_category import run_task
from stpm.fitting.task import FitTask
from stpm.method.backbones import load_teacher
from stpm.method.forward import Matcher
from stpm.method.preprocessing import Preprocessing, Resize
from stpm.method.recipe import Recipe
from stpm.models.store import Model, ModelStore
from stpm.options import Size
from stpm.scoring.inputs import archives
from stpm.scoring.inputs.categories import Categories
from stpm.scoring.inputs.manifest import image_id, of_test_images
from stpm.scoring.inputs.sources import rows_of
from stpm.scoring.options import OutputOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.schema import DECODED, MANIFEST, OUTPUT, SCORED, table
from stpm.scoring.stages.decode import Decode
from stpm.scoring.stages.heatmaps import WriteHeatmaps, heat_over, jet_palette, overlay, palette_png, written_heatmap
from stpm.scoring.stages.scorer import BatchSize, LoadedModels, Scorer
from tests.conftest import LIMITS, MODELS, TINY, preprocessing_of
from tests.datasets import encoded, make_category

# One model of each kind: a mixed batch has to keep them apart.
KINDS = {"grey": "student and memory", "nut": "student", "screw": "memory"}
CATEGORIES = tuple(KINDS)
PREPROCESSING = dict.fromkeys(CATEGORIES, preprocessing_of(64))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of some categories and a model of each."""
    root = tmp_path_factory.mktemp("run")
    for name in CATEGORIES:
        make_category(str(root / "data"), name, grey=name == "grey", kind="JPEG" if name == "grey" else "PNG")
        store = str(root / "models")
        digest = ModelStore(store).put_teacher(load_teacher(TINY.teacher, TINY.teacher_weights, TINY.levels))
        category = mvtec.read_category(str(root / "data"), name)
        recipe = dataclasses.replace(MODELS[KINDS[name]], validation_share=0.4)
        run_task(FitTask.of(category, recipe, store, digest), LIMITS, lambda told: None)
    return root


def heatmap_writer(
    folder: Path, preprocessing: Mapping[str, Preprocessing] = PREPROCESSING, **options: Any
) -> WriteHeatmaps:
    return WriteHeatmaps(RunOutput.single(str(folder), OutputOptions(**options)), preprocessing)


def manifest(run: Path) -> pa.Table:
    return with_ids([mvtec.read_category(str(run / "data"), name) for name in CATEGORIES])


def with_ids(categories: list[mvtec.Category]) -> pa.Table:
    rows = pa.concat_tables(of_test_images(categories))
    ids = pa.array([image_id(uri) for uri in rows["uri"].to_pylist()], pa.int64())
    return rows.set_column(0, MANIFEST.field("image_id"), ids)


def scorer(run: Path, raw_maps: bool = True) -> Scorer:
    return Scorer(str(run / "models"), 0.3, raw_maps, overlays=True, threads=1)


def scored(run: Path, rows: pa.Table) -> pa.Table:
    return scorer(run)(Decode(PREPROCESSING)(rows))


def _matcher(run: Path, model: Model) -> Matcher:
    record = model.record
    store = ModelStore(str(run / "models"))
    teacher = store.load_teacher(record.recipe.teacher, record.recipe.levels, record.teacher_digest)
    return Matcher(teacher, record.preprocessing, torch.device("cpu"), record.precision)


def test_pixels_travel_on_only_where_something_is_drawn_over_them(run: Path) -> None:
    decoded = Decode(PREPROCESSING)(manifest(run))
    store = str(run / "models")
    kept, dropped = (
        Scorer(store, 0.3, raw_maps=False, overlays=overlays, threads=1)(decoded) for overlays in (True, False)
    )
    assert kept["pixels"].equals(decoded["pixels"])
    assert kept.drop(["pixels"]).equals(dropped.drop(["pixels"]))
    assert set(dropped["pixels"].to_pylist()) == {b""}


def test_image_ids_are_stable_64_bit_and_differ() -> None:
    assert image_id("s3://bucket/a.png") == -520363251256440237
    ids = {image_id(f"file-{i}") for i in range(10_000)}
    assert len(ids) == 10_000
    assert all(-(2**63) <= i < 2**63 for i in ids)


def test_every_row_of_a_mixed_batch_gets_its_own_models_score(run: Path) -> None:
    rows = manifest(run)
    mixed = rows.take(np.random.default_rng(0).permutation(rows.num_rows))
    out = scored(run, mixed).to_pylist()
    store = ModelStore(str(run / "models"))
    for row in out:
        model = store.load(row["category"])
        matcher = _matcher(run, model)
        pixels = decode(storage.read(row["uri"]), PREPROCESSING[row["category"]]).pixels
        whole = np.array([[0, 0, 64, 64]], np.int32)
        inputs = matcher.inputs(torch.from_numpy(pixels[None].copy()))
        distances = matcher.distances(model.parts, matcher.teacher_features(inputs), inputs, whole)
        recipe = model.record.recipe
        (expected,) = matcher.anomaly_maps(distances, whole, recipe.fusing, model.record.part_scales)
        actual = np.frombuffer(row["anomaly_map"], np.float32).reshape(64, 64)
        np.testing.assert_allclose(actual, expected.total, atol=1e-4 * np.abs(expected.total).max())
        highest = np.sort(actual.ravel())[-max(round(recipe.top_fraction * 64 * 64), 1) :]
        assert row["score"] == pytest.approx(highest.mean(), rel=1e-6)
        score = expected.score(recipe.top_fraction)
        for part, known in (("student_score", score.student), ("memory_score", score.memory)):
            assert row[part] == (None if known is None else pytest.approx(known, rel=1e-3, abs=1e-3))
        parts = [row[part] for part in ("student_score", "memory_score") if row[part] is not None]
        assert len(parts) == {"student and memory": 2, "student": 0, "memory": 1}[KINDS[row["category"]]]
        if parts:
            assert sum(parts) == pytest.approx(row["score"], rel=1e-4, abs=1e-5)
        assert row["model_id"] == model.record.model_id
        assert row["is_anomalous"] == (row["score"] > row["threshold"])
        assert row["area"] == pytest.approx((actual > np.float32(row["threshold"])).mean())
        y, x = np.unravel_index(actual.argmax(), actual.shape)
        assert (row["peak_x"], row["peak_y"]) == (int((x + 0.5) * 40 / 64), int((y + 0.5) * 48 / 64))


def test_schemas_are_kept_from_stage_to_stage(run: Path, tmp_path: Path) -> None:
    decoded = Decode(PREPROCESSING)(manifest(run))
    assert decoded.schema.equals(DECODED)
    out = scorer(run)(decoded)
    assert out.schema.equals(SCORED)
    assert heatmap_writer(tmp_path)(out).schema.equals(OUTPUT)
    assert all(field.metadata[b"description"] for field in OUTPUT)


def rows_at(uris: Sequence[str], categories: Sequence[str], places: Sequence[tuple[int, int]] = ()) -> pa.Table:
    """Rows of a manifest: places are start and length in an archive."""
    columns: dict[str, list[Any]] = {
        "image_id": [image_id(uri) for uri in uris],
        "uri": list(uris),
        "category": list(categories),
        "archive_start": [start for start, _ in places] or [0] * len(uris),
        "archive_length": [length for _, length in places] or [-1] * len(uris),
    }
    columns |= {name: [""] * len(uris) for name in ("label", "mask", "error_kind", "error_message")}
    return table(columns, MANIFEST)


def test_what_cannot_be_read_is_a_row_with_its_reason(run: Path, tmp_path: Path) -> None:
    good = storage.read(manifest(run)["uri"][0].as_py())
    contents = {"empty.png": b"", "text.png": b"hello", "cut.jpg": good[: len(good) // 2]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "deep.png").write_bytes(encoded(np.full((9, 9), 40_000, np.uint16)))
    (tmp_path / "dot.png").write_bytes(encoded(np.full((1, 1, 3), 9, np.uint8)))
    names = [*contents, "deep.png", "dot.png", "gone.png"]
    uris = [str(tmp_path / name) for name in names]
    rows = rows_at([*uris, uris[-2]], [*["nut"] * 6, "no/such\nmodel"])
    out = heatmap_writer(tmp_path / "out")(scored(run, rows)).to_pylist()
    assert [row["error_kind"] for row in out] == ["empty", "not_an_image", "damaged", "", "", "missing", "no_model"]
    for row in out:
        failed = bool(row["error_kind"])
        assert bool(row["error_message"]) == failed
        assert (row["score"] is None) == failed
        assert (row["model_id"] == "") == failed
        assert (row["heatmap"] == "") == failed
    assert [(row["width"], row["height"]) for row in out[3:5]] == [(9, 9), (1, 1)]


def test_no_row_ends_a_pass_or_keeps_others_from_being_scored(run: Path, tmp_path: Path) -> None:
    """Names that cannot be, and files that are not what they are named."""
    good = manifest(run)["uri"][0].as_py()
    shutil.copy(good, tmp_path / "secret")
    shutil.copy(good, tmp_path / "pre::fix.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(100 * 2**30)
    Image.new("RGB", (9, 9)).save(tmp_path / "page.eps.png", "EPS")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("empty.png"))
    expected = {
        "secret::z.png": "missing",
        "pre::fix.png": "",
        "a\0b.png": "bad_name",
        "nosuch://a.png": "bad_name",
        "memory://gone::file://z.png": "missing",
        f"{'long' * 100}.png": "missing",
        "folder.png": "missing",
        "pipe.png": "missing",
        "round.png": "missing",
        "huge.png": "too_large",
        "page.eps.png": "not_an_image",
        "a.tar#empty.png": "empty",
        "good.png": "",
    }
    shutil.copy(good, tmp_path / "good.png")
    uris = [name if "://" in name else f"{tmp_path}/{name}" for name in expected]
    rows = rows_at(uris, ["nut"] * len(uris), [(512, 0) if "tar#" in uri else (0, -1) for uri in uris])
    out = scored(run, rows).to_pylist()
    assert {name: row["error_kind"] for name, row in zip(expected, out, strict=True)} == expected
    assert all(row["error_message"] for row in out if row["error_kind"])


def test_a_parquet_file_that_hangs_holds_up_no_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Path(manifest(run)["uri"][0].as_py()).read_bytes()
    for name in ("hangs", "works"):
        storage.publish(f"{tmp_path}/{name}.parquet", storage.parquet(pa.table({"image": pa.array([good, good])})))
    release = threading.Event()
    original = archives.pq.ParquetFile

    def open_parquet(file: Any, **options: Any) -> Any:
        if "hangs.parquet" in str(file):
            release.wait(60)
        return original(file, **options)

    monkeypatch.setattr(archives.pq, "ParquetFile", open_parquet)
    uris = [f"{tmp_path}/{name}.parquet#{row}" for row in range(2) for name in ("hangs", "works")]
    out = Decode(PREPROCESSING, seconds=1.0)(rows_at(uris, ["nut"] * 4, [(0, 1), (0, 1), (1, 1), (1, 1)]))
    release.set()
    assert out["error_kind"].to_pylist() == ["timeout", "", "timeout", ""]


class Expired(MemoryFileSystem):
    """Storage that lets nobody in, or that fails."""

    protocol = "expired"
    error: Exception = PermissionError("the token is expired")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        raise self.error


@pytest.mark.parametrize(
    "error", [PermissionError("no"), OSError("503"), RuntimeError("a client's bug"), UnicodeError("\udcff")]
)
def test_rows_that_storage_failed_are_left_to_the_next_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fsspec.register_implementation("expired", Expired, clobber=True)
    monkeypatch.setattr(Expired, "error", error)
    monkeypatch.setattr(storage, "_PATIENCE", 0.0)
    uris = manifest(run)["uri"].to_pylist()[:3]
    decoded = Decode(PREPROCESSING)(rows_at([uris[0], "expired://a.png", *uris[1:], "/gone.png"], ["nut"] * 5))
    assert decoded["error_kind"].to_pylist() == ["", "unreadable", "", "", "missing"]
    reports: list[Any] = []

    def report(stage: str, statistics: Any, attempted: int, external_errors: Any, unfinished: Any = ()) -> None:
        unfinished = [image[:2] for image in unfinished]
        reports.append((stage, statistics.images, statistics.errors, attempted, len(external_errors), unfinished))

    everything = [uris[0], "expired://a.png", *uris[1:], "/gone.png"]
    Decode(PREPROCESSING, report=cast(Any, report))(rows_at(everything, ["nut"] * 5))
    for accept, rows in ((False, [*uris, "/gone.png"]), (True, everything)):
        stage = Scorer(
            str(run / "models"), 0.3, False, False, threads=1, report=cast(Any, report), accept_errors=accept
        )
        assert stage(decoded)["uri"].to_pylist() == rows
    # Each failure is reported by the stage that it happened in.
    assert reports == [
        ("decode", 0, 0, 5, 2, []),
        ("forward", 5, 2, 3, 0, [("expired://a.png", "unreadable")]),
        ("forward", 5, 2, 3, 0, []),
    ]


def test_a_model_that_storage_did_not_give_is_tried_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = Decode(PREPROCESSING)(manifest(run))
    original = storage.read
    down = {"student", "model.json", "teachers"}

    def read(uri: str, start: int | None = None, end: int | None = None) -> bytes:
        if any(name in uri for name in down):
            raise OSError("503 Slow Down")
        return original(uri, start, end)

    monkeypatch.setattr(storage, "read", read)
    monkeypatch.setattr("stpm.scoring.stages.scorer._TRIED_AGAIN_AFTER", 0.0)
    stage = Scorer(str(run / "models"), 0.3, False, False, threads=1, accept_errors=True)
    for name, kinds in (
        ("model.json", {"model_unreadable"}),
        ("teachers", {"model_unreadable"}),
        ("student", {"", "model_unreadable"}),
        ("", {""}),
    ):
        assert set(stage(decoded)["error_kind"].to_pylist()) == kinds, name
        down.discard(name)


def test_an_image_that_a_forward_pass_fails_on_is_alone_with_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = Decode(PREPROCESSING)(manifest(run))
    original = Matcher.inputs

    def inputs(matcher: Matcher, pixels: torch.Tensor) -> torch.Tensor:
        if (pixels == torch.from_numpy(odd)).flatten(1).all(1).any():
            raise RuntimeError("no such kernel")
        return original(matcher, pixels)

    odd = np.frombuffer(decoded["pixels"][3].as_buffer(), np.uint8).reshape(64, 64, 3).copy()
    monkeypatch.setattr(Matcher, "inputs", inputs)
    stage = Scorer(str(run / "models"), 0.3, False, False, threads=1, accept_errors=True)
    kinds = stage(decoded)["error_kind"].to_pylist()
    assert kinds == ["forward_failed" if i == 3 else "" for i in range(len(kinds))]


def test_a_batch_of_errors_alone_passes_through(run: Path) -> None:
    out = scored(run, manifest(run).slice(0, 2).set_column(2, MANIFEST.field("category"), pa.array(["x", "x"])))
    assert out["error_kind"].to_pylist() == ["no_model", "no_model"]


def test_pictures_are_named_by_id_and_drawn_on_the_models_scale(run: Path, tmp_path: Path) -> None:
    rows = scored(run, manifest(run))
    out = heatmap_writer(tmp_path, overlay=True)(rows).to_pylist()
    store = ModelStore(str(run / "models"))
    for row, before in zip(out, rows.to_pylist(), strict=True):
        name = f"heatmaps/scores/{row['category']}/{row['image_id'] & (2**64 - 1):016x}"
        assert (row["heatmap"], row["overlay"]) == (f"{name}.png", f"{name}_overlay.png")
        with Image.open(tmp_path / row["heatmap"]) as image:
            assert (image.mode, image.size) == ("P", (64, 64))
            levels = np.asarray(image)
        raw = np.frombuffer(row["anomaly_map"], np.float32).reshape(64, 64)
        np.testing.assert_array_equal(levels, store.record(row["category"]).heatmap_scale.apply(raw))
        pixels = np.frombuffer(before["pixels"], np.uint8).reshape(64, 64, 3)
        with Image.open(tmp_path / row["overlay"]) as image:
            # Images of 40 × 48: the shorter side is the model's.
            assert image.size == (64, 77)
            expected = Image.fromarray(overlay(pixels, levels)).resize((64, 77))
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_pictures_may_be_in_their_rows(run: Path, tmp_path: Path) -> None:
    rows = scored(run, manifest(run))
    files = heatmap_writer(tmp_path, overlay=True)(rows).to_pylist()
    inside = heatmap_writer(tmp_path / "no", overlay=True, heatmaps_in="parquet")(rows).to_pylist()
    assert not (tmp_path / "no").exists()
    for one, other in zip(files, inside, strict=True):
        assert (other["heatmap"], other["overlay"]) == ("", "")
        assert other["heatmap_png"] == (tmp_path / one["heatmap"]).read_bytes() == written_heatmap(str(tmp_path), one)
        assert other["overlay_png"] == (tmp_path / one["overlay"]).read_bytes()
        assert written_heatmap("nowhere", other) == other["heatmap_png"]
        assert one["heatmap_png"] is one["overlay_png"] is None


def test_without_pictures_nothing_is_written(run: Path, tmp_path: Path) -> None:
    out = heatmap_writer(tmp_path, heatmaps="none")(scored(run, manifest(run)))
    assert set(out["heatmap"].to_pylist()) == {""}
    assert not list(tmp_path.iterdir())


def test_raw_maps_are_kept_only_when_asked_for(run: Path) -> None:
    decoded = Decode(PREPROCESSING)(manifest(run))
    assert scorer(run, raw_maps=False)(decoded)["anomaly_map"].null_count == decoded.num_rows


def test_the_palette_runs_from_blue_over_green_to_red() -> None:
    palette = jet_palette().astype(int)
    assert palette[0].tolist() == [0, 0, 128]
    assert palette[255].tolist() == [128, 0, 0]
    assert palette[127, 1] == 255
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    with Image.open(io.BytesIO(palette_png(levels))) as image:
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), jet_palette()[levels])


def test_an_overlay_is_half_image_and_half_heatmap(rng: np.random.Generator) -> None:
    pixels, heat = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), rng.integers(0, 256, (4, 4), dtype=np.uint8)
    expected = (pixels.astype(float) + jet_palette()[heat]) / 2
    np.testing.assert_allclose(overlay(pixels, heat), expected, atol=0.5)


def test_a_written_heatmap_goes_over_an_image_of_any_size(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
    heat = np.full((4, 4), 200, np.uint8)
    np.testing.assert_array_equal(
        heat_over(pixels, palette_png(heat)), overlay(pixels, np.full((8, 12), 200, np.uint8))
    )


def test_the_same_image_scores_the_same_in_any_batch(run: Path, tiny: Recipe) -> None:
    rows = manifest(run)
    whole = scored(run, rows)["score"].to_numpy()
    alone = [scored(run, rows.slice(i, 1))["score"][0].as_py() for i in range(rows.num_rows)]
    np.testing.assert_allclose(whole, alone, rtol=1e-4)


@pytest.mark.parametrize("file", ["nut/student.safetensors", "screw/memory.safetensors", "teachers"])
def test_a_damaged_model_makes_its_own_rows_errors_and_no_others(run: Path, tmp_path: Path, file: str) -> None:
    shutil.copytree(run / "models", tmp_path / "models")
    folder, _, name = file.partition("/")
    (damaged,) = (tmp_path / "models" / folder).rglob(name or "*.safetensors")
    damaged.write_bytes(b"x")
    decoded = Decode(PREPROCESSING)(manifest(run))
    store = str(tmp_path / "models")
    out = Scorer(store, 0.3, raw_maps=False, overlays=False, threads=1, accept_errors=True)(decoded).to_pylist()
    broken = set(CATEGORIES) if file == "teachers" else {file.split("/", maxsplit=1)[0]}
    for row in out:
        assert (row["error_kind"] == "model_damaged") == (row["category"] in broken)
        assert (row["score"] is None) == (row["category"] in broken)
        assert ("its SHA-256 is" in row["error_message"]) == (row["category"] in broken)


def test_the_bound_model_scores_and_no_other(run: Path, tmp_path: Path) -> None:
    """Whatever is fitted meanwhile."""
    shutil.copytree(run / "models", tmp_path / "models")
    store = ModelStore(str(tmp_path / "models"))
    bound = {name: store.record(name).model_id for name in CATEGORIES}
    decoded = Decode(PREPROCESSING)(manifest(run))
    scorer = Scorer(store.uri, 0.3, raw_maps=False, overlays=False, threads=1, model_ids=bound)
    before = scorer(decoded.slice(0, 1))
    category = mvtec.read_category(str(run / "data"), "nut")
    recipe = dataclasses.replace(MODELS[KINDS["nut"]], seed=5)
    digest = store.record("nut").teacher_digest
    run_task(FitTask.of(category, recipe, store.uri, digest), LIMITS, lambda told: None)
    assert store.record("nut").model_id != bound["nut"]
    out = pa.concat_tables([before, scorer(decoded.slice(1))]).to_pylist()
    assert {row["category"]: row["model_id"] for row in out} == bound
    assert {row["error_kind"] for row in out} == {""}
    del bound["nut"]
    unbound = Scorer(store.uri, 0.3, raw_maps=False, overlays=False, threads=1, model_ids=bound)
    for row in unbound(decoded).to_pylist():
        assert (row["error_kind"] == "no_model") == (row["category"] == "nut")
        assert ("had no model when this run began" in row["error_message"]) == (row["category"] == "nut")


def test_the_users_own_columns_go_with_their_rows(run: Path, tmp_path: Path) -> None:
    rows = manifest(run)
    rows = rows.append_column("line", pa.array([f"line {i}" for i in range(rows.num_rows)]))
    # Times that no Python object can hold.
    rows = rows.append_column("at", pa.array([2**60] * rows.num_rows, pa.timestamp("s")))
    out = heatmap_writer(tmp_path, heatmaps="none")(scored(run, rows))
    assert out.schema.names == [*OUTPUT.names, "line", "at"]
    assert out["at"].equals(rows["at"])
    lines = dict(zip(rows["uri"].to_pylist(), rows["line"].to_pylist(), strict=True))
    assert all(lines[row["uri"]] == row["line"] for row in out.select(["uri", "line"]).to_pylist())


def test_a_row_that_its_manifest_refused_is_not_read(run: Path) -> None:
    rows = manifest(run).slice(0, 1)
    rows = rows.set_column(5, MANIFEST.field("error_kind"), pa.array(["not_allowed"]))
    (row,) = Decode(PREPROCESSING)(rows).to_pylist()
    assert (row["error_kind"], row["pixels"], row["bytes"]) == ("not_allowed", b"", None)


@pytest.mark.parametrize(("wanted", "expected"), [("all", 8), ("none", 0), ("anomalous", 3)])
def test_pictures_are_of_those_that_are_wanted(run: Path, tmp_path: Path, wanted: Any, expected: int) -> None:
    rows = scored(run, manifest(run).slice(0, 8))
    verdicts = pa.array([i < 3 for i in range(8)])
    rows = rows.set_column(rows.schema.get_field_index("is_anomalous"), SCORED.field("is_anomalous"), verdicts)
    out = heatmap_writer(tmp_path, heatmaps=wanted)(rows).to_pylist()
    assert [bool(row["heatmap"]) for row in out] == [i < expected for i in range(8)]
    assert {row["overlay"] for row in out} == {""}
    assert len(list(tmp_path.rglob("*.png"))) == expected


@pytest.mark.parametrize("fits", [1, 3, 5])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    run: Path, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = Decode(PREPROCESSING)(manifest(run))
    expected = scorer(run)(decoded).to_pylist()
    original, tried = Matcher.features, []

    def small(matcher: Matcher, backbone: Any, inputs: torch.Tensor) -> list[torch.Tensor]:
        tried.append(len(inputs))
        if len(inputs) > fits:
            raise torch.cuda.OutOfMemoryError(f"{len(inputs)} images")
        return original(matcher, backbone, inputs)

    monkeypatch.setattr(Matcher, "features", small)
    out = Scorer(str(run / "models"), 0.3, raw_maps=False, overlays=False, threads=1)(decoded).to_pylist()
    assert max(tried) > fits
    for row, other in zip(out, expected, strict=True):
        assert row["error_kind"] == ""
        assert row["score"] == pytest.approx(other["score"], rel=1e-3)


def test_an_image_that_alone_is_too_much_is_an_error_row(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = Decode(PREPROCESSING)(manifest(run).slice(0, 3))

    def never(matcher: Matcher, backbone: Any, inputs: torch.Tensor) -> list[torch.Tensor]:
        raise torch.cuda.OutOfMemoryError("no memory at all")

    monkeypatch.setattr(Matcher, "features", never)
    stage = Scorer(str(run / "models"), 0.3, raw_maps=False, overlays=False, threads=1, accept_errors=True)
    for row in stage(decoded).to_pylist():
        assert (row["error_kind"], row["score"]) == ("out_of_memory", None)
        assert row["error_message"] == "OutOfMemoryError: no memory at all"


def batches_of(speeds: dict[int, float], wanted: int = 0, grows: bool = True) -> int:
    """Where the size settles if a batch of n runs at speeds[n] images per second."""
    batch = BatchSize(wanted, grows)
    for _ in range(40):
        batch.ran(batch.now, batch.now / speeds[batch.now])
    return batch.now


def test_the_batch_grows_while_that_is_faster() -> None:
    assert batches_of({16: 100.0, 32: 190.0, 64: 300.0, 128: 305.0}) == 64
    assert batches_of({16: 100.0, 32: 90.0}) == 16
    assert batches_of({16: 1.0, 32: 2.0, 64: 4.0, 128: 8.0, 256: 16.0}) == 256
    assert batches_of({16: 1.0}, grows=False) == 16
    assert batches_of({5: 1.0}, wanted=5) == 5


def test_the_models_used_last_are_kept_within_the_budget(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, loaded = ModelStore(str(run / "models")), []
    original = ModelStore.load
    monkeypatch.setattr(ModelStore, "load", lambda self, name, of: loaded.append(name) or original(self, name, of))
    records = {name: store.record(name) for name in CATEGORIES}
    roomy = LoadedModels(store, torch.device("cpu"), 2**30)
    for name in ("nut", "grey", "screw", "nut", "grey", "screw"):
        assert roomy.get(records[name]).record.category == name
    assert loaded == ["nut", "grey", "screw"]
    loaded.clear()
    tight = LoadedModels(store, torch.device("cpu"), 1)
    for name in ("nut", "nut", "grey", "nut", "screw", "nut"):
        assert tight.get(records[name]).record.category == name
    assert loaded == ["nut", "grey", "nut", "screw", "nut"]
    loaded.clear()
    without_one = LoadedModels(store, torch.device("cpu"), sum(store.load(n, "").parts.nbytes for n in CATEGORIES) - 1)
    loaded.clear()
    for name in ("nut", "grey", "screw", "grey", "nut"):
        assert without_one.get(records[name]).record.category == name
    assert loaded == ["nut", "grey", "screw", "nut"]


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_member_of_an_archive_scores_as_the_file_does(run: Path, tmp_path: Path, memory: str, place: str) -> None:
    files = manifest(run).slice(0, 8)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for uri in files["uri"].to_pylist():
            data = storage.read(uri)
            info = tarfile.TarInfo(f"grey/#{uri.rsplit('/', 1)[1]}" if "good" in uri else f"grey/{Path(uri).name}.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        archive.addfile(tarfile.TarInfo("grey/000.json"))
    out = f"{tmp_path if place == 'local' else memory}/shards/0.tar"
    storage.publish(out, sink.getvalue())
    (members,) = rows_of([out.rsplit("/", 1)[0]], Categories(pattern="{category}/{name}"))
    assert members.num_rows == 8
    assert set(members["category"].to_pylist()) == {"grey"}
    members = members.set_column(2, MANIFEST.field("category"), files["category"])
    for ours, theirs in zip(scored(run, members).to_pylist(), scored(run, files).to_pylist(), strict=True):
        assert (ours["error_kind"], ours["bytes"]) == ("", theirs["bytes"])
        assert ours["score"] == theirs["score"]
        assert ".tar#grey/" in ours["uri"]


@pytest.mark.parametrize(("resize", "shape"), [("fit", (19, 48)), ("crop", (64, 48)), ("stretch", (64, 48))])
def test_images_of_other_proportions_are_scored_on_what_they_show(
    tmp_path: Path, any_model: Recipe, resize: Resize, shape: tuple[int, int]
) -> None:
    """Images of 80 × 32 in an input of 64 × 48, height by width."""
    make_category(str(tmp_path / "data"), "long", shape=(32, 80))
    store = str(tmp_path / "models")
    digest = ModelStore(store).put_teacher(load_teacher(TINY.teacher, TINY.teacher_weights, TINY.levels))
    category = mvtec.read_category(str(tmp_path / "data"), "long")
    recipe = dataclasses.replace(any_model, size=Size("64x48"), resize=resize)
    record = run_task(FitTask.of(category, recipe, store, digest), LIMITS, lambda told: None).record
    assert record
    preprocessing = {"long": record.preprocessing}
    decoded = Decode(preprocessing)(with_ids([category]))
    rows = Scorer(store, 0.3, True, overlays=True, threads=1)(decoded)
    out = heatmap_writer(tmp_path, preprocessing, overlay=True)(rows).to_pylist()
    # A crop of the input's proportions is the middle 24 of 80 columns.
    left, across = (28, 24) if resize == "crop" else (0, 80)
    for row in out:
        assert row["error_kind"] == ""
        with Image.open(tmp_path / row["heatmap"]) as image:
            assert image.size == shape[::-1]
            levels = np.asarray(image)
        raw = np.frombuffer(row["anomaly_map"], np.float32).reshape(shape)
        np.testing.assert_array_equal(levels, record.heatmap_scale.apply(raw))
        highest = np.sort(raw.ravel())[-max(round(recipe.top_fraction * raw.size), 1) :]
        assert row["score"] == pytest.approx(highest.mean(), rel=1e-6)
        y, x = np.unravel_index(raw.argmax(), raw.shape)
        expected = left + int((x + 0.5) * across / 48), int((y + 0.5) * 32 / shape[0])
        assert (row["peak_x"], row["peak_y"]) == expected
        with Image.open(tmp_path / row["overlay"]) as image:
            assert image.size[0] / image.size[1] == pytest.approx(across / 32, rel=0.03)
