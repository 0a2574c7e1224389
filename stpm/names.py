"""Names of files and folders: whether they are UTF-8, hold a secret, and whether every filesystem can have them.

Python reads each byte of a name that is not UTF-8 as a lone surrogate, U+DC80 to U+DCFF.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from urllib.parse import quote

from stpm.errors import DataError, UriError

# Bytes of a percent-encoded name in the name of a folder, which may have 255 on most filesystems.
_MAX_FOLDER_BYTES = 200
_MAX_CHARACTERS = 128
_WINDOWS_RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}
# The last range has the surrogates that stand for bytes that are not UTF-8.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*,\ud800-\udfff]')
_BYTE = re.compile(r"[\udc80-\udcff]")
_WEB_URL = re.compile(r"(https?://)(?:[^/?#\s]*@)?([^/?#\s]+)\S*", re.IGNORECASE)
# Scheme, user with password, host, and the rest. For fsspec, another filesystem stands before ::.
_URI = re.compile(r"(?:.*::)?([a-z][a-z0-9+.-]*)://(?:([^/?#]*)@)?([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
# A user and the beginning of a password; a host may have a port, and Amazon's names (ARN) have colons.
_CUT_PASSWORD = re.compile(r"(?!arn:|\[)[^:]*:(?![0-9]*$)", re.IGNORECASE)


def is_utf8(name: str) -> bool:
    """Return whether a name holds no lone surrogate."""
    return name.isascii() or not re.search(r"[\ud800-\udfff]", name)


def as_utf8(name: str) -> str:
    """Write each byte that is not UTF-8 as %XX; every other character stays."""
    return name if name.isascii() else _BYTE.sub(lambda match: quote(match[0].encode("utf-8", "surrogateescape")), name)


def unicode_forms(name: str) -> set[str]:
    """Return the other forms of a name that systems write: composed, or decomposed as on macOS; of ASCII none."""
    return {unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)} - {name}


def other_form(name: str, names: Iterable[str]) -> str:
    """Say which of the names is this one in another Unicode form, as some systems write it; "" if none is."""
    composed = unicodedata.normalize("NFC", name)
    found = next((each for each in names if unicodedata.normalize("NFC", each) == composed), "")
    return found and f"{name!a} and {found!a} are one name in two Unicode forms; rename one"


def check_no_secret(uri: str) -> None:
    """Refuse a URI that may hold a secret: logs, models and pages would show it.

    These are URIs with a password, and web URLs with a user or a query, such as a signature. The user of abfs:// is no
    secret but a container.

    Raises:
        UriError: if it may hold one. The message shows neither user nor query nor path.
    """
    if not (match := _URI.match(uri)):
        return
    scheme, user, host, rest = match.groups()
    if not user and _CUT_PASSWORD.match(host) and "@" in rest:
        # The password holds a slash, and only its beginning was taken for a host and a port.
        user, host = host, rest.rpartition("@")[2].partition("/")[0]
    is_web = scheme.lower() in ("http", "https")
    if user and (is_web or ":" in user):
        held, remedy = "user or password", "give credentials to the storage's own tools (docs/cluster.md)"
    elif is_web and "?" in rest:
        held, remedy = "query, which may be a signature", "use s3://, gs:// or abfs:// for signed objects"
    else:
        return
    raise UriError(f"{scheme}://{host}/...: this URI holds a {held}, and would be kept with results; {remedy}")


def hide_urls(text: str) -> str:
    """Shorten each web URL to its host: its user, path and query may hold secrets.

    >>> hide_urls("--webhook=https://me:secret@hooks.example/T0/B1?key=secret --wait")
    '--webhook=https://hooks.example/... --wait'
    """
    return _WEB_URL.sub(r"\1\2/...", text)


def safe_name(name: str, what: str) -> str:
    """Return the name, if it may become part of a path on every filesystem, and one of an option's several names.

    Raises:
        DataError: if it is empty, longer than 128 characters or than 200 bytes percent-encoded, starts or
            ends with a dot or a space, is reserved on Windows, is not UTF-8, or holds a control
            character or one of `<>:"/\\|?*,`.
    """
    problem = None
    if not name or len(name) > _MAX_CHARACTERS:
        problem = f"has {len(name)} characters, 1 to {_MAX_CHARACTERS} are allowed"
    elif match := _UNSAFE.search(name):
        problem = f"holds the character {match.group()!r}"
    elif name.startswith((".", " ")) or name.endswith((".", " ")):
        problem = "starts or ends with a dot or a space"
    elif name.split(".", maxsplit=1)[0].lower() in _WINDOWS_RESERVED:
        problem = "is reserved on Windows"
    elif (length := len(quote(name, safe=""))) > _MAX_FOLDER_BYTES:
        problem = f"has {length} bytes percent-encoded, {_MAX_FOLDER_BYTES} are allowed"
    if problem:
        raise DataError(f"{what} {name[:_MAX_CHARACTERS]!r} {problem}; rename it")
    return name
