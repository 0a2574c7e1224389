"""Ten simulated nights of real products on an S3 server of this machine, with faults on nights 6 to 9.

    python bench/ten_nights.py --data DATA [--categories a,b] [--images 60] [--disturb] [--out FOLDER]

Half of each category's training images fit its model; a night has images of the other half and of the good test
images, and one or two defects. On nights 6 to 9 the camera of the first category sees 10 % brighter, is out of focus,
is moved by 5 %, and takes no image; that of the second takes the same image all night 9. Runs the nightly job for each
night, and prints the verdicts. Copies nightly.html and nightly.json to `--out`. Needs the extras `demo` and `test`.

With `--disturb`, half of the first three nights' images come while the job runs, the job is killed at a random moment
and started again, and a few files come a night late. In the end the rows are compared with those of one undisturbed run
of the score job over all images.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import requests
from camera_faults import blur, brighten, move, open_image
from commands import kill_after, make_parser, run_job, words
from moto.server import ThreadedMotoServer
from PIL import Image
from tabulate import tabulate

from stpm import storage
from stpm.data import mvtec
from stpm.data.encode import encode_jpeg
from stpm.scoring.output import RunOutput
from stpm.scoring.output_rows import open_rows

_FIRST = datetime.date(2026, 11, 15)
_NIGHTS = 10
# What the camera of the first category does, by night: its name, and the image that it takes; None if it takes none.
_FAULTS: dict[int, tuple[str, Callable[[Image.Image], Image.Image] | None]] = {
    5: ("10 % brighter", partial(brighten, factor=1.1)),
    6: ("out of focus", partial(blur, share=0.01)),
    7: ("moved by 5 %", partial(move, right=0.05, down=0.0)),
    8: ("no image", None),
}
# The night of which the camera of the second category takes the same image.
_REPEATED = 8
# The share of defects in a night's images.
_DEFECTS = 0.03
# With --disturb: the first nights, in which the job is killed, and the files of each that come a night late.
_DISTURBED = 3
_LATE = 3
_DATA, _DUMP, _OUT, _MODELS = (f"s3://plant/{name}" for name in ("data", "dump", "nights", "models"))
# A memory without a student is enough: this measures the nights, not the models.
_FIT = {"teacher": "demo", "size": 128, "student": "none"}


class Product:
    """A category's images: those that its model is fitted on, other good ones, and defects."""

    def __init__(self, data: str, name: str, number: int) -> None:
        category = mvtec.read_category(data, name)
        order = np.random.default_rng(number).permutation(len(category.train))
        half = len(order) // 2
        self.name, self.number = name, number
        self.training = [open_image(category.train[i][0]) for i in order[:half]]
        good = [test.uri for test in category.test if test.label == mvtec.GOOD]
        self._good = [*(category.train[i][0] for i in order[half:]), *good]
        self._defects = [test.uri for test in category.test if test.label != mvtec.GOOD]

    def night(self, night: int, count: int) -> Iterator[bytes]:
        """Yield `count` image files of the night with this number, from 0; none if the camera takes none."""
        rng = np.random.default_rng((self.number, night))
        defects = rng.choice(self._defects, max(round(_DEFECTS * count), 1), replace=False)
        uris = [*rng.choice(self._good, count - len(defects), replace=False), *defects]
        if self.number == 1 and night == _REPEATED:
            uris = uris[:1] * count
        faulty = self.number == 0 and night in _FAULTS
        change = _FAULTS[night][1] if faulty else lambda image: image
        if change is not None:
            for uri in uris:
                yield encode_jpeg(change(open_image(uri)))

    def planted(self, night: int) -> str:
        """Name the fault of a night; "" if there is none."""
        if self.number == 1 and night == _REPEATED:
            return "one image repeated"
        return _FAULTS[night][0] if self.number == 0 and night in _FAULTS else ""


def upload(files: Mapping[str, bytes]) -> None:
    for uri, data in files.items():
        storage.publish(uri, data)


