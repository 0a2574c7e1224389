"""Post a night to a webhook, signed as GitHub signs its own: HMAC-SHA256 of the body, in a header.

The URL may hold a secret, and the key is one: messages and logs show only the host.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import json
import os
import time
from urllib.parse import unquote_to_bytes, urlsplit

import requests

from stpm import storage
from stpm.errors import WebhookError
from stpm.line.night import Night
from stpm.line.page import PAGE_FILE
from stpm.names import hide_urls

SIGNATURE = "X-Stpm-Signature-256"
# Maximum number of categories in a message.
_MAX_CATEGORIES = 100
_TIMEOUT_SECONDS = 10.0
_ATTEMPTS = 4
# Answers after which another attempt may succeed, as after those of 500 and more.
_TEMPORARY = (408, 425, 429)


def message(night: Night, out: str, created: str) -> bytes:
    """Write the message: the night, with the categories to look at. Chats show its `text`."""
    # Escape what chats take for markup: a category named `<!channel>` would call everybody.
    text = "".join(character if character.isprintable() else " " for character in night.headline())
    page = storage.join(out, PAGE_FILE)
    values = night.values(out) | {"text": html.escape(text, quote=False), "created": created, "page": page}
    values["categories"] = {name: values["categories"][name] for name in night.flagged()[:_MAX_CATEGORIES]}
    return json.dumps(values, ensure_ascii=False).encode()


def post(url: str, body: bytes, key: str, *, timeout: float = _TIMEOUT_SECONDS, pause: float = 1.0) -> None:
    """Post JSON to a URL; try again after a failure that may pass.

    Args:
        url: http:// or https://, perhaps with user and password.
        body: JSON in UTF-8.
        key: of the signature, as `os.environ` has it; "" leaves it out.
        timeout: seconds for each attempt to connect, and for each wait for data.
        pause: seconds before the second attempt; each later pause is twice as long.

    Raises:
        WebhookError: if the server did not accept it. The message names the host, and nothing else of the URL.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "stpm"}
    if key:
        headers[SIGNATURE] = f"sha256={hmac.new(os.fsencode(key), body, hashlib.sha256).hexdigest()}"
    # urllib3 would try again by itself, and log the URL.
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        reason, may_pass = _attempt(url, body, headers, timeout)
        if not reason:
            return
        if not may_pass:
            break
    raise WebhookError(f"the webhook at {hide_urls(url)} did not take the message: {reason}")


def _attempt(url: str, body: bytes, headers: dict[str, str], timeout: float) -> tuple[str, bool]:
    """Return why a server did not accept a message, "" if it did, without the URL; and whether that may pass."""
    user, password = urlsplit(url).username or "", urlsplit(url).password or ""
    # Without this, requests would send what ~/.netrc has for the host, or for any.
    auth = (unquote_to_bytes(user), unquote_to_bytes(password)) if user or password else lambda request: request
    try:
        # A redirect would become a GET, and send the signature to another host. Of the answer, only its code is read.
        with requests.post(
            url, body, headers=headers, auth=auth, timeout=timeout, allow_redirects=False, stream=True
        ) as answer:
            code = answer.status_code
            return ("" if 200 <= code < 300 else f"it answered {code}"), code >= 500 or code in _TEMPORARY
    except requests.Timeout:
        return "it did not answer in time", True
    except (OSError, ValueError) as error:
        causes: list[BaseException] = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        reasons = (each.strerror for each in causes if isinstance(each, OSError) and each.strerror)
        return next(reasons, type(error).__name__), not isinstance(error, ValueError)
