"""Measure time and memory of the pixel metrics, and how far they are from the exact values; and regions.

    python bench/pixel_metrics.py
    python bench/pixel_metrics.py --run runs/mvtec

Makes maps of 256 × 256 and counts 16 at a time, each number of maps in a process of its own, whose peak memory the
system reports. Times scikit-learn's exact AUROC and average precision on the smallest number, and compares them.

With the folder of a benchmark: the share of each category's ground-truth regions (8-connected, at model size) that a
found region overlaps, of found regions of defective images that overlap none of them, and of good images with any.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow.dataset as ds
from commands import integers, make_parser
from scipy.ndimage import label
from sklearn.metrics import average_precision_score, roc_auc_score

from stpm.data.masks import read_mask, resize_mask
from stpm.evaluation.category import MASK_COLUMNS
from stpm.metrics.pixel_metrics import PixelCounts, count_pixels
from stpm.models.store import ModelStore
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import read_batches

_SIZE = 256
_MAPS_AT_ONCE = 16


def make_maps(count: int) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]]:
    """Yield batches of maps, distributed as products of three smooth distances, and masks."""
    for start in range(0, count, _MAPS_AT_ONCE):
        rng = np.random.default_rng(start)
        number = min(_MAPS_AT_ONCE, count - start)
        maps = rng.lognormal(-14, 1, (number, _SIZE, _SIZE)).astype(np.float32)
        masks = np.zeros(maps.shape, bool)
        for each in range(0, number, 2):
            y, x = rng.integers(0, _SIZE - 40, 2)
            masks[each, y : y + 40, x : x + 30] = True
        maps[masks] *= 5
        yield maps, masks


def count_maps(count: int) -> dict[str, float]:
    """Return time per map, the process's peak memory and the metrics."""
    counts = PixelCounts.empty()
    seconds = 0.0
    for maps, masks in make_maps(count):
        start = time.perf_counter()
        counts += count_pixels(maps, masks)
        seconds += time.perf_counter() - start
    metrics = counts.rank_metrics() | {"aupro": counts.aupro(0.3)}
    return {
        "maps": count,
        "ms_per_map": seconds / count * 1000,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    } | metrics


def exact_metrics(count: int) -> dict[str, float]:
    """Return the same metrics by scikit-learn, all maps at once."""
    maps, masks = (np.concatenate(parts).ravel() for parts in zip(*make_maps(count), strict=True))
    start = time.perf_counter()
    metrics = {"auroc": roc_auc_score(masks, maps), "average_precision": average_precision_score(masks, maps)}
    seconds = time.perf_counter() - start
    return {"exact_ms_per_map": seconds / count * 1000} | {f"exact_{name}": value for name, value in metrics.items()}


def measure_regions(run: str) -> Iterator[dict[str, float | str]]:
    """Yield the recall of regions, and the shares of false ones, of each category and seed of a benchmark."""
    columns = [*MASK_COLUMNS, "category", "pixel_threshold", "region_count", "anomaly_map"]
    for output in RunOutput.find_all(run):
        uri, model_ids = output.state.store_and_model_ids()
        for category, model_id in model_ids.items():
            preprocessing = ModelStore(uri).record(category, model_id).preprocessing
            hits: list[npt.NDArray[np.bool_]] = []
            misses, good = list(hits), []
            of_category = ds.field("category") == category
            for row in (row for batch in read_batches(output, columns, of_category, 16) for row in batch.to_pylist()):
                if row["label"] == "good":
                    good.append(row["region_count"] > 0)
                    continue
                mask = resize_mask(read_mask(*(row[name] for name in MASK_COLUMNS)), preprocessing)
                above = np.frombuffer(row["anomaly_map"], np.float32).reshape(mask.shape) > row["pixel_threshold"]
                hits.append(_touched(mask, above))
                misses.append(~_touched(above, mask))
            yield {
                "category": category,
                "regions": sum(map(len, hits)),
                "recall": float(np.concatenate(hits).mean()),
                "found_regions": sum(map(len, misses)),
                "false_of_found": float(np.concatenate(misses).mean()),
                "good_images": len(good),
                "good_with_region": float(np.mean(good)),
            }


def _touched(regions: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return, for each region of a mask, whether it overlaps another mask."""
    labels, count = label(regions, np.ones((3, 3)))
    return np.isin(np.arange(1, count + 1), labels[other])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--run", default="", help="folder of a benchmark, to measure its regions")
    parser.add_argument(
        "--maps", type=integers, default="100,1000,10000", help="numbers of maps, separated by commas (default: these)"
    )
    arguments = parser.parse_args()
    for measured in measure_regions(arguments.run) if arguments.run else ():
        print(json.dumps(measured), flush=True)
    numbers = [] if arguments.run else arguments.maps
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for number in numbers:
            result = pool.apply(count_maps, (number,))
            if number == min(numbers):
                result |= pool.apply(exact_metrics, (number,))
            print(json.dumps({name: round(value, 7) for name, value in result.items()}), flush=True)


if __name__ == "__main__":
    main()
