"""Images and results in Google's and Azure's storage: their own clients, with emulators as servers."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stpm import storage
from tests.cluster.conftest import call_job, fit, free_port, read_rows, run_job, wait_until
from tests.datasets import make_category

pytestmark = pytest.mark.cluster

# The account that Azurite always has; its key is public.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("fit"))
    make_category(f"{root}/data", "nut")
    fit(f"{root}/data", f"{root}/models")
    return f"{root}/models"


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("gcsfs", reason="gcsfs is not installed: gs:// is not tested")
    server = pytest.importorskip("gcp_storage_emulator.server", reason="no emulator of gs:// is installed")

    def refuse(request: Any, response: Any, storage: Any) -> None:
        """Refuse to move objects, which the emulator cannot: the client then copies and removes."""
        response.status = 400

    monkeypatch.setattr(server, "HANDLERS", ((r"^.*/moveTo/.*$", {"POST": refuse}), *server.HANDLERS))
    port = free_port()
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    running.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("FSSPEC_GCS_TOKEN", "anon")
    # Otherwise the client asks for the kind of bucket by a protocol that the emulator does not have.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    yield "gcs://bucket"
    running.stop()


@pytest.fixture
def azure(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("adlfs", reason="adlfs is not installed: abfs:// is not tested")
    azurite = shutil.which("azurite-blob")
    if not azurite:
        pytest.skip("azurite-blob is not on the path: abfs:// is not tested")
    port = free_port()
    options = ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen([azurite, *options, "--blobHost", "127.0.0.1", "--blobPort", str(port)])

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    endpoint = (
        f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint=http://127.0.0.1:{port}"
    )
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", f"{endpoint}/{ACCOUNT};")
    try:
        wait_until(answers, "Azurite does not answer")
        storage.filesystem("abfs://bucket")[0].mkdir("bucket")
        yield f"abfs://bucket@{ACCOUNT}.dfs.core.windows.net"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize("cloud", ["google", "azure"])
def test_a_collection_in_a_cloud_is_scored_into_the_same_cloud(
    cloud: str, models: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    root: str = request.getfixturevalue(cloud)
    make_category(f"{root}/data", "nut")
    for uri in storage.files(models):
        storage.publish(f"{root}/models/{uri.removeprefix(f'{models}/')}", storage.read(uri))
    images = [f"{root}/data/nut/train", f"{root}/data/nut/test/**/*.png"]
    score = ["--models", f"{root}/models", "--images", ",".join(images), "--category", "nut", "--scorers", "1"]
    assert run_job("score", *score, "--out", f"{root}/run").returncode == 0
    rows = read_rows(f"{root}/run", "uri", "error_kind", "heatmap")
    scored = [uri for uri in storage.files(f"{root}/data/nut") if "/ground_truth/" not in uri]
    assert sorted(row["uri"] for row in rows) == sorted(scored)
    assert all(uri.startswith(f"{root}/data/nut/") for uri in scored)
    assert all(storage.read(f"{root}/run/{row['heatmap']}") and not row["error_kind"] for row in rows)
    again = call_job("score", *score, "--out", f"{root}/run")
    assert "scored already" in again.stdout
    no_bucket = call_job("score", *score, "--out", f"{root.replace('bucket', 'nobucket')}/run")
    assert no_bucket.returncode == 1
    assert "no such bucket or container" in no_bucket.stderr.splitlines()[-1]
