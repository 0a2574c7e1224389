"""The number of CPUs that a process may use, in a container too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """Count the CPUs that this process may use: its affinity, limited by its control groups.

    Args:
        root: folder with /proc and /sys, for tests.
    """
    return max(min([len(os.sched_getaffinity(0)), *map(ceil, _cpu_limits(root))]), 1)


def _cpu_limits(root: Path) -> Iterator[float]:
    """Yield the limit of each control group above this process, in CPUs.

    In a container, the process's own group is often the root of the visible tree.
    """
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        # Version 2 has one line, without controllers. Version 1 has one for each set of controllers.
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        tree = groups / "cpu" if controllers else groups
        group = tree / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(tree) and (limit := _cpu_limit(folder)):
                yield limit


def _cpu_limit(folder: Path) -> float | None:
    """Read the limit of one control group, version 2 or 1, in CPUs; None if it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):
        return None
