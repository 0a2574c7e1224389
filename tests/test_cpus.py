import os
from pathlib import Path

import pytest

from stpm.cluster.cpus import usable_cpus

V1, V2 = "sys/fs/cgroup/cpu/pod/cpu.cfs", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        (None, {}, None),
        # Version 2: in the root of a container; without a limit; in a group above.
        ("0::/", {f"{V2}/cpu.max": "100000 100000"}, 1),
        ("0::/", {f"{V2}/cpu.max": "max 100000"}, None),
        ("0::/pods/one", {f"{V2}/pods/one/cpu.max": "max 100000", f"{V2}/pods/cpu.max": "50000 100000"}, 1),
        # Version 1.
        ("5:memory:/pod\n4:cpu,cpuacct:/pod", {f"{V1}_quota_us": "150000", f"{V1}_period_us": "100000"}, 2),
        ("4:cpu,cpuacct:/pod", {f"{V1}_quota_us": "-1", f"{V1}_period_us": "100000"}, None),
    ],
)
def test_usable_cpus_respects_control_groups(
    groups: str | None, files: dict[str, str], limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, text in (files | ({"proc/self/cgroup": groups} if groups else {})).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cpus(tmp_path) == (limit or 8)
