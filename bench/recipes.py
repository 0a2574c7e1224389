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
from stpm.fitting.training_images import TrainingImages, load_images, preprocessing_for
from stpm.forward import Map, Matcher, pick_device, place, resolve_precision
from stpm.matching import level_statistics
from stpm.networks import Trunk, architecture_of, load_teacher, trunk_from
from stpm.preprocessing import Preprocessing
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
        default = getattr(base, name)
        changes[name] = type(default)(value) if isinstance(default, str) else json.loads(value)
    return dataclasses.replace(base, **changes)


def matcher_of(recipe: Recipe, preprocessing: Preprocessing) -> Matcher:
    """The recipe's teacher on this process's device."""
    device = pick_device()
    weights = load_teacher(recipe.teacher, recipe.teacher_weights, recipe.levels)
    teacher = trunk_from(architecture_of(recipe.teacher), recipe.levels, weights, recipe.teacher)
    return Matcher(teacher, preprocessing, recipe.combine, device, resolve_precision(recipe.precision, device))


def run(category: mvtec.Category, recipe: Recipe) -> dict[str, Any]:
    """Fit one student and score the category's test images."""
    uris = [uri for uri, _ in category.train]
    preprocessing = preprocessing_for(recipe, uris)
    matcher = matcher_of(recipe, preprocessing)
    start = time.perf_counter()
    good = load_images(uris, preprocessing, _BUDGET)
    train, held_out = split(len(good), recipe)
    fitted = fit(TeacherFeatures(matcher, good, _BUDGET), train, held_out, recipe, lambda epoch: None)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "validation_loss": round(fitted.kept.validation_loss, 5),
        "train_loss": round(fitted.kept.train_loss, 5),
        "seconds": round(seconds, 1),
    }
    student = place(
        trunk_from(architecture_of(recipe.teacher), recipe.levels, fitted.student, "student"), matcher.device
    )
    test = load_images([image.uri for image in category.test], preprocessing, _BUDGET)
    labels = np.array([image.label != mvtec.GOOD for image in category.test])
    shapes = [(bottom - top, right - left) for left, top, right, bottom in test.content.tolist()]
    truth = [mask_of(i.mask, preprocessing, shape) for i, shape in zip(category.test, shapes, strict=True)]
    real = _distances(matcher, student, test.pixels)
    # One half gives the statistics of `calibrated`, the other is drawn on: no image is judged by its own.
    apart, kept = held_out[::2], held_out[1::2]
    normal = _distances(matcher, student, good.pixels[apart])
    drawn, drawn_truth = drawn_on(TrainingImages(good.pixels[kept], good.content[kept]))
    drawn_distances = _distances(matcher, student, drawn.pixels)
    has_drawing = np.array([mask.any() for mask in drawn_truth])
    for combine in get_args(Combine):
        combiner = Matcher(matcher.teacher, preprocessing, combine, matcher.device, matcher.precision)
        combined = dataclasses.replace(recipe, combine=combine)
        _, statistics = calibrate_student(fitted.student, combiner, good, held_out, combined)
        half = level_statistics(normal) if combine == "calibrated" else None
        result[combine] = {
            "drawn": _aurocs(has_drawing, drawn_truth, combiner.anomaly_maps(drawn_distances, drawn.content, half)),
            "real": _aurocs(labels, truth, combiner.anomaly_maps(real, test.content, statistics)),
        }
    return result


def drawn_on(good: TrainingImages) -> tuple[TrainingImages, list[Masks]]:
    """Good images, each followed by copies with a faint drawn defect, and the masks of what was drawn, no padding."""
    rng = np.random.default_rng(0)
    pixels = good.pixels.repeat(1 + _DRAWN_PER_IMAGE, axis=0)
    content = good.content.repeat(1 + _DRAWN_PER_IMAGE, axis=0)
    masks = []
    for i, (left, top, right, bottom) in enumerate(content.tolist()):
        shown = pixels[i, top:bottom, left:right]
        mask = np.zeros(shown.shape[:2], bool)
        if i % (1 + _DRAWN_PER_IMAGE):
            shown[:], mask = _draw(rng, shown)
        masks.append(mask)
    return TrainingImages(pixels, content), masks


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


def _aurocs(labels: Masks, truth: list[Masks], maps: list[Map]) -> list[float]:
    pixels = np.concatenate([each.ravel() for each in maps])
    defects = np.concatenate([mask.ravel() for mask in truth])
    return [round(auroc(labels, np.array([each.max() for each in maps])), 4), round(auroc(defects, pixels), 4)]


def mask_of(uri: str, preprocessing: Preprocessing, shape: tuple[int, ...]) -> Masks:
    """A test image's ground truth at the shape of its anomaly map; no URI is no defect."""
    if not uri:
        return np.zeros(shape, bool)
    return images.resize_mask(images.decode_mask(storage.read(uri)), preprocessing)


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
