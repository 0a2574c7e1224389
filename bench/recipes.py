"""What a recipe's choices do, on several products, and what choosing by the others' figures gives on each of them.

    python bench/recipes.py --data DATA --seeds 0,1,2 --out FILE.jsonl 'student=none' 'epochs=10' \\
        --variants '' 'memory=0' 'student=none' 'top_fraction=0'

Each choice is a change to preset `default`, fitted once for each category and seed, in one process and without Ray. A
variant changes how the parts of that fit are fused, and leaves parts out: it needs no fit of its own. One JSON line per
fit goes to FILE (what it holds already is not done again): seconds, validation loss, and for each variant image AUROC,
pixel AUROC and AUPRO. `drawn` are faint scratches and displaced patches painted on held-out good images at their own
resolution: it needs no label. `real` are the test images. Then two tables: the means over seeds, and for each category
the figure of the choice that is best on all others.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFilter
from sklearn.metrics import roc_auc_score
from tabulate import tabulate

from stpm import storage
from stpm.data import images, mvtec
from stpm.data.encode import encode_png
from stpm.evaluation.category_metrics import AUPRO_LIMITS
from stpm.evaluation.pixels import PixelCounts, count_pixels
from stpm.fitting.calibrate import make_parts
from stpm.fitting.coreset import build_memory
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import fit, split
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.backbones import load_backbone, load_teacher_weights
from stpm.method.calibration import fit_part_scale
from stpm.method.forward import Distances, Matcher, Parts, pick_device, resolve_precision
from stpm.method.fusion import sample_distances
from stpm.method.memory_bank import KINDS
from stpm.method.preprocessing import Boxes, Preprocessing
from stpm.method.recipe import PRESETS, Recipe

_BUDGET = 4 * 2**30
_BATCH = 16
_DRAWN_PER_IMAGE = 4
_METRICS = 3

Masks = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Judged:
    """Distances of some images from a model's parts, with their content boxes, labels and ground truth."""

    distances: Distances
    content: Boxes
    is_defect: Masks
    truth: list[Masks]


def changed(base: Recipe, text: str) -> Recipe:
    """A recipe with `name=value` pairs replaced, values as JSON or plain words."""
    changes: dict[str, Any] = {}
    for pair in text.split():
        name, value = pair.split("=", 1)
        default = getattr(base, name)
        changes[name] = type(default)(value if isinstance(default, str) else json.loads(value))
    return dataclasses.replace(base, **changes)


def matcher_of(recipe: Recipe, preprocessing: Preprocessing) -> Matcher:
    """The recipe's teacher on this process's device."""
    device = pick_device()
    weights = load_teacher_weights(recipe.teacher, recipe.teacher_weights, recipe.levels)
    teacher = load_backbone(recipe.teacher, recipe.levels, weights, recipe.teacher)
    return Matcher(teacher, preprocessing, device, resolve_precision(recipe.precision, device))


def run(category: mvtec.Category, recipe: Recipe, variants: Sequence[str]) -> dict[str, Any]:
    """Fit one model, and judge the category's test images and drawn defects by each variant of it."""
    uris = [uri for uri, _ in category.train]
    preprocessing = preprocessing_for(recipe, uris)
    matcher = matcher_of(recipe, preprocessing)
    start = time.perf_counter()
    good = load_images(uris, preprocessing, _BUDGET)
    features = TeacherFeatures(matcher, good, _BUDGET)
    train, held_out = split(len(good), recipe)
    memory = build_memory(features, train, recipe)
    fitted = fit(features, train, held_out, recipe, lambda epoch: None)
    seconds = time.perf_counter() - start
    parts = make_parts(fitted.student, memory, recipe, matcher.device)
    tests = [(storage.read(image.uri), native_mask(image.mask)) for image in category.test]
    held = [storage.read(uris[i]) for i in held_out]
    # One half sets the scales, the other is drawn on: no image is judged by its own.
    normal = judge(parts, matcher, [(data, None) for data in held])
    half = judge(parts, matcher, [(data, None) for data in held[::2]])
    drawn = judge(parts, matcher, drawn_on(held[1::2]))
    real = judge(parts, matcher, tests)
    real = dataclasses.replace(real, is_defect=np.array([image.label != mvtec.GOOD for image in category.test]))
    return {
        "size": preprocessing.size,
        "seconds": round(seconds, 1),
        "validation_loss": fitted.kept and round(fitted.kept.validation_loss, 5),
        "variants": {
            variant: {
                "drawn": figures(drawn, half, matcher, recipe, variant),
                "real": figures(real, normal, matcher, recipe, variant),
            }
            for variant in variants
        },
    }


