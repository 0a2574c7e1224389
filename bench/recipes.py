"""Compare choices of a recipe on several products, and choose for each product by the others' metrics.

    python bench/recipes.py --data DATA --seeds 0,1,2 --out FILE.jsonl 'pixels=65536' 'epochs=10' \\
        --variants '' 'memory=0' 'student=none' 'top_fraction=0'

Each choice is a change to preset `default`, fitted once per category and seed, in one process and without Ray. A
variant changes how the parts of that fit are fused, or drops parts: it needs no fit of its own. Appends a JSON line per
fit to FILE, and does not repeat fits that the file holds: seconds, validation loss, and for each variant image AUROC,
pixel AUROC and AUPRO. `drawn` defects are faint scratches and displaced patches painted on held-out good images at
their own resolution, and need no label. `real` are the test images. Then prints two tables: the means over seeds, and
for each category the metrics of the choice that is best on all others.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import METRICS, RAM_BUDGET, append_line, make_parser, matcher_from, read_lines, read_mask
from PIL import Image, ImageDraw, ImageFilter
from sklearn.metrics import roc_auc_score
from tabulate import tabulate

from stpm import storage
from stpm.data import images, mvtec
from stpm.data.encode import encode_png
from stpm.evaluation.category_metrics import AUPRO_LIMITS
from stpm.evaluation.pixels import Mask, PixelCounts, count_pixels
from stpm.fitting.build_memory import build_memory
from stpm.fitting.splits import split_images
from stpm.fitting.teacher_features import TeacherFeatures
from stpm.fitting.train_student import train_student
from stpm.fitting.training_images import load_images, preprocessing_for
from stpm.method.forward import Distances, Matcher, Parts
from stpm.method.fusion import sample_distances
from stpm.method.memory_bank import KINDS
from stpm.method.preprocessing import Boxes
from stpm.method.recipe import PRESETS, Recipe
from stpm.method.scales import fit_distance_scale
from stpm.options import Integers

_BATCH = 16
_DRAWN_PER_IMAGE = 4


@dataclasses.dataclass(frozen=True)
class ComparedImages:
    """Distance maps of some images for each part of a model, with their content boxes, labels and ground truth."""

    distances: Distances
    content: Boxes
    is_defect: Mask
    truth: list[Mask]


def change_recipe(base: Recipe, text: str) -> Recipe:
    """Return a recipe with `name=value` pairs replaced, values as JSON or plain words."""
    changes: dict[str, Any] = {}
    for pair in text.split():
        name, value = pair.split("=", 1)
        default = getattr(base, name)
        changes[name] = type(default)(value if isinstance(default, str) else json.loads(value))
    return dataclasses.replace(base, **changes)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A fitted model: its parts, what computed them, the files of its held-out images, and the seconds of the fit.

    Its recipe names the memory levels that the fit has chosen.
    """

    recipe: Recipe
    parts: Parts
    matcher: Matcher
    held_out: list[bytes]
    seconds: float
    validation_loss: float | None


def fit(category: mvtec.Category, recipe: Recipe) -> Fitted:
    """Fit one model by PyTorch, in this process."""
    uris = [uri for uri, _ in category.train]
    preprocessing = preprocessing_for(recipe, uris)
    matcher = matcher_from(recipe, preprocessing)
    start = time.perf_counter()
    good = load_images(uris, preprocessing, RAM_BUDGET)
    features = TeacherFeatures(matcher, good, RAM_BUDGET)
    train, held_out = split_images(len(good), recipe)
    memory = build_memory(features, train, recipe)
    trained = train_student(features, train, held_out, recipe, lambda epoch: None)
    seconds = time.perf_counter() - start
    parts = Parts.from_weights(recipe, trained.student, memory).to(matcher.device)
    held = [storage.read(uris[i]) for i in held_out]
    kept = trained.kept_epoch
    chosen = sorted({recipe.levels[bank.spec.level_index] for bank in memory})
    recipe = dataclasses.replace(recipe, memory_levels=Integers(chosen))
    return Fitted(recipe, parts, matcher, held, seconds, None if kept is None else kept.validation_loss)


