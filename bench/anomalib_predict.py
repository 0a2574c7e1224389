"""The peer's side of `score_speed.py`, run by the Python of an environment that has anomalib 2.7 and not this package.

Predicts a folder with anomalib's STFPM and Engine as they come, pictures written, and prints images per second. What
the student has learned has no part in the speed: it is not fitted.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from anomalib.data import PredictDataset
from anomalib.engine import Engine
from anomalib.models import Stfpm
from anomalib_fit import ARCHITECTURE, LAYERS, with_packaged_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("images", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    with_packaged_weights()
    model = Stfpm(backbone=ARCHITECTURE, layers=LAYERS, evaluator=False)
    engine = Engine(accelerator="cpu", default_root_dir=arguments.out, logger=False, enable_progress_bar=False)
    whole = PredictDataset(arguments.images)
    warm = PredictDataset(sorted(arguments.images.iterdir())[0])
    engine.predict(model=model, dataset=warm)
    start = time.perf_counter()
    engine.predict(model=model, dataset=whole)
    seconds = time.perf_counter() - start
    written = sum(path.suffix == ".png" for path in arguments.out.rglob("*"))
    if written < len(whole):
        raise SystemExit(f"{written} pictures for {len(whole)} images")
    print(len(whole) / seconds)


if __name__ == "__main__":
    main()
