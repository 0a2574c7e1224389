from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from PIL import Image

from stpm import storage
from stpm.data.heatmaps import overlay
from stpm.method.calibration import threshold
from stpm.method.regions import find_regions
from stpm.models.store import ModelStore
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows
from tests.datasets import with_column, write_rows
from tests.scoring.inputs.helpers import rows as list_rows
from tests.scoring.stages.helpers import PREPROCESSING, decode, manifest, score, scorer, write_heatmaps


def test_heatmaps_are_named_by_id_and_drawn_on_the_models_scale_to_files_or_parquet(run: Path, tmp_path: Path) -> None:
    rows = score(run, manifest(run))
    out = write_heatmaps(rows, tmp_path, overlays=True).to_pylist()
    inside = write_heatmaps(rows, tmp_path / "no", overlays=True, heatmaps_in="parquet").to_pylist()
    assert not (tmp_path / "no").exists()
    for one, other in zip(out, inside, strict=True):
        assert (other["heatmap"], other["overlay"]) == ("", "")
        assert other["heatmap_png"] == (tmp_path / one["heatmap"]).read_bytes()
        assert other["overlay_jpeg"] == (tmp_path / one["overlay"]).read_bytes()
        assert one["heatmap_png"] is one["overlay_jpeg"] is None
    store = ModelStore(str(run / "models"))
    for row, before in zip(out, rows.to_pylist(), strict=True):
        image_id = f"{row['image_id'] & (2**64 - 1):016x}"
        name = f"heatmaps/scores/{row['category']}/{image_id[:2]}/{image_id}"
        assert (row["heatmap"], row["overlay"]) == (f"{name}.png", f"{name}_overlay.jpg")
        with Image.open(tmp_path / row["heatmap"]) as image:
            assert (image.mode, image.size) == ("P", (64, 64))
            levels = np.asarray(image)
        raw = np.frombuffer(row["anomaly_map"], np.float32).reshape(64, 64)
        np.testing.assert_array_equal(levels, store.record(row["category"]).heatmap_scale.apply(raw))
        pixels = np.frombuffer(before["pixels"], np.uint8).reshape(64, 64, 3)
        with Image.open(tmp_path / row["overlay"]) as image:
            # Images of 40 × 48: the shorter side is the model's.
            assert image.size == (64, 77)
            assert image.format == "JPEG"
            expected = np.asarray(Image.fromarray(overlay(pixels, levels)).resize((64, 77)), float)
            # JPEG changes the pixels: of these, which are drawn at random, by four grey levels in the mean at most.
            assert np.abs(np.asarray(image) - expected).mean() < 4


def test_regions_are_those_of_the_map_and_masks_are_drawn_of_images_that_have_any(run: Path, tmp_path: Path) -> None:
    rows = scorer(run, raw_maps=True, masks=True, region_rate=0.5)(decode(manifest(run)))
    files = write_heatmaps(rows, tmp_path, "none")
    inside = write_heatmaps(rows, tmp_path / "no", "none", heatmaps_in="parquet")["region_mask_png"].to_pylist()
    store, found = ModelStore(str(run / "models")), 0
    for row, png in zip(files.to_pylist(), inside, strict=True):
        largest = np.sort(store.calibration_scores(store.record(row["category"]))["max_pixel"].to_numpy())
        raw = np.frombuffer(row["anomaly_map"], np.float32).reshape(64, 64)
        assert row["pixel_threshold"] == threshold(largest, 0.5)
        regions, count, _ = find_regions(raw, row["pixel_threshold"], PREPROCESSING["nut"], 40, 48)
        assert (row["region_count"], row["regions"]) == (count, [pytest.approx(each._asdict()) for each in regions])
        assert bool(row["region_mask"]) == bool(png) == (count > 0)
        found += count > 0
        if count:
            assert (tmp_path / row["region_mask"]).read_bytes() == png
            with Image.open(tmp_path / row["region_mask"]) as image:
                np.testing.assert_array_equal(np.asarray(image), 255 * (raw > np.float32(row["pixel_threshold"])))
    assert 0 < found < len(inside)
    write_rows(output := RunOutput.single(str(tmp_path)), files)
    query = "SELECT uri, unnest(regions, recursive := true) FROM read_parquet(?)"
    read = open_rows(output, ["uri", "regions"]).to_table(columns=["uri", "regions"]).to_pylist()
    expected = [(row["uri"], *region.values()) for row in read for region in row["regions"]]
    assert sorted(duckdb.execute(query, [f"{output.scores}/*.parquet"]).fetchall()) == sorted(expected)


@pytest.mark.parametrize(("heatmaps", "expected"), [("all", 8), ("none", 0), ("anomalous", 3)])
def test_only_the_wanted_images_have_heatmaps(run: Path, tmp_path: Path, heatmaps: Any, expected: int) -> None:
    rows = with_column(score(run, manifest(run).slice(0, 8)), "is_anomalous", [i < 3 for i in range(8)])
    out = write_heatmaps(rows, tmp_path, heatmaps).to_pylist()
    assert [bool(row["heatmap"]) for row in out] == [i < expected for i in range(8)]
    assert {row["overlay"] for row in out} == {""}
    # Ray's metrics refuse the name of such a category.
    named = with_column(rows, "category", ["größer"] * 8)
    assert write_heatmaps(named, tmp_path, "none")["category"].unique().to_pylist() == ["größer"]
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == expected


def test_pictures_that_a_run_drew_are_not_scored(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = score(run, manifest(run))
    images, link = tmp_path / "images", tmp_path / "link"
    for name in ("a.png", "ab/b.jpg", "heatmaps/scores/nut/c.png", "heatmaps/ab/0123456789abcdef.png"):
        storage.publish(f"{images}/{name}", b"x")
    link.symlink_to(images)
    sources = [str(images), f"{images}/*", f"{images}/**", f"{tmp_path}/im*", "images", str(link), f"{link}/**/*"]
    monkeypatch.chdir(tmp_path)

    def listed() -> list[list[str]]:
        return [[row["uri"] for row in list_rows(source)] for source in sources]

    before = listed()
    assert [len(uris) for uris in before] == [4] * len(sources)
    for out in (images / "tonight", images / "ab", images):
        out_rows = write_heatmaps(rows, out, overlays=True)
        assert len(out_rows) == len(list(out.glob("heatmaps/scores/*/*/*.jpg")))
    assert listed() == before
