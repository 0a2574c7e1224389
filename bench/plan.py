"""What a pass over many images takes on nodes that are not there yet: how many of which, hours, and money.

    python bench/plan.py --run OUT --images 1000000 --scoring g6.2xlarge:8:1:0.98 --helping c7i.4xlarge:16:0:0.71

From a run folder of the score job (some thousand images on one such node do) it takes the seconds per image of each
stage. Nodes are NAME:CPUS:GPUS:PRICE, the price of an hour in any currency; `--helping` nodes fetch, decode and write
where the scoring nodes' own cores do not keep up, and are left out where they do not pay. The first line says how well
the same arithmetic tells the speed of the run that it was taken from.
"""

from __future__ import annotations

import argparse
import sys

from tabulate import tabulate

from stpm import storage
from stpm.errors import StpmError
from stpm.scoring.capacity import Cost, NodeKind, balanced
from stpm.scoring.resuming.run_state import RunState

_NODES = (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="run folder of the score job")
    parser.add_argument("--images", type=float, required=True, help="number of images to plan for")
    parser.add_argument("--scoring", required=True, help="nodes that score, as NAME:CPUS:GPUS:PRICE")
    parser.add_argument("--helping", help="nodes that do all else, written the same")
    parser.add_argument("--start-minutes", type=float, default=5.0, help="until a new node works")
    asked = parser.parse_args()
    try:
        effort = RunState(storage.absolute(asked.run)).effort()
        cost = Cost.of(effort)
        kind = NodeKind.parse(asked.scoring)
        helper = NodeKind.parse(asked.helping) if asked.helping else None
        hours = asked.start_minutes / 60
        plans = [balanced(cost, int(asked.images), nodes, kind, helper, hours) for nodes in _NODES]
    except StpmError as error:
        sys.exit(f"error: {error}")
    planned, was = cost.images_per_second(effort.cpus, effort.gpus), effort.steady_images_per_second
    print(
        f"per image: {1e3 * cost.decode:.2f} ms decode, {1e3 * cost.forward:.2f} ms forward on a {effort.device}, "
        f"{1e3 * cost.encode:.2f} ms encode; that run, on {effort.cpus:g} CPUs and {effort.gpus:g} GPUs: "
        f"{planned:.1f} images/s by this plan, {was:.1f} measured ({planned / was:.2f})"
    )
    rows = [[p.scoring, p.helping, p.images_per_second, p.hours, p.money] for p in plans]
    names = [kind.name, helper.name if helper else "helping", "images/s", "hours", "money"]
    print(tabulate(rows, names, floatfmt=("", "", ".0f", ".1f", ".2f")))


if __name__ == "__main__":
    main()
