import json
from typing import Any

import jsonschema
import pytest

from stpm.line.night import Night
from stpm.line.webhook import message
from tests.conftest import REPOSITORY
from tests.line.synthetic import make_nights

SCHEMA = json.loads((REPOSITORY / "stpm" / "line" / "nightly.schema.json").read_text())
OUT, CREATED = "s3://plant/nights", "2026-11-25T02:30:00+00:00"


def checked(nights: list[Night]) -> Any:
    values = {"format": 2, "created": CREATED, "out": OUT, "nights": [night.values(OUT) for night in nights]}
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(json.dumps(values)), SCHEMA, jsonschema.Draft202012Validator)
    return values


def test_nightly_json_has_the_stated_schema() -> None:
    values = checked(make_nights(["a", "b", "c", "d"], 3, act=1, watch=1, unclear=1))
    assert [night["date"] for night in values["nights"]] == ["2026-11-22", "2026-11-23", "2026-11-24"]
    last = values["nights"][-1]
    assert last["folder"] == "s3://plant/nights/date=2026-11-24"
    assert (last["levels"], list(last["categories"])) == (
        {"act": 1, "watch": 1, "not judged": 0, "cannot tell": 1, "fine": 1},
        ["a", "b", "c", "d"],
    )
    low, high = last["categories"]["a"]["alarm_rate_interval"]
    assert low < last["categories"]["a"]["alarm_rate"] < high
    # Without images or verdicts.
    checked([Night("2026-11-24", ("s3://dump",), problem="storage is down")])
    del last["categories"]["a"]["level"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, SCHEMA, jsonschema.Draft202012Validator)


def test_the_webhooks_message_names_what_is_to_be_looked_at() -> None:
    night = make_nights([f"c{i:03}" for i in range(300)], 1, act=20, watch=70, unclear=30)[-1]
    found = json.loads(message(night, OUT, CREATED))
    assert found["page"] == "s3://plant/nights/nightly.html"
    assert found["text"] == night.headline()
    assert found["levels"] == {"act": 20, "watch": 70, "not judged": 0, "cannot tell": 30, "fine": 180}
    levels = ["act"] * 20 + ["watch"] * 70 + ["cannot tell"] * 10
    assert [category["level"] for category in found["categories"].values()] == levels
    assert "act: c000, c001, c002, c003, c004, and 15 more; watch: c020" in found["text"]
    assert "cannot tell: c090" in found["text"]


def test_no_name_of_a_category_is_markup_in_a_chat() -> None:
    night = make_nights(["<!channel>", "a & b", "c\nERROR\u202e"], 1, act=3, watch=0)[-1]
    text = json.loads(message(night, OUT, CREATED))["text"]
    assert "act: &lt;!channel&gt;, a &amp; b, c ERROR ;" in text
