from __future__ import annotations

from stpm.scoring.inputs.uri_list import stored_list


def test_a_list_keeps_odd_names() -> None:
    lines = ["a.png", "b\udcff.png", "~$draft.png", "~nosuchuser/x.png", "file://~x/a.png"]
    with stored_list(lines) as (file, digest):
        file.seek(0)
        assert file.read().splitlines() == lines
    assert digest.startswith("5 lines, ")


def test_the_digest_is_of_the_uris_alone() -> None:
    lines = ["a.png", "s3://b/c.png", "d.png"]
    with stored_list(lines) as (_, digest), stored_list([*(f" {line}\n" for line in lines[::-1]), ""]) as (_, other):
        assert other == digest
    with stored_list(lines[:2]) as (_, other):
        assert other != digest
    with stored_list(["", "\n"]) as (_, other):
        assert other == ""
