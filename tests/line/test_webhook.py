"""The webhook against a real server on this machine."""

import hashlib
import hmac
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stpm.errors import WebhookError
from stpm.line.webhook import SIGNATURE, post

BODY = json.dumps({"text": "2026-11-24: 3 images, größer"}, ensure_ascii=False).encode()
SECRETS = ("me:", "pass-word", "T0ken", "key-9")


class Server(ThreadingHTTPServer):
    """Answers with the given status codes in turn; 0: after the client's patience."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[int] = []
        self.received: list[tuple[str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://me:pass%2Dword@127.0.0.1:{self.server_port}/hooks/T0ken?key=key-9"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, dict(self.headers.items()), body))
        status = self.server.answers.pop(0) if self.server.answers else 204
        if not status:
            time.sleep(1)
        self.send_response(status or 200)
        self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.mark.parametrize("key", [b"a key", b"\xff\x00k\xe9", b""])
def test_the_message_arrives_once_signed_and_with_the_users_credentials(server: Server, key: bytes) -> None:
    post(server.url, BODY, os.fsdecode(key))
    ((path, headers, body),) = server.received
    assert (path, body) == ("/hooks/T0ken?key=key-9", BODY)
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Basic bWU6cGFzcy13b3Jk"
    expected = f"sha256={hmac.new(key, BODY, hashlib.sha256).hexdigest()}"
    assert headers.get(SIGNATURE) == (expected if key else None)


def test_no_credentials_of_netrc_are_sent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("default login anybody password SECRET\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    post(f"http://127.0.0.1:{server.server_port}/hooks", BODY, "")
    ((_, headers, _),) = server.received
    assert "Authorization" not in headers


@pytest.mark.parametrize(
    ("answers", "tries", "reason"),
    [
        ([503, 429, 0], 4, ""),
        ([500] * 9, 4, "it answered 500"),
        ([404], 1, "it answered 404"),
        ([302], 1, "it answered 302"),
        ([0] * 9, 4, "it did not answer in time"),
    ],
)
def test_temporary_failures_are_tried_again_others_named(
    server: Server, answers: list[int], tries: int, reason: str
) -> None:
    server.answers = answers.copy()
    refused = f"the webhook at http://127.0.0.1:{server.server_port}/... did not take the message: {reason}"
    with pytest.raises(WebhookError, match=f"^{re.escape(refused)}$") if reason else nullcontext():
        post(server.url, BODY, "k", timeout=10 if all(answers) else 0.2, pause=0.01)
    assert len(server.received) == tries


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://me:pass-word@127.0.0.1:9/T0ken?key=key-9", "Connection refused"),
        ("http://me:pass-word@name.invalid/T0ken", ""),
        ("https://me:pass-word@127.0.0.1:9/T0ken", "Connection refused"),
        ("http://me:pass-word@*/T0ken", "InvalidURL"),
    ],
)
def test_no_error_shows_a_secret(url: str, reason: str) -> None:
    with pytest.raises(WebhookError) as caught:
        post(url, BODY, "k", pause=0.01)
    assert reason in str(caught.value)
    # Nor would a traceback.
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert not any(secret in str(caught.value) for secret in SECRETS)