def judge(parts: Parts, matcher: Matcher, shown: Sequence[tuple[bytes, Masks | None]]) -> Judged:
    """Image files, each with its mask at its own resolution or None, as scoring sees them."""
    results, boxes, truth = [], [], []
    for start in range(0, len(shown), _BATCH):
        decoded = [images.decode(data, matcher.preprocessing) for data, _ in shown[start : start + _BATCH]]
        content = matcher.preprocessing.content_boxes((each.width, each.height) for each in decoded)
        inputs = matcher.inputs(torch.from_numpy(np.stack([each.pixels for each in decoded])))
        results.append(matcher.distances(parts, matcher.teacher_features(inputs), inputs, content))
        boxes.append(content)
    for (_, mask), (left, top, right, bottom) in zip(shown, np.concatenate(boxes).tolist(), strict=True):
        empty = np.zeros((bottom - top, right - left), bool)
        truth.append(empty if mask is None else images.resize_mask(mask, matcher.preprocessing))
    is_defect = np.array([mask.any() for mask in truth])
    return Judged(Distances.concatenate(results), np.concatenate(boxes), is_defect, truth)


def figures(judged: Judged, normal: Judged, matcher: Matcher, recipe: Recipe, variant: str) -> list[float | None]:
    """Image AUROC, pixel AUROC and AUPRO of a variant of a fit, its parts on the scales that `normal` gives."""
    varied = changed(recipe, variant)
    scales = [fit_part_scale(sample_distances(each)) for each in kept_parts(normal.distances, recipe, varied).maps]
    distances = kept_parts(judged.distances, recipe, varied)
    scores = []
    counts = PixelCounts.empty()
    for start in range(0, len(judged.truth), _BATCH):
        part = slice(start, start + _BATCH)
        maps = matcher.anomaly_maps(distances.images(part), judged.content[part], varied, scales)
        scores += [each.score(varied.top_fraction).total for each in maps]
        counts += count_pixels([each.total for each in maps], judged.truth[part])
    values: list[float | None] = [float(roc_auc_score(judged.is_defect, scores)), None, None]
    if any(mask.any() for mask in judged.truth):
        values[1:] = counts.auroc().value, counts.aupro(AUPRO_LIMITS["pixel_aupro"]).value
    return [value and round(value, 4) for value in values]


def kept_parts(distances: Distances, fitted: Recipe, varied: Recipe) -> Distances:
    """What a variant keeps of the parts of a fit: the student's levels and banks of the levels that it names."""
    student = [d for d, level in zip(distances.student, fitted.levels, strict=False) if level in varied.levels]
    levels = [level for level in fitted.memory_levels for _ in KINDS]
    memory = [d for d, level in zip(distances.memory, levels, strict=False) if level in varied.memory_levels]
    return Distances(tuple(student) if varied.student != "none" else (), tuple(memory) if varied.memory else ())


def drawn_on(files: Sequence[bytes]) -> list[tuple[bytes, Masks | None]]:
    """Good images, each followed by copies with a faint drawn defect and the mask of what was drawn."""
    rng = np.random.default_rng(0)
    results: list[tuple[bytes, Masks | None]] = []
    for data in files:
        results.append((data, None))
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
            pixels = np.asarray(image.convert("RGB"))
        for _ in range(_DRAWN_PER_IMAGE):
            drawn, mask = _draw(rng, pixels)
            results.append((encode_png(Image.fromarray(drawn), compress_level=1), mask))
    return results


