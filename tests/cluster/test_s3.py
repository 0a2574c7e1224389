"""Archives in object storage: a real S3 server, real requests."""

import io
import os
import tarfile
from typing import Any

import pytest
from s3fs import S3FileSystem

from stpm import storage
from stpm.data import image_files
from stpm.data.image_files import ImageRef
from stpm.scoring.inputs.category_rule import CategoryRule
from stpm.scoring.inputs.sources import image_rows
from tests.datasets import make_output

pytestmark = pytest.mark.cluster


def test_of_an_archive_headers_are_read_and_one_picture(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    size, count = 2 * 2**20, 20
    content, noise = io.BytesIO(), os.urandom(size)
    with tarfile.open(fileobj=content, mode="w") as archive:
        for number in range(count):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = size
            archive.addfile(member, io.BytesIO(noise))
    uri = "s3://bucket/large.tar"
    storage.publish(uri, content.getvalue())
    fetched: list[int] = []
    call = S3FileSystem._call_s3

    async def count_bytes(self: S3FileSystem, method: str, *rest: Any, **more: Any) -> Any:
        if method == "get_object":
            first, last = more["Range"].removeprefix("bytes=").split("-")
            fetched.append(int(last) + 1 - int(first))
        return await call(self, method, *rest, **more)

    monkeypatch.setattr(S3FileSystem, "_call_s3", count_bytes)
    (rows,) = image_rows([uri], CategoryRule("nut"))
    assert len(rows) == count
    assert sum(fetched) < 0.2 * count * size
    # The same row of the output, for a page: one request more, of its own bytes.
    requests = len(fetched)
    row = make_output(count, **{name: rows[name] for name in ("uri", "archive_start", "archive_length")}).to_pylist()[7]
    assert image_files.read(ImageRef.of_row(row)) == noise
    assert fetched[requests:] == [size]
