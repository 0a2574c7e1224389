"""The number of CPUs that a process may use, in a container too.

joblib and loky know the root control group only; a limit of systemd, SLURM or docker --cgroupns=host is below it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
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
    lines: list[str] = []
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    for line in lines:
        # Version 2 has one line, without controllers. Version 1 has one for each set of controllers.
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        tree = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        group = tree / path.strip("/")
        for folder in (group, *group.parents):
            # A group without a limit has the quota -1, or max.
            with suppress(OSError, ValueError):
                quota, period = map(float, " ".join((folder / file).read_text() for file in files).split())
                if folder.is_relative_to(tree) and quota > 0:
                    yield quota / period
