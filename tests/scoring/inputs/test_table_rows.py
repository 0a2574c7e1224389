import json
import os
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stpm import storage
from stpm.names import check_no_secret
from stpm.scoring.inputs.category_rule import CategoryRule
from tests.scoring.inputs.helpers import NUT, rows, write_table

# Parts of names of which each means something where URIs are resolved, checked for secrets or compared with prefixes.
PARTS = [
    *("/", "//", ".", "..", "...", ":", "::", "://", "@", "?", "#", "%41", "~", "\n", "\\", "\0", " ", "é", "a"),
    *("s3://plant", "s3://plant/", "s3://", "s3://..", "S3://plant/a", "abfs://box@me.example/", "https://host/"),
    *("B.png", "/plant", "me:secret@", "plant", "x.tar#", "memory://", "memory://root/lists/", "zip::", "http:/"),
    "file:///plant/",
]
NAMES = st.lists(st.sampled_from(PARTS), max_size=6).map("".join) | st.text(max_size=5)
TEXTS = st.text(st.sampled_from("aB/.é"), max_size=3)
RECORDS = st.fixed_dictionaries({"uri": NAMES, "mask": st.just("") | NAMES, "category": TEXTS, "label": TEXTS})
RULES = [NUT, CategoryRule(), CategoryRule(pattern="{category}/{name}"), CategoryRule(pattern="t/{category}.png")]
FOLDER = "memory://root/lists"
ALLOWED = ["/plant", "s3://plant", "s3://plant/a/", "https://host", "abfs://box@me.example", FOLDER]


@given(st.lists(RECORDS, min_size=1), st.sampled_from(RULES), st.sets(st.sampled_from(ALLOWED), min_size=1))
@example([{"uri": "~\0", "mask": "", "category": "", "label": ""}], NUT, {"/plant"})
@example([{"uri": "~\0://", "mask": "", "category": "", "label": ""}], NUT, {"/plant"})
@settings(max_examples=300)
def test_whatever_a_table_names_is_allowed_and_without_a_secret_or_has_an_error(
    records: list[dict[str, str]], rule: CategoryRule, allow: set[str]
) -> None:
    storage.publish(f"{FOLDER}/m.jsonl", "\n".join(map(json.dumps, records)).encode())
    found = rows(f"{FOLDER}/m.jsonl", rule=rule, allow=sorted(allow))
    assert len(found) == len(records)
    for row, record in zip(found, records, strict=True):
        assert row["label"] == record["label"]
        is_relative = "://" not in record["uri"] and not record["uri"].startswith("/")
        if row["error_kind"] in ("", "no_model"):
            for uri in filter(None, (row["uri"], row["mask"])):
                check_no_secret(uri)
                assert any(uri == prefix or uri.startswith(f"{prefix.rstrip('/')}/") for prefix in allow)
                assert ".." not in uri.split("/")
            assert row["category"] == (record["category"] or rule.category(row["uri"]))
            for name, uri in ((record["uri"], row["uri"]), (record["mask"], row["mask"])):
                if name and "://" not in name and not name.startswith("/"):
                    assert uri == f"{FOLDER}/{PurePosixPath(name)}"
        elif is_relative and record["uri"] and not record["mask"] and FOLDER in allow:
            assert ".." in record["uri"].split("/")


def test_a_users_column_of_any_type_is_kept_beside_odd_rows(tmp_path: Path) -> None:
    notes = pa.array(["x", "y", "z"], pa.string_view())
    pq.write_table(pa.table({"uri": ["a.png", "./dir//b.png", "../up.png"], "note": notes}), tmp_path / "list.parquet")
    found = rows(f"{tmp_path}/list.parquet")
    assert [(row["note"], row["error_kind"]) for row in found] == [("x", ""), ("y", ""), ("z", "not_allowed")]
    assert found[1]["uri"] == f"{tmp_path}/dir/b.png"


def test_a_table_in_a_folder_that_is_not_utf8_names_images(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_table(f"{folder}/list.csv", [{"uri": "a.png", "line": 1}])
    (row,) = rows(f"{folder}/list.csv")
    assert (row["uri"], row["error_kind"], row["line"]) == (f"{tmp_path}/caf%E9/a.png", "bad_name", "1")
