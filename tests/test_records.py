"""What a JSON file with a damaged, missing or foreign value is read as: the same values, or an error in one line."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm.lease import Holder
from stpm.line.night import CategoryNight, Night
from stpm.method.arithmetic import Arithmetic
from stpm.models.versions import Version, Versions
from stpm.records import convert, from_json, parse_json, to_json
from stpm.scoring.inputs.manifest import Manifest
from stpm.scoring.row_summary import RowSummary
from stpm.scoring.run_statistics import CategoryCounts, RunResult, UnfinishedImage
from tests.evaluation.runs import result

COUNTS = {"nut": CategoryCounts(rows=2, anomalous=1, errors=1)}
RECORDS = [
    Manifest(2, 0, {"nut": 2}),
    RowSummary(2, 1, {"empty": 1}, ["a.png: empty"], COUNTS, 9, ["task"]),
    RunResult(2, 1, {"empty": 1}, ["a.png: empty"], COUNTS),
    Versions(Version("nut-1", "f"), (Version("nut-0", "e"),)),
    Night(
        "2026-11-24",
        ("dump",),
        categories={"nut": CategoryNight(model_id="nut-1", images=2, alarms=1, errors={}, false_alarm_rate=0.01)},
    ),
    Holder("a", "host", "machine", 7, "1", "stpm score"),
    result("nut", 0, None, None).model,
]
KINDS = {type(record).__name__: record for record in RECORDS}

_LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_JSON = st.recursive(_LEAF, lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(), each, max_size=3))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the keys that lead to each value in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_is_read_as_it_was_written(kind: str) -> None:
    record = KINDS[kind]
    for indent in (None, 2):
        assert from_json(type(record), to_json(record, indent=indent)) == record
    assert convert(float, 3, "a number of seconds") == 3.0


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_any_value_in_any_place_is_read_or_an_error_in_one_line(kind: str, data: st.DataObject) -> None:
    record = KINDS[kind]
    values = json.loads(to_json(record))
    path = data.draw(st.sampled_from(list(places(values))))
    changed = json.dumps(replaced(values, path, data.draw(_JSON))).encode()
    try:
        read = from_json(type(record), changed)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    else:
        # It has the types that the fields name: it can be written and read again.
        assert from_json(type(record), to_json(read)) == read


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"5", b"null", b"\xff", b"[" * 100_000])
def test_other_bytes_are_an_error_in_one_line(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^.+$"):
        from_json(Manifest, content)


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1" + "0" * 400, '{"\\udc80": 1}', '"\\ud800"'])
def test_what_could_not_be_written_again_is_refused(text: str) -> None:
    assert parse_json(b'["\\ud83d\\ude00", 12345678901234567890]') == ["\U0001f600", 12345678901234567890]
    with pytest.raises(ValueError, match=r"^.+$"):
        parse_json(f"[{text}]".encode())


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (tuple[str, ...], "nut"),
        (tuple[int, ...], 5),
        (list[str], ["a", 1]),
        (dict[str, int], [["nut", 1]]),
        (dict[float, int], {"x": 1}),
        (UnfinishedImage, ["a.png", "empty"]),
        (UnfinishedImage, []),
        (UnfinishedImage, ["a.png", 1, "no bytes"]),
        (Arithmetic | None, 5),
        (int, True),
        (int, 5.0),
        (float, "0.5"),
        (str, None),
    ],
)
def test_a_value_of_another_type_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"^.+$"):
        convert(kind, value, "field")


def test_a_long_value_is_cut_in_the_error() -> None:
    values = dataclasses.asdict(KINDS["Manifest"]) | {"rows": ["x" * 1000] * 1000}
    with pytest.raises(ValueError, match=r"^Manifest\.rows is \['x{3,}\.\.\.x+', .*, not of type int$") as raised:
        from_json(Manifest, json.dumps(values).encode())
    assert len(str(raised.value)) < 300
