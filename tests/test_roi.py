"""What lies outside of a region of interest changes nothing, and nothing there is found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter

import stpm
from stpm import storage
from stpm.data import mvtec
from stpm.data.decoding import decode, decode_picture
from stpm.data.heatmaps import read_shown, resize_map
from stpm.data.masks import decode_mask, read_mask
from stpm.data.rois import parse_roi, read_roi
from stpm.errors import ConfigError, DataError, ImageError
from stpm.evaluation.category import ScoredCategory, read_scores
from stpm.evaluation.report import Report
from stpm.fitting.fit_categories import read_categories
from stpm.fitting.options import FitOptions, WorkerOptions
from stpm.jobs.fit import run_fit
from stpm.line.feedback import add_good, read_marks
from stpm.method.anomaly_maps import AnomalyMaps, cut_out
from stpm.method.preprocessing import Content, Preprocessing, Resize, unpack
from stpm.method.recipe import Recipe
from stpm.method.roi import Roi
from stpm.metrics.category_metrics import measure_category
from stpm.metrics.pixel_metrics import count_pixels
from stpm.models.record import ModelRecord
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.manifest import labelled_rows
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.output import RunOutput
from stpm.scoring.stages.decode import Decode
from tests.conftest import MODELS, make_preprocessing
from tests.datasets import encode_image, make_category, write_rows
from tests.evaluation.runs import result
from tests.scoring.stages.helpers import current_models, fit, scorer, write_heatmaps

SHAPE = (48, 40)
# The defects of `make_category` are in rows 10 to 26 and columns 8 to 24: half of each is inspected.
MASK = np.zeros(SHAPE, bool)
MASK[4:18, 6:34] = True
MASK[:9, 20:34] = False


def put_roi(root: Path, mask: np.ndarray = MASK, path: str = "roi.png") -> None:
    storage.publish(str(root / "data/nut" / path), encode_image(mask.astype(np.uint8) * 255))


def change_outside(root: Path, mask: np.ndarray = MASK) -> None:
    """Give all pixels outside of the mask other values, in all images of a data set."""
    rng = np.random.default_rng(7)
    for file in [*root.glob("data/nut/t*/*/*.png")]:
        pixels = np.asarray(Image.open(file)).copy()
        pixels[~mask] = rng.integers(0, 255, pixels[~mask].shape, dtype=np.uint8)
        file.write_bytes(encode_image(pixels))


def score(root: Path) -> pa.Table:
    """Score the labelled images as the stages of the score job do."""
    rows = pa.concat_tables(labelled_rows([mvtec.read_category(str(root / "data"), "nut")]))
    return scorer(root, raw_maps=True, overlays=True)(Decode({"nut": record(root).preprocessing})(rows))


def record(root: Path) -> ModelRecord:
    return current_models(ModelStore(str(root / "models")))["nut"]


@pytest.mark.parametrize("resize", ["stretch", "fit", "crop"])
def test_pixels_outside_change_no_model_no_row_and_no_metric(tmp_path: Path, any_model: Recipe, resize: Resize) -> None:
    found = []
    for root in (tmp_path / "one", tmp_path / "two"):
        make_category(str(root / "data"), "nut", train=8)
        put_roi(root)
        if found:
            change_outside(root)
        fit(root, "nut", dataclasses.replace(any_model, resize=resize))
        rows = score(root)
        drawn = write_heatmaps(
            rows, root / "run", overlays=True, heatmaps_in="parquet", preprocessing={"nut": record(root).preprocessing}
        )
        write_rows(output := RunOutput.single(str(root / "run")), drawn)
        scores = read_scores(ScoredCategory(output, "nut", record(root).preprocessing))
        metrics = measure_category(scores)
        model = record(root)
        files = {name: file for name, file in model.files.items() if name not in ("fit.html", "history.parquet")}
        columns = [name for name in drawn.column_names if name not in ("image_id", "uri", "mask", "bytes")]
        found.append(((model.model_id, model.scored_by, files), drawn.select(columns).to_pylist(), metrics.values))
    assert found[0] == found[1]
    maps = [np.frombuffer(row["anomaly_map"], np.float32) for row in found[0][1]]
    assert all(0.1 < np.isnan(each).mean() < 0.9 for each in maps)
    # Half of each defect is seen, and the model can find it.
    assert found[0][2]["pixel_auroc"] is not None


def test_an_image_has_a_region_of_its_own(tmp_path: Path) -> None:
    make_category(str(tmp_path / "data"), "nut", train=8, good=1, defects=2)
    own = np.zeros(SHAPE, bool)
    # Inside of the box around the other.
    own[9:16, 6:16] = True
    put_roi(tmp_path)
    for path in ("train/good/003", "test/square/001"):
        put_roi(tmp_path, own, f"roi/{path}.png")
    category = mvtec.read_category(str(tmp_path / "data"), "nut")
    assert category.roi
    assert (category.roi.mask == MASK).all()
    assert [image for image, *_ in category.rois] == [category.train[3][0]]
    # Not in the list of good images, nor of test images.
    assert (len(category.train), len(category.test)) == (8, 3)
    fit(tmp_path, "nut", MODELS["student and memory"])
    rows = score(tmp_path).to_pylist()
    assert [bool(row["roi"]) for row in rows] == [False, False, True]
    for row in rows:
        mask = own if row["roi"] else MASK
        assert mask[row["peak_y"], row["peak_x"]]
    # As in a table with a column `roi`.
    table = tmp_path / "data/table.jsonl"
    image = {"uri": "nut/test/square/001.png", "category": "nut", "roi": "nut/roi/test/square/001.png"}
    table.write_text(json.dumps(image) + "\n" + json.dumps(image | {"uri": "nut/test/square/000.png", "roi": "no.png"}))
    listed = pa.concat_tables(image_rows([str(table)], CategoryRule()))
    first, second = scorer(tmp_path)(Decode({"nut": record(tmp_path).preprocessing})(listed)).to_pylist()
    assert first["score"] == pytest.approx(rows[2]["score"], rel=1e-5)
    assert (second["error_kind"], "no.png" in second["error_message"]) == ("missing", True)


def test_a_change_of_the_region_fits_again(tmp_path: Path, fitted_keys: list[str]) -> None:
    make_category(str(tmp_path / "data"), "nut", train=8)

    def run(**options: str) -> Roi | None:
        fitted_keys.clear()
        options_ = FitOptions(data=str(tmp_path / "data"), models=str(tmp_path / "models"), **options)
        assert run_fit(options_, MODELS["student"], WorkerOptions(), ClusterOptions(backend="pytorch")) == 0
        return record(tmp_path).preprocessing.roi

    assert (run(), len(fitted_keys)) == (None, 1)
    put_roi(tmp_path)
    found = run()
    assert found
    assert (found.mask == MASK).all()
    assert fitted_keys
    run()
    assert not fitted_keys
    polygon = run(roi="0,0 40,0 40,20 0,20")
    assert polygon
    assert polygon.mask[:20].all()
    assert not polygon.mask[21:].any()
    put_roi(tmp_path, MASK, "roi/train/good/001.png")
    run(roi="0,0 40,0 40,20 0,20")
    assert fitted_keys


def test_a_region_of_another_size_is_an_error_that_says_both(tmp_path: Path) -> None:
    make_category(str(tmp_path / "data"), "nut", train=8)
    put_roi(tmp_path, np.ones((50, 40), bool))
    with pytest.raises(AssertionError):
        fit(tmp_path, "nut", MODELS["student"])
    put_roi(tmp_path)
    fit(tmp_path, "nut", MODELS["student"])
    other = encode_image(np.zeros((44, 40, 3), np.uint8))
    storage.publish(str(tmp_path / "data/nut/test/good/000.png"), other)
    row = score(tmp_path).to_pylist()[0]
    assert row["error_kind"] == "other_size"
    assert "the image is 40×44, its region of interest 40×48" in row["error_message"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no.png", "no such file"),
        ("0,0 40,0", "has 2 points; a polygon needs three or more"),
        ("0,0 40,0 90,90", "the point 90,90 is outside of the images, which are 40×48"),
        ("0,0 1,,1 3,4", "is no polygon"),
        (";", "no pixel is inside"),
        ("black.png", "no pixel is inside; white pixels"),
    ],
)
def test_what_is_no_region_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("black.png").write_bytes(encode_image(np.zeros(SHAPE, np.uint8)))
    make_category("data", "nut", train=3)
    categories, failures = read_categories(str(tmp_path / "data"), [], roi=text)
    assert not categories
    assert message in failures["nut"]
    assert repr(text) in failures["nut"]


def test_a_person_gives_a_region_in_python(tmp_path: Path) -> None:
    make_category(str(tmp_path), "nut", train=8, defects=1)
    put = tmp_path / "mask.png"
    put.write_bytes(encode_image(MASK.astype(np.uint8)))
    good = tmp_path / "nut/train/good"
    one, other = (stpm.fit(good, MODELS["memory"], roi=roi, backend="pytorch", progress=False) for roi in (MASK, put))
    result, same = (each.score(tmp_path / "nut/test/square/000.png") for each in (one, other))
    assert result.score == same.score
    assert np.isnan(result.anomaly_map[~MASK]).mean() > 0.9
    assert not np.isnan(result.anomaly_map[MASK]).mean() > 0.1
    assert not result.heatmap()[20:].any()
    one.save(tmp_path / "models", "nut")
    loaded = stpm.load(tmp_path / "models", "nut", backend="pytorch")
    assert loaded.score(tmp_path / "nut/test/square/000.png").score == result.score
    assert loaded.evaluate(tmp_path / "nut/test").values == one.evaluate(tmp_path / "nut/test").values
    with pytest.raises(ConfigError, match="no pixel is inside"):
        stpm.fit(good, roi=np.zeros(SHAPE, bool))
    with pytest.raises(DataError, match="the point 90,90 is outside of the images, which are 40×48"):
        stpm.fit(good, roi="0,0 40,0 90,90")
    corners = stpm.fit(good, MODELS["memory"], roi="6,4 19,4 19,9 33,9 33,17 6,17", progress=False)
    assert corners.roi == parse_roi("6,4 19,4 19,9 33,9 33,17 6,17", tmp_path / "nut/test/square/000.png")


masks = st.builds(
    lambda seed, sigma, quantile: (
        (noise := gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), sigma))
        >= np.quantile(noise, quantile)
    ),
    st.integers(0, 2**32),
    st.floats(0, 9),
    st.floats(0, 1),
)


@given(masks, st.sampled_from(["stretch", "fit", "crop"]), st.integers(0, 2**32))
def test_decoding_sees_nothing_outside(mask: np.ndarray, resize: Resize, seed: int) -> None:
    rng = np.random.default_rng(seed)
    preprocessing: Preprocessing = dataclasses.replace(make_preprocessing(32, 64, resize), roi=Roi.of_mask(mask))
    one = rng.integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
    other = np.where(mask[:, :, None], one, rng.integers(0, 256, one.shape, dtype=np.uint8))
    try:
        first, second = (decode(Image.fromarray(pixels), preprocessing) for pixels in (one, other))
    except ImageError as error:
        # All of it is cropped away.
        left, top, right, bottom = map(int, preprocessing.source_box(40, 48))
        assert error.kind == "other_size"
        assert not mask[top:bottom, left:right].any()
        return
    np.testing.assert_array_equal(first.pixels, second.pixels)
    assert (first.statistics, first.inspected) == (second.statistics, second.inspected)
    inside = unpack(first.inspected, preprocessing.input_shape)
    assert inside.any()
    left, top, right, bottom = preprocessing.content_box(40, 48)
    inside[top:bottom, left:right] = False
    assert not inside.any()


@given(st.integers(0, 2**32), st.sampled_from([0.1, 0.9]), st.sampled_from([0.0, 2.0]), st.floats(0, 1))
def test_scores_of_maps_are_those_of_their_inspected_pixels(seed: int, share: float, sigma: float, top: float) -> None:
    """One image of a batch has padding, one has an area, one has both."""
    rng = np.random.default_rng(seed)
    total = rng.normal(size=(3, 13, 17)).astype(np.float32)
    boxes = np.array([(3, 0, 12, 13), (0, 0, 17, 13), (0, 4, 17, 9)], np.int32)
    inside = np.zeros(total.shape, bool)
    for mask, (left, t, right, bottom) in zip(inside, boxes, strict=True):
        mask[t:bottom, left:right] = True
    inside[1:] &= rng.random((2, 13, 17)) > share
    inside[1:, 6, 5] = True
    content = Content(boxes, [b"", *(np.packbits(mask).tobytes() for mask in inside[1:])])
    views = torch.from_numpy(rng.normal(size=(2, 3, 13, 17)).astype(np.float32))
    whole, other = (
        AnomalyMaps.smooth(torch.from_numpy(values), views, content, sigma)
        for values in (total, np.where(inside, total, 99).astype(np.float32))
    )
    np.testing.assert_array_equal(whole.total, other.total)
    assert (whole.total.isnan().numpy() == ~inside).all()
    for i, (row, image, mask, box) in enumerate(
        zip(whole.scalars(top), whole.total.numpy(), inside, boxes, strict=True)
    ):
        order = np.argsort(-image[mask], kind="stable")[: max(round(top * mask.sum()), 1)]
        means = [values[mask][order].mean(dtype=np.float64) for values in (image, *views[:, i].numpy())]
        expected = [image[mask].max(), np.flatnonzero(mask)[order[0]], means[0]]
        assert row[:3].tolist() == pytest.approx(expected)
        if not (box - (0, 0, 17, 13)).any():
            assert row[3:].tolist() == pytest.approx(means[1:])
        # Each image alone has the same numbers.
        alone = AnomalyMaps.smooth(whole.total[i : i + 1], whole.views[:, i : i + 1], content[i : i + 1], 0.0)
        assert alone.scalars(top).tolist() == [row.tolist()]
    assert len(whole.inspected_values()) == inside.sum()
    # What a device has computed wrongly does not pass for good.
    total[0, 5, 5] = rng.choice([np.inf, np.nan])
    broken = AnomalyMaps.smooth(torch.from_numpy(total), views, content, sigma).scalars(top)[0, 2].item()
    assert broken > 1e20 or np.isnan(broken)
    for image, box in zip(whole.total.numpy(), boxes, strict=True):
        left, t, right, bottom = box
        np.testing.assert_array_equal(cut_out(image, box), image[t:bottom, left:right])
    # Pixels that are not inspected are not counted.
    mask = rng.random(total.shape[1:]) < 0.5
    counts = count_pixels([whole.total[1].numpy()], [mask])
    assert counts.sums[:2].sum(axis=1).tolist() == [(~mask & inside[1]).sum(), (mask & inside[1]).sum()]
    assert (np.isnan(resize_map(whole.total[1].numpy(), 26, 34)) == ~inside[1].repeat(2, 0).repeat(2, 1)).mean() > 0.7


def test_pictures_for_people_are_paler_outside() -> None:
    pixels = np.full((*SHAPE, 3), 100, np.uint8)
    preprocessing = dataclasses.replace(make_preprocessing(64), roi=Roi.of_mask(MASK))
    shown = decode_picture(encode_image(pixels), preprocessing, 14, 28)
    # The box around the region, of 28 x 14 pixels.
    assert shown[10, 4].tolist() == [100] * 3
    assert shown[1, 24].tolist() == [208] * 3


def test_polygons_and_files_are_read_alike(tmp_path: Path) -> None:
    image, file = tmp_path / "image.png", tmp_path / "mask.png"
    image.write_bytes(encode_image(np.zeros((*SHAPE, 3), np.uint8)))
    file.write_bytes(encode_image(MASK.astype(np.uint8) * 255))
    drawn = parse_roi("6,4 19,4 19,9 33,9 33,17 6,17", str(image))
    assert drawn == parse_roi(str(file), str(image))
    two = parse_roi("6,4 19,4 19,9 33,9 33,17 6,17; 0,40 5,40 5,47", str(image)).mask
    assert (two[:20] == MASK[:20]).all()
    assert two[40, 2]


def test_people_and_jobs_see_alike_an_image_with_a_region_of_its_own(tmp_path: Path) -> None:
    """In evaluation, in feedback, and in pictures of what the model sees."""
    make_category(str(tmp_path / "data"), "nut", train=8, good=4, defects=2)
    put_roi(tmp_path, np.ones(SHAPE, bool))
    # The defects are not inspected.
    own = np.zeros(SHAPE, bool)
    own[30:] = True
    for name in ("000", "001"):
        put_roi(tmp_path, own, f"roi/test/square/{name}.png")
    fit(tmp_path, "nut", MODELS["memory"])
    preprocessing = record(tmp_path).preprocessing
    drawn = write_heatmaps(
        score(tmp_path), tmp_path / "run", heatmaps_in="parquet", preprocessing={"nut": preprocessing}
    )
    write_rows(output := RunOutput.single(str(tmp_path / "run")), drawn)
    of_jobs, at_original = (
        measure_category(read_scores(ScoredCategory(output, "nut", preprocessing), masks_at))
        for masks_at in ("model", "original")
    )
    of_detector = stpm.load(tmp_path / "models", "nut", backend="pytorch").evaluate(
        tmp_path / "data/nut/test", false_alarm_rate=0.3
    )
    assert of_detector.values["image_auroc"] == pytest.approx(of_jobs.values["image_auroc"])
    masks = tuple(f"{tmp_path}/data/nut/ground_truth/square/{name}_mask.png" for name in ("000", "001"))
    for metrics in (of_jobs, at_original, of_detector):
        assert (metrics.defect_count, metrics.outside_masks, metrics.vanished_masks) == (2, masks, ())
    made = dataclasses.replace(result("nut", 0, 1.0, 1.0), metrics=of_jobs)
    (note,) = (line for line in Report("data", [made]).notes if "outside" in line)
    assert note.startswith("nut: 2 of 2 defects lie wholly outside of what is inspected; recall and image")
    row = drawn.to_pylist()[-1]
    shown = read_shown(row, output.folder, preprocessing, 512, 1024)
    assert shown
    assert shown[0].shape[1] / shown[0].shape[0] == pytest.approx(40 / 48, rel=0.02)
    marks = tmp_path / "data/marks.jsonl"
    marks.write_text(json.dumps({name: row[name] for name in ("uri", "category", "roi")} | {"label": "good"}))
    store = ModelStore(str(tmp_path / "models"))
    assert add_good(store, read_marks(str(marks)), 0.1, "pytorch", wait=False) == (1, 0)
    calibration = store.calibration_scores(record(tmp_path))
    assert calibration.filter(calibration["is_added"])["score"].to_pylist() == pytest.approx([row["score"]], rel=1e-4)


@pytest.mark.parametrize("others", ["a block", "nothing"])
def test_a_defect_on_a_line_of_a_pixel_or_two_is_seen(tmp_path: Path, others: str) -> None:
    shape = (256, 256)
    rng = np.random.default_rng(0)
    for name in [*(f"train/good/{i}" for i in range(8)), "test/good/0", "test/square/0"]:
        pixels = rng.integers(90, 130, (*shape, 3), dtype=np.uint8)
        if "square" in name:
            pixels[196:216, 100:140] = rng.integers(0, 255, (20, 40, 3))
        storage.publish(str(tmp_path / f"data/nut/{name}.png"), encode_image(pixels))
    mask = np.zeros(shape, bool)
    mask[202:208] = mask[255, 255] = mask[0, 0] = True
    mask[:100] |= others == "a block"
    put_roi(tmp_path, mask)
    fit(tmp_path, "nut", MODELS["student and memory"])
    good, defect = (
        np.frombuffer(row["anomaly_map"], np.float32).reshape(64, 64) for row in score(tmp_path).to_pylist()
    )
    assert np.nanmax(defect[48:54, 26:34]) > np.nanmax(good)


def test_a_mask_may_be_a_jpeg_or_of_zeros_and_ones(tmp_path: Path) -> None:
    y, x = np.mgrid[:256, :256]
    mask = (y - 128) ** 2 + (x - 128) ** 2 < 50**2
    (tmp_path / "a.jpg").write_bytes(encode_image(mask.astype(np.uint8) * 255, "JPEG"))
    (tmp_path / "b.png").write_bytes(encode_image(mask.astype(np.uint8)))
    assert (read_roi(str(tmp_path / "a.jpg")).mask == mask).mean() > 0.995
    assert (read_roi(str(tmp_path / "b.png")).mask == mask).all()
    with pytest.raises(ConfigError, match=r"shape \(2, 2, 3\); give one value for each pixel"):
        Roi.of_mask(np.ones((2, 2, 3), bool))


def test_a_mask_in_colours_is_refused(tmp_path: Path) -> None:
    """Red is darker than green, but no black: all of the image would be inspected."""
    file = str(tmp_path / "mask.png")
    Image.fromarray(np.where(MASK[..., None], (0, 255, 0), (255, 0, 0)).astype(np.uint8)).save(file)
    with pytest.raises(ImageError, match=r"mask\.png: it has levels from 76 to 150; save it in black and white"):
        read_roi(file)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_mask_with_transparent_parts_is_refused(tmp_path: Path, mode: str) -> None:
    mask, file = MASK.astype(np.uint8) * 255, tmp_path / "mask.png"
    image = Image.fromarray(mask).convert("RGBA")
    (image.quantize() if mode == "P" else image.convert(mode)).save(file)
    assert (read_roi(str(file)).mask == MASK).all()
    assert (decode_mask(file.read_bytes()) == MASK).all()
    # White that was erased, as some programs save it.
    image = Image.new("RGBA", image.size, "white")
    image.putalpha(Image.fromarray(mask))
    (image.quantize() if mode == "P" else image.convert(mode)).save(file)
    with pytest.raises(ImageError, match=r"mask\.png: a part is transparent; save it in black and white"):
        read_roi(str(file))
    with pytest.raises(DataError, match=r"^mask .*mask\.png cannot be read: a part is transparent; save it in"):
        read_mask("x.png", "dent", str(file), *image.size)
