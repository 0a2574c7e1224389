"""Many images through a cluster of three nodes: every image one row, a driver that does not grow, linear time.

    python bench/three_nodes.py --images 10000,100000

Starts a head that takes no work and three nodes of one CPU, all of them processes here; packs tiny images into tar
archives, fits a tiny student and scores them all, for each number in turn. Prints, per quarter of each pass, images per
second and the driver's memory in MiB, and how the rows compare with what was asked for. Needs the extra `test`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from long_run import followed, quarters
from PIL import Image
from ray.cluster_utils import Cluster

from stpm.scoring.output import RunOutput
from stpm.scoring.resuming.run_state import RunState

_ROOT = Path(__file__).resolve().parents[1]
_PER_ARCHIVE = 5000
_DISTINCT = 1000
_TINY = [
    *("--preset", "paper", "--teacher", "test_resnet", "--teacher-weights", "random"),
    *("--size", "32", "--batch-size", "4", "--epochs", "1"),
]


def image(number: int) -> bytes:
    """A PNG of a few hundred bytes."""
    pixels = np.random.default_rng(number).integers(90, 130, (16, 16, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def fill(folder: Path, count: int) -> None:
    """Tar archives of so many images in all."""
    folder.mkdir()
    images = [image(number) for number in range(_DISTINCT)]
    for start in range(0, count, _PER_ARCHIVE):
        with tarfile.open(folder / f"{start:07}.tar", "w") as archive:
            for number in range(start, min(start + _PER_ARCHIVE, count)):
                member = tarfile.TarInfo(f"{number:07}.png")
                member.size = len(images[number % _DISTINCT])
                archive.addfile(member, io.BytesIO(images[number % _DISTINCT]))


def measure(root: Path, count: int) -> None:
    """One pass over so many images."""
    images, out = root / f"images-{count}", root / f"out-{count}"
    fill(images, count)
    options = ["--models", str(root / "models"), "--images", str(images), "--out", str(out), "--category", "nut"]
    options += ["--mounted", str(root), "--heatmaps", "none", "--top", "0"]
    start = time.perf_counter()
    samples = list(followed([sys.executable, "jobs/score.py", *options]))
    seconds = time.perf_counter() - start
    for quarter in quarters(samples, count):
        print(json.dumps({k: quarter[k] for k in ("quarter", "images_per_second", "driver")}), flush=True)
    table = RunOutput.single(str(out)).dataset().to_table(columns=["uri", "error_kind"])
    uris = table["uri"].to_pylist()
    result = {"images": count, "rows": len(uris), "twice": len(uris) - len(set(uris))}
    result["errors"] = sum(map(bool, table["error_kind"].to_pylist()))
    speed = RunState(str(out)).summary().statistics.steady_images_per_second
    print(json.dumps(result | {"seconds": round(seconds, 1), "steady_images_per_second": speed}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="10000,100000", help="numbers of images, separated by commas")
    counts = [int(count) for count in parser.parse_args().images.split(",")]
    os.environ["RAY_AUTH_MODE"] = "disabled"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for number in range(3):
        cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{number + 2}", object_store_memory=2**29)
    os.environ["RAY_ADDRESS"] = cluster.address
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in range(10):
            path = root / "data" / "nut" / "train" / "good" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(number))
        fit = ["--data", str(root / "data"), "--models", str(root / "models"), "--mounted", str(root), *_TINY]
        subprocess.run([sys.executable, "jobs/fit.py", *fit], cwd=_ROOT, check=True, capture_output=True)
        for count in counts:
            measure(root, count)
    cluster.shutdown()


if __name__ == "__main__":
    main()
