"""Mark the false alarms of one night as good, and count alarms and defects found on the next one.

    python bench/feedback.py --data DATA --categories casting,macaroni1 --work WORK

DATA is in the MVTec AD layout. Fits each category on its first images of train/good, so few that its threshold is
rough. Night 5 is every other test image, night 6 the others. Scores night 5, marks as good all good images that raised
an alarm, adds them with `jobs/fit.py --add-normals`, and scores night 6 with the models before and after. `--refit`
fits again with the marked images instead. Prints, for each category, alarms among good and among defective images.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from pathlib import Path

from common import ROOT, job_command, make_parser

from stpm.data import mvtec
from stpm.scoring.output import RunOutput


def link(uris: list[str], folder: Path) -> None:
    """Link images into a folder, numbered."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, uri in enumerate(uris):
        (folder / f"{number:04}{Path(uri).suffix}").symlink_to(uri)


def prepare(data: str, names: list[str], train_images: int, work: Path) -> None:
    """Make the data set to fit on, and the two nights as <work>/nights/<night>/<category>/<good or defect>/."""
    for name in names:
        category = mvtec.read_category(data, name)
        link([uri for uri, _ in category.train[:train_images]], work / "data" / name / "train" / "good")
        for label in (mvtec.GOOD, "defect"):
            uris = [image.uri for image in category.test if (image.label == mvtec.GOOD) == (label == mvtec.GOOD)]
            for night in (5, 6):
                link(uris[night - 5 :: 2], work / "nights" / f"night-{night}" / name / label)


def run(name: str, options: dict[str, object], *flags: str) -> None:
    """Run a job, and print what it says and how long it takes."""
    start = time.perf_counter()
    command = [*job_command(name, options), *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    print(done.stdout, f"{name}: exit code {done.returncode}, {time.perf_counter() - start:.0f} s\n", flush=True)
    if done.returncode not in (0, 2):
        raise SystemExit(done.stderr)


def score(work: Path, images: Path, out: str) -> list[dict[str, str]]:
    """Score a folder, and return a row for each image, with its night, label and verdict."""
    options = {"models": work / "models", "images": images, "out": work / out, "heatmaps": "none", "top": 0}
    run("score", options | {"category-from": "{category}/{truth}/{name}"})
    table = RunOutput.single(str(work / out)).dataset().to_table(columns=["uri", "category", "is_anomalous"])
    rows = []
    for row in table.to_pylist():
        night, _, label, _ = row["uri"].split("/")[-4:]
        rows.append(row | {"night": night, "label": label})
    return rows


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--categories", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--train-images", type=int, default=60)
    parser.add_argument("--refit", action="store_true")
    arguments = parser.parse_args()
    work, names = arguments.work.absolute(), arguments.categories.split(",")
    prepare(arguments.data, names, arguments.train_images, work)
    fit: dict[str, object] = {"data": work / "data", "models": work / "models", "teacher": "demo"}
    run("fit", fit)
    before = score(work, work / "nights", "scored-before")
    nights = {night: [row for row in before if row["night"] == night] for night in ("night-5", "night-6")}
    marked = [row for row in nights["night-5"] if row["is_anomalous"] and row["label"] == mvtec.GOOD]
    marks = work / "marks.jsonl"
    marks.write_text("".join(f"{json.dumps({k: row[k] for k in ('uri', 'category', 'label')})}\n" for row in marked))
    if not arguments.refit:
        del fit["data"]
    run("fit", fit | {"add-normals": marks}, *(["--refit"] if arguments.refit else []))
    nights["night-6, with feedback"] = score(work, work / "nights" / "night-6", "scored-after")
    for night, rows in nights.items():
        for name in names:
            counts = Counter((row["label"], bool(row["is_anomalous"])) for row in rows if row["category"] == name)
            totals = {label: counts[label, True] + counts[label, False] for label in (mvtec.GOOD, "defect")}
            found = ", ".join(f"{counts[label, True]} of {total} {label}" for label, total in totals.items())
            print(f"{night}: {name}: alarms: {found}")


if __name__ == "__main__":
    main()
