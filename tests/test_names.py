import os

import pytest

from stpm.errors import DataError, UriError
from stpm.names import as_utf8, check_no_secret, hide_urls, is_utf8, other_form, safe_name

UNSAFE = [
    *(f"a{character}b" for character in '<>:"/\\|?*,\0\n\x7f\udcff'),
    *("", ".", "..", ".x", "a.", "a ", " a"),
    *("CON", "nul.txt"),
    *("x" * 129, "é" * 34),
]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="category"):
        safe_name(name, "category")


@pytest.mark.parametrize(
    "name", ["bottle", "metal_nut", "Teil 7", "größe-ü", "part#4", "consumer", "a..b", "é" * 33, "x" * 128]
)
def test_safe_names_are_accepted(name: str) -> None:
    assert safe_name(name, "category") == name


def test_the_other_unicode_form_of_a_name_is_named() -> None:
    composed, decomposed = "Geh\u00e4use", "Geha\u0308use"
    assert other_form(composed, ["bottle", decomposed]) == (
        r"'Geh\xe4use' and 'Geha\u0308use' are one name in two Unicode forms; rename one"
    )
    assert other_form(composed, ["bottle"]) == ""


def test_bytes_that_are_not_utf8_are_found_and_escaped() -> None:
    assert as_utf8("größe %41.png") == "größe %41.png"
    assert as_utf8(os.fsdecode(b"caf\xe9-\xc3\xa9\xff.png")) == "caf%E9-é%FF.png"
    assert [is_utf8(name) for name in ("größe", os.fsdecode(b"\xff"), "\ud800")] == [True, False, False]


@pytest.mark.parametrize(
    "uri",
    [
        "https://me:SECRET@host/a.png",
        "HTTPS://SECRET@host/a.png",
        "http://host/SECRET.png?X-Amz-Signature=SECRET",
        "http://host?SECRET",
        "simplecache::https://me:SECRET@host/a.png",
        "ftp://me:SECRET@host/a.png",
        "s3://key:SECRET@host/a.png",
        "s3://key:SECRET/more@host/a.png",
        "https://me:SECRET/@SECRET/SECRET@host",
    ],
)
def test_a_uri_with_a_secret_is_refused_without_showing_it(uri: str) -> None:
    with pytest.raises(UriError, match=r"://host/\.\.\.: this URI holds a ") as caught:
        check_no_secret(uri)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "a@b:c?d.png",
        "/data/a:b@c/d?.png",
        "s3://bucket/a:b@c/*.png?",
        "https://host:8080/a@b.png",
        "https://[::1]/a@b.png",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/line/a@b.png",
        "abfs://container@account.dfs.core.windows.net/a.png",
        "sftp://me@host/a.png",
        "file:///a:b@c.png",
    ],
)
def test_a_uri_without_a_secret_is_accepted(uri: str) -> None:
    check_no_secret(uri)


@pytest.mark.parametrize("scheme", ["http", "https", "HTTPS", "Http"])
def test_urls_are_hidden_in_any_case(scheme: str) -> None:
    assert hide_urls(f"--webhook={scheme}://me:secret@host/T0?key=secret") == f"--webhook={scheme}://host/..."
