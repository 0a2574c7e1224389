"""Post a message to a webhook, signed as GitHub signs its own: HMAC-SHA256 of the body, in a header.

The URL may hold a secret, and the key is one: messages and logs show only the host.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from urllib.parse import unquote_to_bytes, urlsplit

import requests
import tenacity

from stpm.errors import WebhookError
from stpm.names import hide_urls

SIGNATURE = "X-Stpm-Signature-256"
_TIMEOUT_SECONDS = 10.0
_ATTEMPTS = 4
_MAX_PAUSE_SECONDS = 10.0
# Answers after which another attempt may succeed.
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)


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

    # Without this, requests would send what ~/.netrc has for the host, or for any.
    user, password = urlsplit(url).username or "", urlsplit(url).password or ""
    auth = (unquote_to_bytes(user), unquote_to_bytes(password)) if user or password else lambda request: request

    # urllib3 would try again by itself, and log the URL.
    @tenacity.retry(
        retry=tenacity.retry_if_exception(_is_temporary),
        wait=tenacity.wait_exponential(multiplier=pause, max=_MAX_PAUSE_SECONDS),
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        reraise=True,
    )
    def attempt() -> None:
        # A redirect would become a GET, and send the signature to another host. Of the answer, only its code is read.
        with requests.post(
            url, body, headers=headers, auth=auth, timeout=timeout, allow_redirects=False, stream=True
        ) as answer:
            if not 200 <= answer.status_code < 300:
                raise requests.HTTPError(response=answer)

    try:
        attempt()
    except (OSError, ValueError) as error:
        # Drop the cause: it may hold the URL, and a traceback would show it.
        raise WebhookError(f"the webhook at {hide_urls(url)} did not take the message: {_reason(error)}") from None


def _is_temporary(error: BaseException) -> bool:
    if isinstance(error, requests.HTTPError):
        return error.response.status_code in _TEMPORARY
    return isinstance(error, OSError) and not isinstance(error, ValueError)


def _reason(error: BaseException) -> str:
    """Describe an error without its text, which may hold the URL."""
    if isinstance(error, requests.HTTPError):
        return f"it answered {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return "it did not answer in time"
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return type(error).__name__
