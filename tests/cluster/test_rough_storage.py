"""Passes through an S3 server that fails, at random or for half a minute: every image has its row all the same."""

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
from stpm.data import mvtec
from stpm.fitting.fit_category import run_task
from stpm.fitting.task import FitTask
from stpm.method.backbones import load_teacher
from stpm.models.store import ModelStore
from tests.cluster.conftest import run_job, start_job, wait_until
from tests.conftest import LIMITS, TINY
from tests.datasets import make_category

pytestmark = pytest.mark.cluster

SHARE, REFUSING_SECONDS = 0.05, 30.0
# So many that decoding would be through with them only long after it was to be stopped.
IMAGES = 2000


class Rough(BaseHTTPRequestHandler):
    """Passes requests on, but for some: 500, 503 with SlowDown, a pause, a reset, or an answer that breaks off."""

    protocol_version = "HTTP/1.1"
    behind = ""
    share = 0.0
    refuses_until = 0.0
    # Part of the path of what is denied, after so many requests for such.
    denied: ClassVar[tuple[str, int]] = ("", 0)
    done: ClassVar[Counter[str]] = Counter()
    chance = random.Random(0)

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.chance.choice(["500", "503", "slow", "reset", "cut"]) if self.chance.random() < self.share else ""
        if self.command in ("PUT", "POST") and time.monotonic() < self.refuses_until:
            fault = "503"
        self.done[fault or "passed"] += 1
        part, free = self.denied
        if part and part in self.path:
            self.done["asked for"] += 1
            if self.done["asked for"] > free:
                error = b"<Error><Code>ExpiredToken</Code><Message>The token is expired.</Message></Error>"
                self._answer(403, error, {"Content-Type": "application/xml"})
                return
        if fault in ("500", "503"):
            self._answer(int(fault), b"<Error><Code>SlowDown</Code></Error>", {"Content-Type": "application/xml"})
            return
        if fault == "reset":
            # With no time to linger, closing sends RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(2)
        server = http.client.HTTPConnection(self.behind, timeout=60)
        server.request(self.command, self.path, body, dict(self.headers))
        answer = server.getresponse()
        data = answer.read()
        kept = {k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "transfer-encoding", "server")}
        self._answer(answer.status, data, kept, cut=fault == "cut" and len(data) > 1)
        server.close()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815

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
        """No line per request."""


@pytest.fixture
def rough(s3: dict[str, str]) -> Iterator[dict[str, str]]:
    Rough.behind = urlsplit(s3["AWS_ENDPOINT_URL"]).netloc
    Rough.done.clear()
    Rough.share = Rough.refuses_until = 0.0
    Rough.denied = "", 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Rough)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


@pytest.fixture
def options(s3: dict[str, str]) -> list[str]:
    """Of the score job, for a model and a collection that are there."""
    if not storage.exists("s3://bucket/models"):
        make_category("s3://bucket/data", "nut", good=150, defects=50)
        store = ModelStore("s3://bucket/models")
        teacher = store.put_teacher(load_teacher(TINY.teacher, TINY.teacher_weights, TINY.levels))
        task = FitTask.of(mvtec.read_category("s3://bucket/data", "nut"), TINY, store.uri, teacher)
        assert run_task(task, LIMITS, lambda told: None).record
    return ["--models", "s3://bucket/models", "--images", "s3://bucket/data/nut/test", "--category", "nut"]


def check_rows(out: str) -> None:
    tables = [storage.read_table(uri) for uri, _ in storage.files(f"{out}/scores")]
    rows = [row for table in tables for row in table.select(["uri", "error_kind"]).to_pylist()]
    assert sorted(row["uri"] for row in rows) == [uri for uri, _ in storage.files("s3://bucket/data/nut/test")]
    assert {row["error_kind"] for row in rows} == {""}


def test_every_image_has_its_row(rough: dict[str, str], options: list[str]) -> None:
    Rough.share = SHARE
    ran = run_job("score", *options, "--out", "s3://bucket/out", **rough)
    assert ran.returncode == 0, ran.stdout
    assert sum(number for fault, number in Rough.done.items() if fault != "passed") > 20, Rough.done
    check_rows("s3://bucket/out")


@pytest.mark.faults
def test_storage_that_refuses_writes_for_half_a_minute_costs_time_alone(
    rough: dict[str, str], options: list[str]
) -> None:
    out = "s3://bucket/refused"
    process = start_job("score", *options, "--out", out, **rough)
    wait_until(lambda: bool(storage.files(f"{out}/heatmaps")), "no heatmap was written")
    Rough.refuses_until = time.monotonic() + REFUSING_SECONDS
    stdout, stderr = process.communicate(timeout=300)
    print(stdout, stderr)
    assert Rough.done["503"] > 5, Rough.done
    if process.returncode:
        # Where patience ended before storage came back, it is one line, and the same command goes on.
        assert process.returncode == 2
        assert "what was done is kept, run the same command again" in stderr
        assert "Traceback" not in stderr
        assert run_job("score", *options, "--out", out, **rough).returncode == 0
    check_rows(out)


def test_credentials_that_expire_stop_a_pass_and_spoil_no_row(rough: dict[str, str], options: list[str]) -> None:
    images, out = "s3://bucket/many", "s3://bucket/expired"
    data = storage.read(storage.files("s3://bucket/data/nut/test")[0][0])
    for i in range(IMAGES):
        storage.publish(f"{images}/{i:04}.png", data)
    options[options.index("--images") + 1] = images
    options += ["--out", out, "--heatmaps", "none", "--rows-per-file", "32"]

    # All are denied soon after the start.
    Rough.denied = "/many/", 150
    ran = run_job("score", *options, **rough)
    assert ran.returncode == 2
    assert "of the latest 2" in ran.stderr
    assert "unreadable: PermissionError: The token is expired" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert Rough.done["asked for"] < IMAGES / 2
    assert not storage.exists(f"{out}/_SUCCESS")

    # A few of the last are denied: they are left, and final only where that is wanted.
    Rough.denied = "/many/199", 0
    ran = run_job("score", *options, **rough)
    assert ran.returncode == 2
    assert "10 images are unfinished" in ran.stdout
    assert "s3://bucket/many/1990.png: unreadable: PermissionError" in ran.stdout
    assert not storage.exists(f"{out}/_SUCCESS")
    ran = run_job("score", *options, "--accept-errors", **rough)
    assert ran.returncode == 0
    assert f"{IMAGES} rows" in ran.stdout
    assert "10 with an error (10 unreadable)" in ran.stdout
    assert storage.exists(f"{out}/_SUCCESS")
