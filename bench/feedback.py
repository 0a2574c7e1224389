"""Mark the false alarms of one night as good, and count alarms on the next one, before and after.

    python bench/feedback.py --data DATA --categories casting,commutator --teacher demo

DATA is in the MVTec AD layout. Fits each category on its first images of train/good, so few that its threshold is
rough. Night 5 is every other test image, night 6 the others. Adds good images of night 5 as `stpm fit --add-good`
does: those that raise an alarm, and, beginning again with the fitted model, all of them. Prints the alarms of both
nights, and those of night 6 with each feedback. Everything runs in this process; `--student none` leaves the student
out.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from commands import make_parser, words
from local_fit import make_task, run_task

from stpm.data import mvtec
from stpm.detector import load
from stpm.fitting.options import FitOptions, WorkerOptions
from stpm.jobs.fit import run_fit
from stpm.method.calibration import threshold
from stpm.method.recipe import PRESETS
from stpm.models.store import ModelStore
from stpm.options import ClusterOptions, Names


def score(store: ModelStore, name: str, images: Sequence[mvtec.TestImage]) -> npt.NDArray[np.float32]:
    """Return the score of each image by the category's current model."""
    results = load(store.uri, name).score(image.uri for image in images)
    return np.array([result.score for result in results if not result.error], np.float32)


def measure(store: ModelStore, data: str, category: mvtec.Category, work: Path, rate: float) -> None:
    """Give feedback on night 5, and print the alarms of both nights."""
    name, good = category.name, np.array([image.label == mvtec.GOOD for image in category.test])
    # Scores stay the same when a model is calibrated again.
    scores = score(store, name, category.test)
    # Every other image of each label.
    ranks = np.where(good, np.cumsum(good), np.cumsum(~good))
    nights = {night: ranks % 2 == night % 2 for night in (5, 6)}

    def alarms() -> npt.NDArray[np.bool_]:
        return scores > threshold(store.load(name).calibration.scores, rate)

    def report(night: int, feedback: str) -> None:
        parts = {"good": nights[night] & good, "defective": nights[night] & ~good}
        counts = [f"{(alarms() & part).sum()} of {part.sum()} {kind}" for kind, part in parts.items()]
        print(f"{name}, night {night}, {feedback}: alarms {', '.join(counts)}", flush=True)

    report(5, "no feedback")
    report(6, "no feedback")
    before = store.versions(name)
    for feedback, marked in (("its alarms", nights[5] & good & alarms()), ("all of it", nights[5] & good)):
        marks = work / f"{name}.jsonl"
        lines = [{"uri": category.test[i].uri, "category": name, "label": "good"} for i in np.flatnonzero(marked)]
        marks.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        start = time.perf_counter()
        options = FitOptions(models=store.uri, false_alarm_rate=rate, add_good=str(marks), allow=Names((data,)))
        run_fit(options, PRESETS["default"], WorkerOptions(), ClusterOptions())
        report(6, f"{len(lines)} good images of night 5 added ({feedback}) in {time.perf_counter() - start:.1f} s")
        store.set_versions(name, before)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="local data set in the MVTec AD layout")
    parser.add_argument("--categories", type=words, required=True, help="separated by commas")
    parser.add_argument("--teacher", default="demo", help="as for the fit job (default: demo)")
    parser.add_argument("--student", default="stpm", help="as for the fit job (default: stpm)")
    parser.add_argument("--train-images", type=int, default=15, help="images to fit on, the first ones (default: 15)")
    parser.add_argument("--false-alarm-rate", type=float, default=0.05, help="of the thresholds (default: 0.05)")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("stpm.line").setLevel(logging.INFO)
    recipe = replace(PRESETS["default"], teacher=arguments.teacher, student=arguments.student)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        store = ModelStore(str(work / "models"))
        for name in arguments.categories:
            category = mvtec.read_category(arguments.data, name)
            run_task(make_task(store, replace(category, train=category.train[: arguments.train_images]), recipe))
            measure(store, arguments.data, category, work, arguments.false_alarm_rate)


if __name__ == "__main__":
    main()