def _draw(rng: np.random.Generator, image: images.Pixels) -> tuple[images.Pixels, Masks]:
    """A scratch, or a piece of the image from elsewhere, more or less transparent."""
    height, width = image.shape[:2]
    size = min(height, width)
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    y, x = rng.uniform(0.3, 0.7, 2) * (height, width)
    if rng.random() < 0.5:
        angle, length = rng.uniform(0, np.pi), rng.uniform(0.05, 0.15) * size
        dx, dy = length * np.cos(angle), length * np.sin(angle)
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=255, width=max(round(rng.uniform(1, 4) * size / 256), 1))
        other = np.full_like(image, rng.integers(0, 256))
    else:
        rx, ry = rng.uniform(0.015, 0.06, 2) * size
        pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
        other = np.roll(image, tuple(rng.integers(size // 8, size // 2, 2)), axis=(0, 1))
    mask = np.asarray(canvas) > 0
    opacity = np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.7)))[..., None] / 255 * rng.uniform(0.3, 1.0)
    return np.round(image * (1 - opacity) + other * opacity).astype(np.uint8), mask


def native_mask(uri: str) -> Masks | None:
    """A test image's ground truth at its own resolution; None if it has none."""
    return images.decode_mask(storage.read(uri)) if uri else None


def mask_of(uri: str, preprocessing: Preprocessing, shape: tuple[int, ...]) -> Masks:
    """A test image's ground truth at the shape of its anomaly map; empty if it has none."""
    mask = native_mask(uri)
    return np.zeros(shape, bool) if mask is None else images.resize_mask(mask, preprocessing)


def tables(lines: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Means over seeds of each choice and variant; and for each category what the best on the others gives there."""
    categories = sorted({line["category"] for line in lines})
    by_choice: dict[str, dict[str, list[list[float | None]]]] = {}
    for line in lines:
        for variant, of_kinds in line["variants"].items():
            name = " ".join(filter(None, (line["choice"], variant))) or "default"
            by_choice.setdefault(name, {}).setdefault(line["category"], []).append(of_kinds[kind])
    whole = {name: found for name, found in by_choice.items() if len(found) == len(categories)}

    def mean(name: str, category: str, metric: int) -> float | None:
        values = [value for pair in whole[name][category] if (value := pair[metric]) is not None]
        return statistics.fmean(values) if values else None

    def average(name: str, metric: int, but: str = "") -> float:
        values = (mean(name, category, metric) for category in categories if category != but)
        return statistics.fmean(value for value in values if value is not None)

    def shown(name: str, category: str) -> str:
        return " / ".join("–" if (v := mean(name, category, m)) is None else f"{v:.4f}" for m in range(_METRICS))

    rows = [
        [name, *(shown(name, c) for c in categories), " / ".join(f"{average(name, m):.4f}" for m in range(_METRICS))]
        for name in whole
    ]
    chosen = {c: max(whole, key=lambda name: average(name, 0, but=c)) for c in categories}
    left_out = [[c, chosen[c], shown(chosen[c], c)] for c in categories]
    return "\n\n".join(
        [
            tabulate(rows, [kind, *categories, "mean"], tablefmt="pipe", disable_numparse=True),
            tabulate(left_out, ["left out", "best on the others", kind], tablefmt="pipe", disable_numparse=True),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set in the MVTec AD layout")
    parser.add_argument("--categories", default="", help="separated by commas (default: all)")
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--teacher-weights", default="", help="file, as of the fit job")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--train-images", type=int, help="fit on the first so many images alone")
    parser.add_argument("--variants", nargs="*", default=[""], help="name=value pairs on top of each choice")
    parser.add_argument("--out", required=True, help="file for a JSON line per fit; what it holds is not done again")
    parser.add_argument("choices", nargs="*", default=[""], help="name=value pairs on top of preset default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(line["choice"], line["category"], line["seed"]) for line in lines}
    base = dataclasses.replace(PRESETS["default"], teacher=arguments.teacher, teacher_weights=arguments.teacher_weights)
    names = mvtec.find_categories(arguments.data, [name for name in arguments.categories.split(",") if name])
    for seed in map(int, arguments.seeds.split(",")):
        for choice in arguments.choices:
            for name in names:
                if (choice, name, seed) in done:
                    continue
                category = mvtec.read_category(arguments.data, name)
                category = dataclasses.replace(category, train=category.train[: arguments.train_images])
                recipe = dataclasses.replace(changed(base, choice), seed=seed).for_image_count(len(category.train))
                result = run(category, recipe, arguments.variants)
                lines.append({"choice": choice, "category": name, "seed": seed} | result)
                with out.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                print(json.dumps(lines[-1]), flush=True)
    for kind in ("real", "drawn"):
        print("\n" + tables(lines, kind))


if __name__ == "__main__":
    main()
