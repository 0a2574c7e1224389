"""Fit side by side with anomalib 2.7's STFPM: wall time, peak memory, and detection metrics of the models.

    python -m venv PEER && PEER/bin/pip install 'anomalib==2.7.*'
    python bench/peer_fit.py --data DATA --category bottle --peer PEER/bin/python --seeds 0,1,2

Both sides have the same teacher, training images, epochs, batch size and cores: preset `paper` and anomalib's own
recipe. Preset `default` runs as it comes. Time is that of the whole process until its model exists, imports and Ray's
start included; memory is the largest sum over the process tree, a shared page divided among the processes that share
it. One code computes the metrics from both sides' anomaly maps. Prints what computes our features (`--backend`), a JSON
line per run, and at the end the means and their ratios to anomalib's. Run nothing else on the machine meanwhile.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from common import CORES, add_backend_option, fit_anomalib, job_command, make_parser, map_metrics, time_command

from stpm import storage
from stpm.data import mvtec
from stpm.fitting.train_student import split
from stpm.method.backend import resolve_backend
from stpm.method.preprocessing import IMAGENET, Preprocessing
from stpm.method.recipe import PRESETS
from stpm.models.store import ModelStore
from stpm.options import Backend
from stpm.scoring.inputs.manifest import labelled_rows
from stpm.scoring.stages.decode import Decode
from stpm.scoring.stages.scorer import Scorer
from stpm.scoring.stages.scorer_actor import ScorerSettings

# anomalib's own preprocessing.
_ANOMALIB = Preprocessing(256, 256, "stretch", IMAGENET.interpolation, IMAGENET.mean, IMAGENET.std)


def run_ours(
    data: str, category: mvtec.Category, seed: int, recipe: list[str], out: Path, backend: Backend
) -> dict[str, Any]:
    """Fit by the fit job; score by the stages of the score job."""
    options = {"data": data, "categories": category.name, "models": out, "seed": seed, "teacher": "demo"}
    cost = time_command([*job_command("fit", options | {"backend": backend}), *recipe])
    record = ModelStore(str(out)).record(category.name)
    preprocessing = record.preprocessing
    decode = Decode({category.name: preprocessing})
    torch.set_num_threads(CORES)
    scorer = Scorer(ScorerSettings(str(out), {category.name: record.model_id}, 0.01, raw_maps=True, backend=backend))
    rows = scorer(decode(pa.concat_tables(labelled_rows([category])))).to_pylist()
    shapes = [preprocessing.content_shape(row["width"], row["height"]) for row in rows]
    maps = [np.frombuffer(row["anomaly_map"], np.float32).reshape(s) for row, s in zip(rows, shapes, strict=True)]
    return cost | map_metrics(category.test, [each.max() for each in maps], maps, preprocessing)._asdict()


def run_anomalib(
    python: str, category: mvtec.Category, seed: int, epochs: int, threads: int, out: Path
) -> dict[str, Any]:
    """Fit by anomalib, on the images that our split trains on."""
    chosen, _ = split(len(category.train), dataclasses.replace(PRESETS["paper"], seed=seed))
    train = [category.train[int(number)][0] for number in chosen]
    options = {"seed": seed, "epochs": epochs, "threads": threads}
    fitted = fit_anomalib(python, out, ("demo", ""), train, category.test, options, until="fitted")
    scores = [each.max() for each in fitted.maps]
    return fitted.cost | map_metrics(fitted.tests, scores, list(fitted.maps), _ANOMALIB)._asdict()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="local folder in the MVTec AD layout, with masks")
    parser.add_argument("--category", default="bottle")
    parser.add_argument("--peer", required=True, help="python of the environment that has anomalib")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=CORES, help="threads of anomalib")
    add_backend_option(parser)
    arguments = parser.parse_args()
    backend = resolve_backend(arguments.backend, on_gpu=False)
    print(json.dumps({"backend": backend}), flush=True)
    data = storage.absolute(arguments.data)
    category = mvtec.read_category(data, arguments.category)
    paper = ["--preset", "paper", "--epochs", str(arguments.epochs), "--precision"]
    sides = {"paper": [*paper, "auto"], "paper float32": [*paper, "float32"], "default": ["--preset", "default"]}
    sides |= {"anomalib": []}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for seed in map(int, arguments.seeds.split(",")):
        for side, recipe in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                if recipe:
                    run = run_ours(data, category, seed, recipe, Path(folder), backend)
                else:
                    peer, epochs, threads = arguments.peer, arguments.epochs, arguments.threads
                    run = run_anomalib(peer, category, seed, epochs, threads, Path(folder))
            runs[side].append(run)
            print(json.dumps({"side": side, "seed": seed} | run), flush=True)
    means = {side: {key: statistics.fmean(r[key] for r in some) for key in some[0]} for side, some in runs.items()}
    for values in means.values():
        for key in ("seconds", "peak_mib"):
            values[f"{key}_to_peer"] = values[key] / means["anomalib"][key]
    rounded = {side: {key: round(value, 4) for key, value in values.items()} for side, values in means.items()}
    print(json.dumps({"means": rounded}))


if __name__ == "__main__":
    main()
