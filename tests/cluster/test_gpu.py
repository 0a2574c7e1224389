"""A GPU that Ray assigns and torch cannot use: jobs end with one line that says so, and do not compute on the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster

from stpm import storage
from stpm.fitting import fit_categories
from stpm.method.arithmetic import Capabilities
from stpm.models.store import ModelStore
from stpm.scoring import pipeline
from tests.cluster.conftest import TINY_RECIPE, call_job, fit
from tests.datasets import make_category

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU of this machine"),
    pytest.mark.usefixtures("cluster"),
]

REASON = f"torch {torch.__version__} cannot use the GPU of "


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Start a node with a GPU, for the jobs of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        # Ray Train would ask the dashboard, which this cluster has not, and wait for it.
        patch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield
        cluster.shutdown()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    make_category(str(root / "data"), "nut", train=6)
    fit(root / "data", root / "models")
    return root


def options(name: str, root: Path, out: Path) -> list[str]:
    if name == "fit":
        return ["--data", str(root / "data"), "--models", str(out), "--epochs", "1", *TINY_RECIPE]
    images = str(root / "data" / "nut" / "test")
    return ["--models", str(root / "models"), "--images", images, "--category", "nut", "--out", str(out)]


@pytest.mark.parametrize("trusting", [False, True])
@pytest.mark.parametrize("name", ["fit", "score"])
def test_a_gpu_that_torch_cannot_use_ends_the_job_with_one_line(
    name: str,
    trusting: bool,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if trusting:
        # The driver believes that the nodes' GPUs work: then they are lost before a worker or a scorer starts.
        for module in (fit_categories, pipeline):
            monkeypatch.setattr(module, "examine_devices", lambda gpus: [Capabilities(True, True, False)])
    ended = call_job(name, *options(name, root, tmp_path / "out"))
    # Of a fit that has begun, each category has its line in the log. Ray Data has lines of its own about a lost scorer.
    in_log = name == "fit" and trusting
    found = [line for line in (ended.stdout if in_log else ended.stderr).splitlines() if REASON in line]
    assert len(found) == 1
    assert "install a torch that is built for CUDA" in found[0]
    assert trusting or ended.stderr.splitlines() == found
    assert "Traceback" not in "".join(capfd.readouterr())
    assert ended.returncode == (3 if in_log else 2)
    assert not storage.files(f"{tmp_path}/out/scores")


def test_without_gpus_per_worker_a_fit_computes_on_cpus(root: Path, tmp_path: Path) -> None:
    assert call_job("fit", *options("fit", root, tmp_path), "--gpus-per-worker", "0").returncode == 0
    assert ModelStore(str(tmp_path)).record("nut").fit.device.startswith("cpu, ")
