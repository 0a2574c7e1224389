"""A cluster of several nodes, each with processes of its own: nodes die, nodes come, and the results are the same."""

from __future__ import annotations

import contextlib
import itertools
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.dataset as ds
import pytest
from ray.cluster_utils import Cluster

from stpm.models.store import ModelStore
from tests.cluster.conftest import TINY_RECIPE, run_job, start_job, wait_until
from tests.datasets import encoded, make_category

pytestmark = pytest.mark.cluster

CATEGORIES = ("a", "b", "c", "d")
IMAGES = 2000
SCORER, DECODER = "MapWorker(MapBatches(ScorerActor))", "MapBatches(Decode"
# A node that is gone is missed after five seconds, and one that is slow to answer is not.
QUICKLY_MISSED = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
LONG = ["--epochs", "300", "--cpus-per-worker", "1", "--checkpoint-seconds", "1", "--resize-seconds", "3", *TINY_RECIPE]


NUMBERS = itertools.count(2)


def add_node(cluster: Cluster) -> Any:
    """With an address of its own: a driver goes to a node of its own address, and must not go to one that is lost."""
    return cluster.add_node(num_cpus=1, node_ip_address=f"127.0.0.{next(NUMBERS)}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that takes no work, and two nodes of one CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": QUICKLY_MISSED})
        for _ in range(2):
            add_node(cluster)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> dict[str, str]:
    return {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training data, and a collection in which every fiftieth file is broken."""
    root = tmp_path_factory.mktemp("mounted")
    for name in CATEGORIES:
        make_category(str(root / "data"), name, train=12)
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    for i in range(IMAGES):
        data = encoded(rng.integers(90, 130, (48, 40, 3), dtype=np.uint8))
        (root / "images" / f"{i:04}.png").write_bytes(data[:40] if i % 50 == 0 else data)
    return root


@pytest.fixture(scope="module")
def undisturbed_rows(root: Path, cluster: Cluster, client: dict[str, str]) -> Path:
    """Of a cluster in which nothing happens, but that each node works, and the head does not."""
    fit = ["--data", str(root / "data"), "--models", str(root / "models"), "--categories", "a", "--epochs", "1"]
    ended(start_job("fit", *fit, "--mounted", str(root), *TINY_RECIPE, **client))
    process = start_job("score", *score_options(root, root / "out"), **client)
    nodes = [cluster.head_node, *cluster.worker_nodes]
    seen: set[tuple[int, str]] = set()
    # A decoding task is there for moments only, so it is looked for again and again.
    while process.poll() is None:
        time.sleep(0.2)
        seen |= {(i, title) for i, node in enumerate(nodes) for title in (SCORER, DECODER) if runs(node, title)}
    ended(process)
    assert seen == {(i, title) for i in (1, 2) for title in (SCORER, DECODER)}
    return root


@pytest.fixture(scope="module")
def undisturbed_students(root: Path, client: dict[str, str]) -> Path:
    ended(start_job("fit", *fit_options(root, root / "students"), **client))
    return root


def fit_options(root: Path, models: Path) -> list[str]:
    return ["--data", str(root / "data"), "--models", str(models), "--mounted", str(root), "--log", "json", *LONG]


def score_options(root: Path, out: Path) -> list[str]:
    return [
        *("--models", str(root / "models"), "--images", str(root / "images"), "--out", str(out), "--category", "a"),
        *("--mounted", str(root), "--rows-per-file", "64", "--scoring-batch-size", "4", "--max-error-rate", "1"),
    ]


def students(store: Path) -> dict[str, bytes]:
    assert ModelStore(str(store)).categories() == list(CATEGORIES)
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("student.safetensors")}


def rows(out: Path) -> dict[str, tuple[str, float | None]]:
    table = ds.dataset(out / "scores").to_table(columns=["uri", "error_kind", "score"]).to_pylist()
    assert len(table) == IMAGES
    assert (out / "_SUCCESS").exists()
    return {row["uri"]: (row["error_kind"], row["score"]) for row in table}


def check_same_rows(undisturbed: Path, out: Path) -> None:
    expected, found = rows(undisturbed / "out"), rows(out)
    assert expected.keys() == found.keys()
    for uri, (kind, score) in expected.items():
        assert found[uri] == (kind, score if score is None else pytest.approx(score, rel=1e-5)), uri


def runs(node: Any, title: str) -> bool:
    """Whether a node runs something of that title now."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for child in raylet.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(child.cmdline()):
                return True
    return False


def ended(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=400)
    print(out, err)
    assert process.returncode == 0
    return out


def come_and_go(cluster: Cluster, title: str, any_work: str) -> None:
    """A node comes, and once it has work the one that was there is gone without a word."""
    (there,) = cluster.worker_nodes
    wait_until(lambda: runs(there, title), f"the node that was there runs no {title}")
    new = add_node(cluster)
    wait_until(lambda: runs(new, any_work), f"the new node runs no {any_work}")
    time.sleep(random.uniform(0, 2))
    cluster.remove_node(there, allow_graceful=False)


@pytest.fixture
def one_node(cluster: Cluster) -> None:
    """And the cluster knows that the others are gone."""
    while len(cluster.worker_nodes) > 1:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    wait_until(lambda: sum(node["Alive"] for node in cluster.global_state.node_table()) == 2, "a node is still there")


def test_a_path_of_one_machine_is_refused_and_nothing_is_written(root: Path, client: dict[str, str]) -> None:
    data, out = str(root / "data"), root / "elsewhere"
    for job, options in (
        ("fit", ["--data", data, "--models", str(out)]),
        ("score", ["--models", data, "--images", "s3://bucket/images", "--out", str(out), "--category", "a"]),
        ("benchmark", ["--data", data, "--out", str(out)]),
    ):
        ran = run_job(job, *options, **client)
        assert ran.returncode == 1
        assert "a path of one machine, and the cluster has several" in ran.stderr
        assert "Traceback" not in ran.stderr
    assert not out.exists()


def test_the_plan_names_every_node_and_starts_nothing(root: Path, client: dict[str, str]) -> None:
    ran = run_job("fit", *fit_options(root, root / "planned"), "--plan", **client)
    assert ran.returncode == 0
    assert ran.stdout.count("1 at once, 1 CPUs each") == 2
    assert "driver, queue, progress" in ran.stdout
    assert not (root / "planned").exists()
    ran = run_job("score", *score_options(root, root / "planned"), "--plan", **client)
    assert ran.stdout.count("1 scorers of 0.5001 CPU; 4 tasks that fetch, decode and write") == 2
    assert not (root / "planned").exists()


def test_a_pass_takes_in_a_node_that_comes_and_loses_one_and_not_one_row(
    undisturbed_rows: Path, one_node: None, cluster: Cluster, client: dict[str, str]
) -> None:
    out = undisturbed_rows / "after"
    process = start_job("score", *score_options(undisturbed_rows, out), **client)
    # A scorer as small as this one needs no second: what is short is who fetches, decodes and writes for it.
    come_and_go(cluster, SCORER, "MapBatches")
    ended(process)
    check_same_rows(undisturbed_rows, out)


@pytest.mark.faults
def test_a_fit_takes_in_a_node_that_comes_and_loses_one_and_not_one_bit(
    undisturbed_students: Path, one_node: None, cluster: Cluster, client: dict[str, str]
) -> None:
    store = undisturbed_students / "students-after"
    process = start_job("fit", *fit_options(undisturbed_students, store), **client)
    come_and_go(cluster, "TrainWorker", "TrainWorker")
    assert "4 of 4 categories have a model" in ended(process)
    assert students(store) == students(undisturbed_students / "students")


@pytest.mark.faults
def test_nodes_that_are_replaced_as_they_are_lost_cost_no_category(
    undisturbed_students: Path, one_node: None, cluster: Cluster, client: dict[str, str]
) -> None:
    """As spot nodes are: the group comes back as large as it was, and no task is to blame."""
    store = undisturbed_students / "students-replaced"
    process = start_job("fit", *fit_options(undisturbed_students, store), **client)
    for _ in range(3):
        (there,) = cluster.worker_nodes
        wait_until(lambda there=there: runs(there, "TrainWorker"), "the node runs no worker")  # type: ignore[misc]
        time.sleep(random.uniform(5, 8))
        cluster.remove_node(there, allow_graceful=False)
        add_node(cluster)
    assert "4 of 4 categories have a model" in ended(process)
    assert students(store) == students(undisturbed_students / "students")
