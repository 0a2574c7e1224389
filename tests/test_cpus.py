from __future__ import annotations

import os
from pathlib import Path

import pytest

from stpm.cluster.cpus import usable_cpus

CORES = len(os.sched_getaffinity(0))
# Files under the root, and the limit that they set.
GROUPS = {
    "none": ({}, 10**6),
    "version 2, the root of a container": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "100000 100000\n"},
        1,
    ),
    "version 2, no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 10**6),
    "version 2, a group above": (
        {
            "proc/self/cgroup": "0::/pods/one\n",
            "sys/fs/cgroup/pods/one/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pods/cpu.max": "50000 100000\n",
        },
        1,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:memory:/pod\n4:cpu,cpuacct:/pod\n",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000\n",
        },
        2,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        10**6,
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_usable_cpus_respects_control_groups(name: str, tmp_path: Path) -> None:
    files, limit = GROUPS[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert usable_cpus(tmp_path) == min(CORES, limit)