def simulate(products: Sequence[Product], count: int, disturb: bool) -> None:
    """Upload the images of each night, and run the job for it."""
    options = {"models": _MODELS, "images": f"{_DUMP}/{{date}}", "category-from": "{category}/{name}", "out": _OUT}
    options |= {"settle": "0"}
    late: dict[str, bytes] = {}
    for night in range(_NIGHTS):
        date = _FIRST + datetime.timedelta(days=night)
        files = {
            f"{_DUMP}/{date}/{product.name}/{number:04}.jpg": data
            for product in products
            for number, data in enumerate(product.night(night, count))
        }
        upload(late)
        late = {}
        if disturb and night < _DISTURBED:
            uris = sorted(files, key=lambda uri: uri[::-1])
            late = {uri: files.pop(uri) for uri in uris[:_LATE]}
            half = dict(list(files.items())[::2])
            upload(half)
            seconds = random.uniform(1, 15)  # noqa: S311  no secret
            killed = kill_after("nightly", options | {"date": date}, seconds)
            print(f"{date}: {'killed after' if killed else 'done within'} {seconds:.1f} s", flush=True)
        upload(files)
        run_job("nightly", options | {"date": date})


def table(nights: Sequence[Mapping[str, Any]], products: Sequence[Product]) -> str:
    """Return a row per night and product, from the nights of nightly.json."""
    rows = []
    for number, night in enumerate(nights):
        for product in products:
            found = night["categories"][product.name]
            reason = found["changes"][0]["text"] if found["changes"] else ""
            counts = [found["images"], found["alarms"]]
            rows.append(
                [number + 1, night["date"], product.name, *counts, product.planted(number), found["level"], reason]
            )
    headers = ["night", "date", "category", "images", "alarms", "planted", "verdict", "first reason"]
    return tabulate(rows, headers, "github", maxcolwidths=[None] * 7 + [60])


def compare_with_one_run() -> str:
    """Score all images in one run, and compare its rows with the nights'."""
    out = "s3://plant/undisturbed"
    options = {"models": _MODELS, "images": _DUMP, "category-from": "{category}/{name}", "out": out, "top": 0}
    run_job("score", options)
    names = ["uri", "score", "is_anomalous", "error_kind", "model_id"]
    expected = {row["uri"]: row for row in open_rows(RunOutput.single(out)).to_table(columns=names).to_pylist()}
    folders = [f"{_OUT}/date={_FIRST + datetime.timedelta(days=night)}" for night in range(_NIGHTS)]
    outputs = [output for folder in folders for output in RunOutput.all_named(folder)]
    found = [row for output in outputs for row in open_rows(output).to_table(columns=names).to_pylist()]
    assert sorted(row["uri"] for row in found) == sorted(expected)
    for row in found:
        other = expected[row["uri"]]
        assert np.isclose(row.pop("score"), other.pop("score"), rtol=1e-4)
        assert row == other
    return (
        f"{len(found)} rows of {len(outputs)} runs, each image once, are those of one undisturbed run over all images"
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", required=True, help="data set in the MVTec AD layout")
    parser.add_argument("--categories", type=words, default="", help="two or more, separated by commas (default: all)")
    parser.add_argument("--images", type=int, default=60, help="images of a night and category (default: 60)")
    parser.add_argument("--disturb", action="store_true", help="late files, and kills")
    parser.add_argument("--out", default="", help="local folder for the page")
    options = parser.parse_args()
    # The server logs a line for each request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys, AWS_ENDPOINT_URL=f"http://{host}:{port}")
    requests.put(f"http://{host}:{port}/plant", timeout=10).raise_for_status()

    names = mvtec.find_categories(options.data, options.categories)
    products = [Product(options.data, name, number) for number, name in enumerate(names)]
    start = time.perf_counter()
    for product in products:
        for number, image in enumerate(product.training):
            storage.publish(f"{_DATA}/{product.name}/train/good/{number:04}.jpg", encode_jpeg(image))
    run_job("fit", {"data": _DATA, "models": _MODELS, **_FIT})
    print(f"fitted {', '.join(names)} in {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    simulate(products, options.images, options.disturb)
    print(f"{_NIGHTS} nights in {time.perf_counter() - start:.0f} s\n", flush=True)
    print(table(json.loads(storage.read(f"{_OUT}/nightly.json"))["nights"], products), flush=True)
    if options.disturb:
        print(f"\n{compare_with_one_run()}", flush=True)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        for name in ("nightly.html", "nightly.json"):
            (Path(options.out) / name).write_bytes(storage.read(f"{_OUT}/{name}"))
    server.stop()


if __name__ == "__main__":
    main()
