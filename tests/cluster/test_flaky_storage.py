"""Scoring through an S3 server that fails, at random or for half a minute: every image gets its row."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import urlsplit

import pytest

from stpm import storage
from stpm.errors import GO_ON
from tests.cluster.conftest import fit, read_rows, run_job, start_job, wait_for, wait_until
from tests.datasets import make_category

pytestmark = pytest.mark.cluster

FAULT_FRACTION, REFUSING_SECONDS = 0.05, 30.0
# Enough that most are still to be decoded when the run stops.
IMAGES = 1200


class FlakyProxy(BaseHTTPRequestHandler):
    """Forward requests, but answer some with 500, with 503, late, with a reset, or with half of the body."""

    protocol_version = "HTTP/1.1"
    upstream = ""
    fault_fraction = 0.0
    refuses_until = 0.0
    # Requests whose path has this part are denied, after this number of them.
    denied: ClassVar[tuple[str, int]] = ("", 0)
    knows_conditions = True
    counts: ClassVar[Counter[str]] = Counter()
    rng = random.Random(0)

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = ""
        if self.rng.random() < self.fault_fraction:
            fault = self.rng.choice(["500", "503", "slow", "reset", "cut"])
        if self.command in ("PUT", "POST") and time.monotonic() < self.refuses_until:
            fault = "503"
        if "If-None-Match" in self.headers and not self.knows_conditions:
            fault = "501"
        self.counts[fault or "forwarded"] += 1
        part, allowed = self.denied
        if part and part in self.path:
            self.counts["deniable"] += 1
            if self.counts["deniable"] > allowed:
                error = b"<Error><Code>ExpiredToken</Code><Message>The token is expired.</Message></Error>"
                self._answer(403, error, {"Content-Type": "application/xml"})
                return
        if fault.isdecimal():
            code = "NotImplemented" if fault == "501" else "SlowDown"
            error = f"<Error><Code>{code}</Code></Error>".encode()
            self._answer(int(fault), error, {"Content-Type": "application/xml"})
            return
        if fault == "reset":
            # Closing without lingering sends RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(2)
        server = http.client.HTTPConnection(self.upstream, timeout=60)
        server.request(self.command, self.path, body, dict(self.headers))
        answer = server.getresponse()
        data = answer.read()
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding", "server")}
        self._answer(answer.status, data, kept, cut=fault == "cut" and len(data) > 1)
        server.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _forward  # noqa: N815

    def _answer(self, status: int, data: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response_only(status)
        if self.command != "HEAD":
            headers = {k: v for k, v in headers.items() if k.lower() != "content-length"} | {
                "Content-Length": str(len(data))
            }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Print no line per request."""


@pytest.fixture
def proxy(s3: dict[str, str]) -> Iterator[dict[str, str]]:
    """Start a proxy without faults; yield the environment in which s3:// goes through it."""
    FlakyProxy.upstream = urlsplit(s3["AWS_ENDPOINT_URL"]).netloc
    FlakyProxy.counts.clear()
    FlakyProxy.fault_fraction = FlakyProxy.refuses_until = 0.0
    FlakyProxy.denied = "", 0
    FlakyProxy.knows_conditions = True
    server = ThreadingHTTPServer(("127.0.0.1", 0), FlakyProxy)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


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


def test_random_faults_lose_no_row(proxy: dict[str, str], options: list[str]) -> None:
    FlakyProxy.fault_fraction = FAULT_FRACTION
    ran = run_job("score", *options, "--out", "s3://bucket/out", **proxy)
    assert ran.returncode == 0, ran.stdout
    assert sum(number for fault, number in FlakyProxy.counts.items() if fault != "forwarded") > 20, FlakyProxy.counts
    check_rows("s3://bucket/out")


@pytest.mark.faults
def test_refused_writes_for_half_a_minute_lose_no_row(proxy: dict[str, str], options: list[str]) -> None:
    out = "s3://bucket/refused"
    process = start_job("score", *options, "--out", out, **proxy)
    wait_until(lambda: bool(storage.files(f"{out}/heatmaps")), "no heatmap was written")
    FlakyProxy.refuses_until = time.monotonic() + REFUSING_SECONDS
    ran = wait_for(process)
    assert FlakyProxy.counts["503"] > 5, FlakyProxy.counts
    if ran.returncode:
        # Retries ended before storage came back: one line reports it, and the same command goes on.
        assert ran.returncode == 2
        assert GO_ON in ran.stderr
        assert "Traceback" not in ran.stderr
        assert run_job("score", *options, "--out", out, **proxy).returncode == 0
    check_rows(out)


def test_a_store_without_conditional_writes_is_named_at_once(proxy: dict[str, str]) -> None:
    FlakyProxy.knows_conditions = False
    options = ["--models", "s3://bucket/models", "--images", "s3://bucket/images", "--category", "nut"]
    ran = run_job("score", *options, "--out", "s3://bucket/unconditional", **proxy)
    assert ran.returncode == 1
    (line,) = ran.stderr.splitlines()
    problem = "s3://bucket/unconditional/.lease/0.json: this store answers 501 to a conditional write"
    assert line.startswith(f"error: {problem}")
    assert line.endswith("such as Amazon S3, Google Cloud Storage or Azure, or on a disk")
    assert FlakyProxy.counts["501"] == 1


def test_expired_credentials_stop_a_run_and_write_no_error_rows(proxy: dict[str, str], options: list[str]) -> None:
    images, out = "s3://bucket/many", "s3://bucket/expired"
    data = storage.read(storage.files("s3://bucket/data/nut/test")[0])
    storage.in_parallel(lambda i: storage.publish(f"{images}/{i:04}.png", data), range(IMAGES))
    options[options.index("--images") + 1] = images
    options += ["--out", out, "--heatmaps", "none", "--rows-per-file", "32"]

    # All are denied soon after the start.
    FlakyProxy.denied = "/many/", 150
    ran = run_job("score", *options, **proxy)
    assert ran.returncode == 2
    assert "of the latest 2" in ran.stderr
    assert "unreadable: PermissionError: The token is expired" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert FlakyProxy.counts["deniable"] < 0.75 * IMAGES
    assert not storage.exists(f"{out}/_SUCCESS")

    # A few of the last are denied: they stay unfinished, unless errors are accepted.
    FlakyProxy.denied = "/many/119", 0
    ran = run_job("score", *options, **proxy)
    assert ran.returncode == 2
    assert "10 images are unfinished" in ran.stdout
    assert "s3://bucket/many/1190.png: unreadable: PermissionError" in ran.stdout
    assert not storage.exists(f"{out}/_SUCCESS")
    ran = run_job("score", *options, "--accept-errors", **proxy)
    assert ran.returncode == 0
    assert f"{IMAGES} rows" in ran.stdout
    assert "10 with an error (10 unreadable)" in ran.stdout
    assert storage.exists(f"{out}/_SUCCESS")
