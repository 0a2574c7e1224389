"""Compare the score job's steady images per second with those of a bare loop, and of anomalib.

    python bench/score_speed.py --data DATA --category bottle [--peer PEER/bin/python]

The loop reads and decodes images, runs teacher and model, makes the map, and writes heatmap and overlay with the
functions that the job uses, in one process of one thread per core: its best arrangement on a CPU. The job's speed is
the steady one of its run.json: after the first quarter of the images, until the last of them is written. anomalib runs
`Engine.predict` on some of the same images, with its visualiser and without its imports. Run nothing else on the
machine meanwhile. The result names what computed the features of the loop and of the job (`--backend`).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import ROOT, add_backend_option, job_command, make_parser, options_from, write_teacher

from stpm import storage
from stpm.cluster.connection import KEEP_FREED_MEMORY
from stpm.data import mvtec
from stpm.method.backbones import DEMO_ARCHITECTURE, DEMO_TEACHER
from stpm.method.backend import resolve_backend
from stpm.models.store import ModelStore
from stpm.options import Backend
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

_BATCH = 16
_WARM_BATCHES = 3
_ANOMALIB_IMAGES = 500


def copy_images(category: mvtec.Category, count: int, folder: Path) -> None:
    """Copy the category's test images in turn, under new names, until there are `count`."""
    folder.mkdir()
    for i in range(count):
        uri = category.test[i % len(category.test)].uri
        shutil.copyfile(uri, folder / f"{i:06}{Path(uri).suffix}")


def time_loop(store: str, rows: pa.Table, out: str, category: str, backend: Backend) -> float:
    """Return the seconds that one process of one thread takes for all rows, once warm."""
    torch.set_num_threads(1)
    record = ModelStore(store).record(category)
    preprocessing = {category: record.preprocessing}
    decode = Decode(preprocessing, fetchers=1)
    settings = ScorerSettings(
        store, {category: record.model_id}, 0.01, overlays=True, batch_size=_BATCH, backend=backend
    )
    scorer = Scorer(settings)
    write = WriteHeatmaps(RunOutput.single(out, OutputOptions(overlay=True)), preprocessing)
    batches = [rows.slice(i, _BATCH) for i in range(0, rows.num_rows, _BATCH)]
    for batch in batches[:_WARM_BATCHES]:
        write(scorer(decode(batch)))
    start = time.perf_counter()
    for batch in batches:
        write(scorer(decode(batch)))
    return float(time.perf_counter() - start)


def loop_speed(store: str, images: Path, out: Path, category: str, processes: int, backend: Backend) -> float:
    """Return images per second of the loop in several processes."""
    manifest.write(image_rows([str(images)], CategoryRule(category)), str(out / "manifest"))
    rows = pa.concat_tables(pq.read_table(uri) for uri in manifest.shards(str(out / "manifest")))
    length = -(-rows.num_rows // processes)
    parts = [rows.slice(i * length, length) for i in range(processes)]
    os.environ.update(KEEP_FREED_MEMORY["env_vars"])
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        seconds = pool.starmap(time_loop, [(store, part, str(out), category, backend) for part in parts])
    return float(sum(part.num_rows / s for part, s in zip(parts, seconds, strict=True)))


def job_speed(store: str, images: Path, out: Path, category: str, backend: Backend) -> tuple[float, float]:
    """Return images per second of the score job: steady, and start and end included."""
    options = {"models": store, "images": images, "out": out, "category": category, "top": 0, "backend": backend}
    subprocess.run([*job_command("score", options), "--overlay"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    summary = RunState(str(out)).summary()
    return summary.statistics.steady_images_per_second, summary.images_per_second


def anomalib_speed(python: str, images: Path, folder: Path) -> float:
    """Return images per second of anomalib's prediction."""
    part, weights = folder / "part", folder / "teacher.safetensors"
    part.mkdir()
    for path in sorted(images.iterdir())[:_ANOMALIB_IMAGES]:
        (part / path.name).symlink_to(path)
    write_teacher(DEMO_TEACHER, "", weights)
    options = {"images": part, "out": folder / "anomalib", "weights": weights, "architecture": DEMO_ARCHITECTURE}
    command = [python, str(ROOT / "bench" / "anomalib_side.py"), "predict", *options_from(options)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return float(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="local folder in the MVTec AD layout")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count(), help="processes of the loop")
    parser.add_argument("--peer", help="python of the environment that has anomalib")
    add_backend_option(parser)
    arguments = parser.parse_args()
    backend = resolve_backend(arguments.backend, on_gpu=False)
    data = storage.absolute(arguments.data)
    with tempfile.TemporaryDirectory() as folder:
        root, name = Path(folder), arguments.category
        models = str(root / "models")
        fit = {"data": data, "models": models, "categories": name, "teacher": "demo", "epochs": 2, "min-steps": 0}
        subprocess.run(job_command("fit", fit), cwd=ROOT, check=True)
        copy_images(mvtec.read_category(data, name), arguments.images, root / "images")
        result = {"loop": loop_speed(models, root / "images", root / "loop", name, arguments.processes, backend)}
        result["job"], result["job_in_all"] = job_speed(models, root / "images", root / "job", name, backend)
        if arguments.peer:
            result["peer"] = anomalib_speed(arguments.peer, root / "images", root)
    ratios = {f"job_to_{side}": round(result["job"] / speed, 3) for side, speed in result.items() if "job" not in side}
    print(json.dumps({"backend": backend} | {k: round(v, 1) for k, v in result.items()} | ratios))


if __name__ == "__main__":
    main()
