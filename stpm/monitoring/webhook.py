"""Post a message to a webhook, signed as GitHub signs its own: HMAC-SHA256 of the body, in a header.

The URL may hold a secret, and the key is one: messages and logs show only the host.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import os
import urllib.request
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit

import tenacity

from stpm.errors import WebhookError
from stpm.names import hide_urls

SIGNATURE = "X-Stpm-Signature-256"
_TIMEOUT_SECONDS = 10.0
_ATTEMPTS = 4
_MAX_PAUSE_SECONDS = 10.0
# Answers after which another attempt may succeed.
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Report a redirect as an error: urllib would turn the POST into a GET, and send the signature to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def sign(body: bytes, key: bytes) -> str:
    """Return the value of the signature's header."""
    return f"sha256={hmac.new(key, body, hashlib.sha256).hexdigest()}"


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
    opener = urllib.request.build_opener(_NoRedirect)

    def act(request: urllib.request.Request) -> None:
        try:
            opener.open(request, timeout=timeout).close()
        except HTTPError as error:
            error.close()
            raise

    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_temporary),
        wait=tenacity.wait_exponential(multiplier=pause, max=_MAX_PAUSE_SECONDS),
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        reraise=True,
    )
    try:
        retry(act, _request(url, body, key))
    except (OSError, http.client.HTTPException, ValueError) as error:
        # Drop the cause: it may hold the URL, and a traceback would show it.
        raise WebhookError(f"the webhook at {hide_urls(url)} did not take the message: {_reason(error)}") from None


def _request(url: str, body: bytes, key: str) -> urllib.request.Request:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), body, method="POST")  # noqa: S310  its scheme is checked
    request.add_header("Content-Type", "application/json")
    request.add_header("User-Agent", "stpm")
    if user:
        request.add_header("Authorization", f"Basic {base64.b64encode(unquote(user).encode()).decode()}")
    if key:
        request.add_header(SIGNATURE, sign(body, os.fsencode(key)))
    return request


def _is_temporary(error: BaseException) -> bool:
    if isinstance(error, HTTPError):
        return error.code in _TEMPORARY
    return isinstance(error, OSError | http.client.HTTPException)


def _reason(error: BaseException) -> str:
    """Describe an error without its text, which may hold the URL."""
    if isinstance(error, HTTPError):
        return f"it answered {error.code}"
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return "it did not answer in time" if isinstance(cause, TimeoutError) else type(cause).__name__
