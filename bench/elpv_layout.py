"""Write the solar cells of the package `elpv-dataset` in the MVTec AD layout: products that nothing was tuned to.

    pip install elpv-dataset
    python bench/elpv_layout.py --data DATA
    python bench/recipes.py --data DATA --kinds real --seeds 0 --out elpv.jsonl

The categories are `mono` and `poly`, for monocrystalline and polycrystalline cells. Cells that experts called good with
certainty are good, four of five of them to fit on; those called defective with certainty are defects. The rest, on
which the experts differ, are left out. There are no masks. The images are licensed CC BY-NC-SA 4.0 and are only
measured with (Buerhop-Lutz et al., "A Benchmark for Visual Identification of Defective Solar Cells", 2018).
"""

from __future__ import annotations

import csv
import shutil
from importlib.util import find_spec
from pathlib import Path

from commands import make_parser

_TEST_EVERY = 5


def write_layout(package: Path, data: Path) -> None:
    """Copy the images of a package's folder to `data`."""
    good = {"mono": 0, "poly": 0}
    with (package / "data" / "labels.csv").open() as file:
        for name, probability, kind in csv.reader(file, delimiter=" ", skipinitialspace=True):
            if float(probability) == 0:
                folder = "train/good" if good[kind] % _TEST_EVERY else "test/good"
                good[kind] += 1
            elif float(probability) == 1:
                folder = "test/defect"
            else:
                continue
            target = data / kind / folder / Path(name).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package / "data" / name, target)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        parser.error("elpv_dataset is not installed; pip install elpv-dataset")
    write_layout(Path(spec.origin).parent, arguments.data)


if __name__ == "__main__":
    main()