def compare_real(parts: Parts, matcher: Matcher, category: mvtec.Category) -> ComparedImages:
    """Compare a category's test images with a model."""
    tests = [(storage.read(image.uri), read_mask(image.mask)) for image in category.test]
    is_defect = np.array([image.label != mvtec.GOOD for image in category.test])
    return dataclasses.replace(compare(parts, matcher, tests), is_defect=is_defect)


def run(category: mvtec.Category, recipe: Recipe, variants: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """Fit one model, and measure each variant of it on the category's test images and on drawn defects."""
    fitted = fit(category, recipe)
    parts, matcher, held = fitted.parts, fitted.matcher, fitted.held_out
    recipe = fitted.recipe
    normal = compare(parts, matcher, [(data, None) for data in held])
    measured = {}
    if "real" in kinds:
        measured["real"] = compare_real(parts, matcher, category), normal
    if "drawn" in kinds:
        # One half sets the scales, defects are drawn on the other: no image sets its own scale.
        half = compare(parts, matcher, [(data, None) for data in held[::2]])
        measured["drawn"] = compare(parts, matcher, draw_defects(held[1::2])), half
    return {
        "size": matcher.preprocessing.size_text,
        "seconds": round(fitted.seconds, 1),
        "validation_loss": fitted.validation_loss and round(fitted.validation_loss, 5),
        "variants": {
            variant: {kind: measure(*compared, matcher, recipe, variant) for kind, compared in measured.items()}
            for variant in variants
        },
    }


def compare(parts: Parts, matcher: Matcher, files: Sequence[tuple[bytes, Mask | None]]) -> ComparedImages:
    """Compare image files (each with its mask at its own resolution, or None) with a model, as scoring does."""
    results, boxes, truth = [], [], []
    for start in range(0, len(files), _BATCH):
        decoded = [images.decode(data, matcher.preprocessing) for data, _ in files[start : start + _BATCH]]
        content = matcher.preprocessing.content_boxes((each.width, each.height) for each in decoded)
        inputs = matcher.inputs(torch.from_numpy(np.stack([each.pixels for each in decoded])))
        results.append(matcher.distances(parts, inputs, content))
        boxes.append(content)
    for (_, mask), (left, top, right, bottom) in zip(files, np.concatenate(boxes).tolist(), strict=True):
        empty = np.zeros((bottom - top, right - left), bool)
        truth.append(empty if mask is None else images.resize_mask(mask, matcher.preprocessing))
    is_defect = np.array([mask.any() for mask in truth])
    return ComparedImages(concatenate(results), np.concatenate(boxes), is_defect, truth)


def concatenate(batches: Sequence[Distances]) -> Distances:
    """Join batches in their order."""
    student = zip(*(batch.student for batch in batches), strict=True)
    memory = zip(*(batch.memory for batch in batches), strict=True)
    return Distances(tuple(map(torch.cat, student)), tuple(map(torch.cat, memory)))


def measure(
    compared: ComparedImages, normal: ComparedImages, matcher: Matcher, recipe: Recipe, variant: str
) -> list[float | None]:
    """Return METRICS of a variant of a fit; `normal` gives the scales of its parts."""
    varied = change_recipe(recipe, variant)
    scales = [fit_distance_scale(sample_distances(each)) for each in kept_parts(normal.distances, recipe, varied).maps]
    distances = kept_parts(compared.distances, recipe, varied)
    scores = []
    counts = PixelCounts.empty()
    for start in range(0, len(compared.truth), _BATCH):
        part = slice(start, start + _BATCH)
        maps = matcher.anomaly_maps(distances.select(part), compared.content[part], varied, scales)
        scores += [each.score(varied.top_fraction).total for each in maps]
        counts += count_pixels([each.total for each in maps], compared.truth[part])
    values: list[float | None] = [float(roc_auc_score(compared.is_defect, scores)), None, None]
    if any(mask.any() for mask in compared.truth):
        values[1:] = counts.auroc().value, counts.aupro(AUPRO_LIMITS["pixel_aupro"]).value
    return [value and round(value, 4) for value in values]


def kept_parts(distances: Distances, fitted: Recipe, varied: Recipe) -> Distances:
    """Return the distances of those levels and banks that a variant keeps of a fit."""
    student = [d for d, level in zip(distances.student, fitted.levels, strict=False) if level in varied.levels]
    levels = [level for level in fitted.memory_levels for _ in KINDS]
    memory = [d for d, level in zip(distances.memory, levels, strict=False) if level in varied.memory_levels]
    return Distances(tuple(student) if varied.student != "none" else (), tuple(memory) if varied.memory else ())


def draw_defects(files: Sequence[bytes]) -> list[tuple[bytes, Mask | None]]:
    """Return good images, each followed by copies with a faint drawn defect and the mask of what was drawn."""
    rng = np.random.default_rng(0)
    results: list[tuple[bytes, Mask | None]] = []
    for data in files:
        results.append((data, None))
        with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
            pixels = np.asarray(image.convert("RGB"))
        for _ in range(_DRAWN_PER_IMAGE):
            drawn, mask = _draw(rng, pixels)
            results.append((encode_png(Image.fromarray(drawn), compress_level=1), mask))
    return results


def _draw(rng: np.random.Generator, image: images.Pixels) -> tuple[images.Pixels, Mask]:
    """Draw a scratch, or a piece from elsewhere in the image, with random opacity."""
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


def tables(lines: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Return means over seeds of each choice and variant, and per category the result of the best on the others."""
    categories = sorted({line["category"] for line in lines})
    by_choice: dict[str, dict[str, list[list[float | None]]]] = {}
    for line in lines:
        for variant, metrics in line["variants"].items():
            name = " ".join(filter(None, (line["choice"], variant))) or "default"
            by_choice.setdefault(name, {}).setdefault(line["category"], []).append(metrics[kind])
    complete = {name: found for name, found in by_choice.items() if len(found) == len(categories)}

    def mean(name: str, category: str, metric: int) -> float | None:
        values = [value for pair in complete[name][category] if (value := pair[metric]) is not None]
        return statistics.fmean(values) if values else None

    def average(name: str, metric: int, but: str = "") -> float:
        values = [value for c in categories if c != but and (value := mean(name, c, metric)) is not None]
        return statistics.fmean(values) if values else math.nan

    def shown(name: str, category: str) -> str:
        return " / ".join("–" if (v := mean(name, category, m)) is None else f"{v:.4f}" for m in range(len(METRICS)))

    rows = []
    for name in complete:
        means = " / ".join(f"{average(name, m):.4f}" for m in range(len(METRICS)))
        rows.append([name, *(shown(name, category) for category in categories), means])
    text = tabulate(rows, [kind, *categories, "mean"], tablefmt="pipe", disable_numparse=True)
    if len(categories) == 1:
        return text
    chosen = {c: max(complete, key=lambda name: average(name, 0, but=c)) for c in categories}
    rows = [[c, chosen[c], shown(chosen[c], c)] for c in categories]
    headers = ["left out", "best on the others", kind]
    return f"{text}\n\n{tabulate(rows, headers, tablefmt='pipe', disable_numparse=True)}"


def make_fit_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options of benchmarks that fit by `fit`."""
    parser = make_parser(description)
    parser.add_argument("--data", required=True, help="data set in the MVTec AD layout")
    parser.add_argument("--categories", default="", help="separated by commas (default: all)")
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--teacher-weights", default="", help="file of weights, as for the fit job")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    return parser


def main() -> None:
    parser = make_fit_parser(__doc__)
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas (default: 0)")
    parser.add_argument("--kinds", default="real,drawn", help="defects to measure (default: real,drawn)")
    parser.add_argument("--train-images", type=int, help="fit on the first N images alone", metavar="N")
    parser.add_argument("--variants", nargs="*", default=[""], help="name=value pairs on top of each choice")
    parser.add_argument(
        "--out", required=True, help="file for a JSON line per fit; fits that it holds are not repeated"
    )
    parser.add_argument("choices", nargs="*", default=[""], help="name=value pairs on top of preset default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out, kinds = Path(arguments.out), arguments.kinds.split(",")
    lines = read_lines(out)
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
                recipe = dataclasses.replace(change_recipe(base, choice), seed=seed).for_image_count(
                    len(category.train)
                )
                result = run(category, recipe, arguments.variants, kinds)
                lines.append({"choice": choice, "category": name, "seed": seed} | result)
                append_line(out, lines[-1])
    for kind in kinds:
        print("\n" + tables(lines, kind))


if __name__ == "__main__":
    main()
