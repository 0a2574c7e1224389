"""How much of the machine the score job uses: its steady images per second over those of a bare loop, and of a peer.

    python bench/score_speed.py --data DATA --category bottle [--peer PEER/bin/python]

The loop reads, decodes, resizes, runs teacher and student, makes the map, and writes the heatmap and the overlay, with
the functions that the job uses: one process of one thread per core, its best arrangement on a CPU. The job's speed is
the steady one of its run.json: from the first quarter of the images on, until the last of them is written. The peer is
anomalib's `Engine.predict` on a part of the same images, with its visualiser, and without its imports. Nothing else may
run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stpm import storage
from stpm.cluster.connection import KEEP_FREED_MEMORY
from stpm.data import mvtec
from stpm.models.store import ModelStore
from stpm.scoring.inputs import manifest
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.sources import image_rows
from stpm.scoring.options import OutputOptions
from stpm.scoring.output import RunOutput
from stpm.scoring.resuming.run_state import RunState
from stpm.scoring.stages.decode import Decode
from stpm.scoring.stages.heatmaps import WriteHeatmaps
from stpm.scoring.stages.scorer import Scorer
from stpm.scoring.stages.scorer_actor import ScorerSettings

_ROOT = Path(__file__).resolve().parents[1]
_BATCH = 16
_WARM = 3
_PEER_IMAGES = 500


def collection(category: mvtec.Category, count: int, folder: Path) -> None:
    """So many images with names of their own, from the category's test images in turn."""
    folder.mkdir()
    for i in range(count):
        uri = category.test[i % len(category.test)].uri
        shutil.copyfile(uri, folder / f"{i:06}{Path(uri).suffix}")


def loop(store: str, rows: pa.Table, out: str, category: str) -> float:
    """Seconds that one process of one thread takes for all rows, once warm."""
    preprocessing = {category: ModelStore(store).record(category).preprocessing}
    decode = Decode(preprocessing, fetchers=1)
    torch.set_num_threads(1)
    scorer = Scorer(ScorerSettings(store, 0.01, overlays=True, batch_size=_BATCH))
    write = WriteHeatmaps(RunOutput.single(out, OutputOptions(overlay=True)), preprocessing)
    batches = [rows.slice(i, _BATCH) for i in range(0, rows.num_rows, _BATCH)]
    for batch in batches[:_WARM]:
        write(scorer(decode(batch)))
    start = time.perf_counter()
    for batch in batches:
        write(scorer(decode(batch)))
    return float(time.perf_counter() - start)


def bare(store: str, images: Path, out: Path, category: str, processes: int) -> float:
    """Images per second of the loop in so many processes."""
    manifest.write(image_rows([str(images)], CategoryRule(category)), str(out / "manifest"))
    rows = pa.concat_tables(pq.read_table(uri) for uri in manifest.shards(str(out / "manifest")))
    share = -(-rows.num_rows // processes)
    parts = [rows.slice(i * share, share) for i in range(processes)]
    os.environ.update(KEEP_FREED_MEMORY["env_vars"])
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        seconds = pool.starmap(loop, [(store, part, str(out), category) for part in parts])
    return float(sum(part.num_rows / s for part, s in zip(parts, seconds, strict=True)))


def job(store: str, images: Path, out: Path, category: str) -> tuple[float, float]:
    """Images per second of the score job: without its first quarter, while processes start, and in all."""
    options = ["--models", store, "--images", str(images), "--out", str(out), "--category", category]
    command = [sys.executable, "jobs/score.py", *options, "--top", "0", "--overlay"]
    subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.DEVNULL)
    summary = RunState(str(out)).summary()
    return summary.statistics.steady_images_per_second, summary.images_per_second


def peers(python: str, images: Path, folder: Path) -> float:
    """Images per second of anomalib's prediction."""
    part = folder / "part"
    part.mkdir()
    for path in sorted(images.iterdir())[:_PEER_IMAGES]:
        (part / path.name).symlink_to(path)
    script = [
        python,
        str(_ROOT / "bench" / "anomalib_predict.py"),
        "--images",
        str(part),
        "--out",
        str(folder / "peer"),
    ]
    ran = subprocess.run(script, cwd=folder, capture_output=True, text=True, check=True)
    return float(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="local folder in the MVTec AD layout")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count(), help="of the loop")
    parser.add_argument("--peer", help="python of the environment that has anomalib")
    arguments = parser.parse_args()
    data = storage.absolute(arguments.data)
    with tempfile.TemporaryDirectory() as folder:
        root, name = Path(folder), arguments.category
        fit = ["--data", data, "--models", str(root / "models"), "--categories", name, "--teacher", "demo"]
        subprocess.run(
            [sys.executable, "jobs/fit.py", *fit, "--epochs", "2", "--min-steps", "0"], cwd=_ROOT, check=True
        )
        collection(mvtec.read_category(data, name), arguments.images, root / "images")
        result = {
            "loop": bare(str(root / "models"), root / "images", root / "loop", name, arguments.processes),
        }
        result["job"], result["job_in_all"] = job(str(root / "models"), root / "images", root / "job", name)
        if arguments.peer:
            result["peer"] = peers(arguments.peer, root / "images", root)
    ratios = {f"job_to_{side}": round(result["job"] / speed, 3) for side, speed in result.items() if "job" not in side}
    print(json.dumps({k: round(v, 1) for k, v in result.items()} | ratios))


if __name__ == "__main__":
    main()
