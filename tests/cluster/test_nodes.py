"""A cluster of several nodes, which are added and killed during a job: its results stay the same."""

import itertools
import os
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from tests.cluster.conftest import (
    DECODER,
    FIT_WORKER,
    SCORER,
    TINY_RECIPE,
    call_job,
    children,
    fit,
    make_images,
    read_rows,
    start_job,
    wait_for_success,
    wait_until,
)
from tests.datasets import fitted_categories, make_category

pytestmark = pytest.mark.cluster

CATEGORIES = ("a", "b", "c", "d")
IMAGES = 1200
# Ray declares a node dead after five seconds without an answer.
HEALTH_CHECKS = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
LONG = ["--epochs", "300", "--cpus-per-worker", "1", "--checkpoint-seconds", "1", "--resize-seconds", "3", *TINY_RECIPE]
ADDRESSES = (f"127.0.0.{number}" for number in itertools.count(2))


def add_node(cluster: Cluster, **environment: str) -> Any:
    """Add a node with an address of its own: a driver runs on the node that has the driver's address."""
    return cluster.add_node(num_cpus=1, node_ip_address=next(ADDRESSES), env_vars=environment)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Start a head that runs no tasks, and two nodes of one CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": HEALTH_CHECKS})
        for _ in range(2):
            add_node(cluster)
        yield cluster
        cluster.shutdown()


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> dict[str, str]:
    return {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make training data, and a collection in which every fiftieth file is broken."""
    root = tmp_path_factory.mktemp("mounted")
    for name in CATEGORIES:
        make_category(str(root / "data"), name, train=12)
    make_images(str(root / "images"), IMAGES, broken=range(0, IMAGES, 50))
    return root


@pytest.fixture(scope="module")
def undisturbed_rows(root: Path, cluster: Cluster, client: dict[str, str]) -> Path:
    """Score the collection without any disturbance, and check that each node works, and the head does not."""
    fit(root / "data", root / "models", "a")
    process = start_job("score", *score_options(root, root / "out"), **client)
    nodes = [cluster.head_node, *cluster.worker_nodes]
    seen: set[tuple[int, str]] = set()
    # A decoding task runs for moments only.
    while process.poll() is None:
        time.sleep(0.1)
        seen |= {(i, title) for i, node in enumerate(nodes) for title in (SCORER, DECODER) if runs(node, title)}
    wait_for_success(process)
    assert seen == {(i, title) for i in (1, 2) for title in (SCORER, DECODER)}
    return root


@pytest.fixture(scope="module")
def undisturbed_students(root: Path, client: dict[str, str]) -> Path:
    wait_for_success(start_job("fit", *fit_options(root, root / "students"), **client))
    return root


def fit_options(root: Path, models: Path) -> list[str]:
    return ["--data", str(root / "data"), "--models", str(models), "--mounted", str(root), "--log", "json", *LONG]


def score_options(root: Path, out: Path) -> list[str]:
    return [
        *("--models", str(root / "models"), "--images", str(root / "images"), "--out", str(out), "--category", "a"),
        *("--mounted", str(root), "--rows-per-file", "64", "--scoring-batch-size", "4", "--max-error-rate", "1"),
    ]


def students(store: Path) -> dict[str, bytes]:
    assert fitted_categories(str(store)) == list(CATEGORIES)
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("student.safetensors")}


def rows(out: Path) -> dict[str, tuple[str, float | None]]:
    found = read_rows(out, "uri", "error_kind", "score")
    assert len(found) == IMAGES
    assert (out / "_SUCCESS").exists()
    return {row["uri"]: (row["error_kind"], row["score"]) for row in found}


def check_same_rows(undisturbed: Path, out: Path) -> None:
    expected, found = rows(undisturbed / "out"), rows(out)
    assert expected.keys() == found.keys()
    for uri, (kind, score) in expected.items():
        assert found[uri] == (kind, score if score is None else pytest.approx(score, rel=1e-5)), uri


def runs(node: Any, title: str) -> bool:
    """Return whether a node runs a process of that title now."""
    return bool(children(node.all_processes["raylet"][0].process.pid, title))


def replace_node(cluster: Cluster, old_title: str, new_title: str, **environment: str) -> None:
    """Add a node once the only one runs `old_title`; kill the old one once the new one runs `new_title`."""
    (old,) = cluster.worker_nodes
    wait_until(lambda: runs(old, old_title), f"the first node runs no {old_title}")
    new = add_node(cluster, **environment)
    wait_until(lambda: runs(new, new_title), f"the new node runs no {new_title}")
    time.sleep(random.uniform(0, 2))
    cluster.remove_node(old, allow_graceful=False)


@pytest.fixture
def one_node(cluster: Cluster) -> None:
    """Remove all nodes but one, and wait until the cluster has noticed it."""
    while len(cluster.worker_nodes) > 1:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    wait_until(
        lambda: sum(node["Alive"] for node in cluster.global_state.node_table()) == 2, "a removed node is still alive"
    )


@pytest.fixture
def connected_here(client: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs in this process use the cluster."""
    for name, value in client.items():
        monkeypatch.setenv(name, value)


def test_a_local_path_is_refused_on_several_machines(root: Path, connected_here: None) -> None:
    data, out = str(root / "data"), root / "elsewhere"
    for job, options in (
        ("fit", ["--data", data, "--models", str(out)]),
        ("score", ["--models", data, "--images", "s3://bucket/images", "--out", str(out), "--category", "a"]),
        ("benchmark", ["--data", data, "--out", str(out)]),
    ):
        ran = call_job(job, *options)
        assert ran.returncode == 1
        (line,) = ran.stderr.splitlines()
        assert "a path of one machine, and the cluster has several" in line
    assert not out.exists()


def test_the_plan_lists_every_node_and_starts_nothing(root: Path, connected_here: None) -> None:
    planned = call_job("fit", *fit_options(root, root / "planned"), "--plan")
    assert planned.returncode == 0
    assert planned.stdout.count("1 at once, 1 CPUs each") == 2
    assert sum("  driver" in line for line in planned.stdout.splitlines()) == 1
    planned = call_job("score", *score_options(root, root / "planned"), "--plan")
    assert planned.stdout.count("1 scorer of 0.5001 CPU; 4 tasks that fetch, decode and write") == 2
    assert not (root / "planned").exists()


def test_scoring_uses_a_new_node_and_survives_the_loss_of_one(
    undisturbed_rows: Path, one_node: None, cluster: Cluster, client: dict[str, str], tmp_path: Path
) -> None:
    """The new node has another version of a library, which the job reports."""
    out = undisturbed_rows / "after"
    process = start_job("score", *score_options(undisturbed_rows, out), **client)
    # Ray starts no second scorer for this tiny model, but more tasks that fetch, decode and write.
    timm = tmp_path / "timm-0.1.dist-info" / "METADATA"
    timm.parent.mkdir()
    timm.write_text("Name: timm\nVersion: 0.1\n")
    replace_node(cluster, SCORER, "MapBatches", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    log = wait_for_success(process)
    assert len(re.findall(r"this run began with timm \S+, but node 127\.0\.0\.\d+ has timm 0\.1: ", log)) == 1
    check_same_rows(undisturbed_rows, out)


@pytest.mark.faults
def test_fitting_uses_a_new_node_and_survives_the_loss_of_one(
    undisturbed_students: Path, one_node: None, cluster: Cluster, client: dict[str, str]
) -> None:
    store = undisturbed_students / "students-after"
    process = start_job("fit", *fit_options(undisturbed_students, store), **client)
    replace_node(cluster, FIT_WORKER, FIT_WORKER)
    assert "4 of 4 categories are fitted" in wait_for_success(process)
    assert students(store) == students(undisturbed_students / "students")


@pytest.mark.faults
def test_fitting_on_nodes_that_are_replaced_quarantines_no_category(
    undisturbed_students: Path, one_node: None, cluster: Cluster, client: dict[str, str]
) -> None:
    """As with spot nodes: the group comes back with the same size, which does not show that a task crashed it."""
    store = undisturbed_students / "students-replaced"
    process = start_job("fit", *fit_options(undisturbed_students, store), **client)
    for _ in range(3):
        (node,) = cluster.worker_nodes
        wait_until(lambda node=node: runs(node, FIT_WORKER), "the node runs no worker")  # type: ignore[misc]
        time.sleep(random.uniform(5, 8))
        cluster.remove_node(node, allow_graceful=False)
        add_node(cluster)
    assert "4 of 4 categories are fitted" in wait_for_success(process)
    assert students(store) == students(undisturbed_students / "students")
