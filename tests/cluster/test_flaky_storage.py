"""Scoring through an S3 server that fails, at random or for half a minute: every image gets its row."""

import io
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import fsspec
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.server import MotoRequestHandler
from werkzeug.serving import make_server
from werkzeug.test import run_wsgi_app

from stpm import storage
from stpm.errors import HOW_TO_CONTINUE
from tests.cluster.conftest import call_job, fit, own_ray, read_rows, run_job, start_job, wait_for, wait_until
from tests.datasets import make_category

pytestmark = pytest.mark.cluster

FAULT_FRACTION, REFUSING_SECONDS = 0.05, 30.0
# Enough that most are still to be decoded when the run stops.
IMAGES = 1000
ERRORS = {
    "403": "<Error><Code>ExpiredToken</Code><Message>The token is expired.</Message></Error>",
    "500": "<Error><Code>SlowDown</Code></Error>",
    "501": "<Error><Code>NotImplemented</Code></Error>",
    "503": "<Error><Code>SlowDown</Code></Error>",
}


class Flaky:
    """The application of the S3 server, but some requests are answered with an error, late, cut off or with a reset."""

    def __init__(self) -> None:
        self.app = DomainDispatcherApplication(create_backend_app)
        self.fault_fraction = self.refuses_until = 0.0
        # Requests whose path has this part are denied, after this number of them.
        self.denied = "", 0
        self.knows_conditions = True
        self.counts: Counter[str] = Counter()
        self.environment: dict[str, str] = {}
        self.rng = random.Random(0)

    def choose_fault(self, request: dict[str, Any]) -> str:
        part, allowed = self.denied
        if part and part in request["PATH_INFO"]:
            self.counts["deniable"] += 1
            if self.counts["deniable"] > allowed:
                return "403"
        if "HTTP_IF_NONE_MATCH" in request and not self.knows_conditions:
            return "501"
        if request["REQUEST_METHOD"] in ("PUT", "POST") and time.monotonic() < self.refuses_until:
            return "503"
        is_faulty = self.rng.random() < self.fault_fraction
        return self.rng.choice(["500", "503", "slow", "reset", "cut"]) if is_faulty else ""

    def __call__(self, request: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        fault = self.choose_fault(request)
        self.counts[fault or "answered"] += 1
        # A request that is not read to its end would be reset.
        request["wsgi.input"] = io.BytesIO(request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0)))
        if fault in ERRORS:
            start_response(
                f"{fault} -", [("Content-Type", "application/xml"), ("Content-Length", str(len(ERRORS[fault])))]
            )
            return [ERRORS[fault].encode()]
        if fault == "reset":
            # Closing without lingering sends RST. Its descriptor is closed: the server's handler holds the socket.
            connection = request["werkzeug.socket"]
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(connection.detach())
            raise ConnectionAbortedError
        if fault == "slow":
            time.sleep(2)
        body, status, headers = run_wsgi_app(self.app, request, buffered=True)
        start_response(status, list(headers))
        data = b"".join(body)
        return [data[: len(data) // 2] if fault == "cut" and len(data) > 1 else data]


@pytest.fixture
def flaky(s3: dict[str, str]) -> Iterator[Flaky]:
    """Start another server with the bucket of `s3`, without faults yet. `start_job(**flaky.environment)` uses it."""
    server = Flaky()
    serving = make_server("127.0.0.1", 0, server, threaded=True, request_handler=MotoRequestHandler)
    # After a reset its thread finds no connection, and would print that.
    serving.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    server.environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{serving.server_port}"}
    yield server
    serving.shutdown()


@pytest.fixture
def options(s3: dict[str, str]) -> list[str]:
    """Fit a model if there is none; return the options of a score job that uses it."""
    if not storage.exists("s3://bucket/models"):
        make_category("s3://bucket/data", "nut", good=150, defects=50)
        fit("s3://bucket/data", "s3://bucket/models")
    models, images = "s3://bucket/models", "s3://bucket/data/nut/test"
    return ["--models", models, "--images", images, "--category", "nut", "--scorers", "1"]


def check_rows(out: str) -> None:
    rows = read_rows(out, "uri", "error_kind")
    assert sorted(row["uri"] for row in rows) == storage.files("s3://bucket/data/nut/test")
    assert {row["error_kind"] for row in rows} == {""}


def test_random_faults_lose_no_row(flaky: Flaky, options: list[str]) -> None:
    flaky.fault_fraction = FAULT_FRACTION
    ran = run_job("score", *options, "--out", "s3://bucket/out", **flaky.environment)
    assert ran.returncode == 0, ran.stdout
    assert sum(number for fault, number in flaky.counts.items() if fault != "answered") > 20, flaky.counts
    check_rows("s3://bucket/out")


@pytest.mark.faults
def test_refused_writes_for_half_a_minute_lose_no_row(flaky: Flaky, options: list[str]) -> None:
    out = "s3://bucket/refused"
    process = start_job("score", *options, "--out", out, **flaky.environment)
    wait_until(lambda: bool(storage.files(f"{out}/heatmaps")), "no heatmap was written")
    flaky.refuses_until = time.monotonic() + REFUSING_SECONDS
    ran = wait_for(process)
    assert flaky.counts["503"] > 5, flaky.counts
    if ran.returncode:
        # Retries ended before storage came back: one line reports it, and the same command goes on.
        assert ran.returncode == 2
        assert HOW_TO_CONTINUE in ran.stderr
        assert "Traceback" not in ran.stderr
        assert run_job("score", *options, "--out", out, **flaky.environment).returncode == 0
    check_rows(out)


def test_a_store_without_conditional_writes_is_named_at_once(flaky: Flaky) -> None:
    flaky.knows_conditions = False
    options = ["--models", "s3://bucket/models", "--images", "s3://bucket/images", "--category", "nut"]
    ran = run_job("score", *options, "--out", "s3://bucket/unconditional", **flaky.environment)
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    problem = "s3://bucket/unconditional/.lease/0.json: this store answers 501 to a conditional write"
    assert line.startswith(f"error: {problem}")
    assert line.endswith("such as Amazon S3, Google Cloud Storage or Azure, or on a disk")
    assert flaky.counts["501"] == 1


def test_expired_credentials_stop_a_run_and_write_no_error_rows(
    flaky: Flaky, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = "s3://bucket/many", "s3://bucket/expired"
    data = storage.read(storage.files("s3://bucket/data/nut/test")[0])
    storage.in_parallel(lambda i: storage.publish(f"{images}/{i:04}.png", data), range(IMAGES))
    options[options.index("--images") + 1] = images
    options += ["--out", out, "--heatmaps", "none", "--rows-per-file", "32"]

    # This process and its Ray use the flaky server, too.
    monkeypatch.setenv("AWS_ENDPOINT_URL", flaky.environment["AWS_ENDPOINT_URL"])
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with own_ray():
        # All are denied soon after the start.
        flaky.denied = "/many/", 150
        ran = call_job("score", *options)
        assert ran.returncode == 2
        assert "of the latest 2" in ran.stderr
        assert "unreadable: PermissionError: The token is expired" in ran.stderr
        assert "Traceback" not in ran.stderr
        assert flaky.counts["deniable"] < 0.75 * IMAGES
        assert not storage.exists(f"{out}/_SUCCESS")

        # A few of the last are denied: they stay unfinished, unless errors are accepted.
        flaky.denied = "/many/099", 0
        ran = call_job("score", *options)
        assert ran.returncode == 2
        assert "10 images are unfinished" in ran.stdout
        assert "s3://bucket/many/0990.png: unreadable: PermissionError" in ran.stdout
        assert not storage.exists(f"{out}/_SUCCESS")
        ran = call_job("score", *options, "--accept-errors")
        assert ran.returncode == 0
        assert f"{IMAGES} rows" in ran.stdout
        assert "10 with an error (10 unreadable)" in ran.stdout
        assert storage.exists(f"{out}/_SUCCESS")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
