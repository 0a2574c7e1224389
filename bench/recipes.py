"""What a recipe's choices do: what presets may be chosen by, and the AUROCs of real defects, by which they may not.

    python bench/recipes.py --data DATA --seeds 0,1,2 'batch=8 epochs=10' 'batch=8 epochs=10 schedule=cosine'

Each choice is fitted on each category and seed, in one process and without Ray. One JSON line per fit: validation loss,
seconds, and image and pixel AUROC for every way to combine levels, of the same student. `drawn` are defects painted on
held-out good images, so that a recipe can be chosen without a label; `real` are the test images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFilter

from stpm import images, mvtec, storage
from stpm.evaluation.metrics import auroc
from stpm.fitting.features import TeacherFeatures
from stpm.fitting.held_out import calibrate_student
from stpm.fitting.loop import fit, split
from stpm.fitting.worker import load_pixels
from stpm.forward import Matcher, pick_device, place, resolve_precision
from stpm.matching import level_statistics
from stpm.networks import Trunk, architecture_of, load_teacher, trunk_from
from stpm.recipe import PRESETS, Combine, Recipe

_BUDGET = 4 * 2**30
_BATCH = 16
_DRAWN_PER_IMAGE = 4

Masks = npt.NDArray[np.bool_]


def chosen(base: Recipe, text: str) -> Recipe:
    """A recipe with `name=value` pairs replaced, values as JSON or plain words."""
    changes: dict[str, Any] = {}
    for pair in text.split():
        name, value = pair.split("=", 1)
        changes[name] = value if isinstance(getattr(base, name), str) else json.loads(value)
    return dataclasses.replace(base, **changes)


def matcher_of(recipe: Recipe) -> Matcher:
    """The recipe's teacher on this process's device."""
    device = pick_device()
    weights = load_teacher(recipe.teacher, recipe.teacher_weights, recipe.levels)
    teacher = trunk_from(architecture_of(recipe.teacher), recipe.levels, weights, recipe.teacher)
    return Matcher(teacher, recipe, device, resolve_precision(recipe.precision, device))


def run(category: mvtec.Category, recipe: Recipe) -> dict[str, Any]:
    """Fit one student and score the category's test images."""
    matcher = matcher_of(recipe)
    start = time.perf_counter()
    pixels = load_pixels([uri for uri, _ in category.train], recipe.view, _BUDGET)
    train, held_out = split(len(pixels), recipe)
    fitted = fit(TeacherFeatures(matcher, pixels, _BUDGET), train, held_out, recipe, lambda epoch: None)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "validation_loss": round(fitted.kept.validation_loss, 5),
        "train_loss": round(fitted.kept.train_loss, 5),
        "seconds": round(seconds, 1),
    }
    student = place(
        trunk_from(architecture_of(recipe.teacher), recipe.levels, fitted.student, "student"), matcher.device
    )
    test = load_pixels([image.uri for image in category.test], recipe.view, _BUDGET)
    labels = np.array([image.label != mvtec.GOOD for image in category.test])
    truth = np.stack([mask_of(image.mask, recipe.view) for image in category.test])
    real = _distances(matcher, student, test)
    # One half gives the statistics of `calibrated`, the other is drawn on: no image is judged by its own.
    apart, kept = held_out[::2], held_out[1::2]
    normal = _distances(matcher, student, pixels[apart])
    drawn_pixels, drawn_truth = drawn_on(pixels[kept])
    drawn = _distances(matcher, student, drawn_pixels)
    for combine in get_args(Combine):
        combiner = Matcher(
            matcher.teacher, dataclasses.replace(recipe, combine=combine), matcher.device, matcher.precision
        )
        _, statistics = calibrate_student(fitted.student, combiner, pixels, held_out, combiner.recipe)
        half = level_statistics(normal) if combine == "calibrated" else None
        result[combine] = {
            "drawn": _aurocs(np.asarray(drawn_truth.any(axis=(1, 2))), drawn_truth, combiner.anomaly_maps(drawn, half)),
            "real": _aurocs(labels, truth, combiner.anomaly_maps(real, statistics)),
        }
    return result


def drawn_on(good: images.Pixels) -> tuple[images.Pixels, Masks]:
    """Good images, each followed by copies with a faint drawn defect, and the masks of what was drawn."""
    rng = np.random.default_rng(0)
    results: list[tuple[images.Pixels, Masks]] = []
    for image in good:
        results.append((image, np.zeros(image.shape[:2], bool)))
        results += [_draw(rng, image) for _ in range(_DRAWN_PER_IMAGE)]
    return np.stack([image for image, _ in results]), np.stack([mask for _, mask in results])


def _draw(rng: np.random.Generator, image: images.Pixels) -> tuple[images.Pixels, Masks]:
    """A scratch, or a piece of the image from elsewhere, more or less transparent."""
    size = len(image)
    canvas = Image.new("L", (size, size))
    pen = ImageDraw.Draw(canvas)
    y, x = rng.uniform(0.3, 0.7, 2) * size
    if rng.random() < 0.5:
        angle, length = rng.uniform(0, np.pi), rng.uniform(0.05, 0.15) * size
        dx, dy = length * np.cos(angle), length * np.sin(angle)
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=255, width=int(rng.integers(1, 4)))
        other = np.full_like(image, rng.integers(0, 256))
    else:
        rx, ry = rng.uniform(0.015, 0.06, 2) * size
        pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=255)
        other = np.roll(image, tuple(rng.integers(size // 8, size // 2, 2)), axis=(0, 1))
    mask = np.asarray(canvas) > 0
    opacity = np.asarray(canvas.filter(ImageFilter.GaussianBlur(0.7)))[..., None] / 255 * rng.uniform(0.3, 1.0)
    return np.round(image * (1 - opacity) + other * opacity).astype(np.uint8), mask


def _distances(matcher: Matcher, student: Trunk, pixels: images.Pixels) -> list[torch.Tensor]:
    parts = [matcher.distances(student, pixels[i : i + _BATCH]) for i in range(0, len(pixels), _BATCH)]
    return [torch.cat(level) for level in zip(*parts, strict=True)]


def _aurocs(labels: Masks, truth: Masks, maps: npt.NDArray[np.float32]) -> list[float]:
    return [round(auroc(labels, maps.max(axis=(1, 2))), 4), round(auroc(truth, maps), 4)]


def mask_of(uri: str, view: images.View) -> Masks:
    """A test image's ground truth at model size; no URI is no defect."""
    if not uri:
        return np.zeros((view.size, view.size), bool)
    return images.resize_mask(images.decode_mask(storage.read(uri)), view)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data set in the MVTec AD layout, with masks")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas (default: 0)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--train-images", type=int, help="fit on the first so many images alone")
    parser.add_argument("choices", nargs="+", help="name=value pairs on top of preset paper and teacher demo")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = dataclasses.replace(PRESETS["paper"], teacher="demo")
    for text in arguments.choices:
        for seed in map(int, arguments.seeds.split(",")):
            for name in mvtec.find_categories(arguments.data):
                category = mvtec.read_category(arguments.data, name)
                category = dataclasses.replace(category, train=category.train[: arguments.train_images])
                recipe = dataclasses.replace(chosen(base, text), seed=seed).for_images(len(category.train))
                result = run(category, recipe)
                print(json.dumps({"choices": text, "category": name, "seed": seed} | result), flush=True)


if __name__ == "__main__":
    main()
