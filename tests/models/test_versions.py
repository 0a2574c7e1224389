"""Versions against a plain list of ids and the place of the current one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm.errors import ModelError
from stpm.models.versions import Version, Versions


@given(st.lists(st.sampled_from(["back", "forward", *"abcd"]), max_size=12), st.integers(1, 3))
def test_versions_are_a_list_with_a_place(steps: list[str], keep: int) -> None:
    versions, ids, at = Versions(Version("a", "")), ["a"], 0
    for number, step in enumerate(steps):
        if step == "back" and not at:
            with pytest.raises(ModelError, match=f"no model was current before {ids[at]}"):
                versions.roll_back()
        elif step == "forward" and at == len(ids) - 1:
            with pytest.raises(ModelError, match=f"no model was rolled back since {ids[at]} became current"):
                versions.roll_forward()
        elif step in ("back", "forward"):
            versions, at = (versions.roll_back(), at - 1) if step == "back" else (versions.roll_forward(), at + 1)
        else:
            lost = [each for each in ids[at + 1 :] if each not in (step, *ids[: at + 1])]
            replaced = versions.describe_replaced(step)
            assert f"rolled back ({', '.join(lost)}): --roll-forward no" in replaced if lost else not replaced
            # The same model again may have been fitted on images that were uploaded again.
            versions = versions.publish(Version(step, f"images {number}"))
            assert versions.current.data_fingerprint == f"images {number}"
            if step != ids[at]:
                ids, at = [*ids[: at + 1], step], at + 1
        assert [each.model_id for each in versions.every] == ids
        assert versions.current.model_id == ids[at]
    kept = versions.forget(keep)
    assert [each.model_id for each in kept.every] == ids[max(at - keep, 0) :]
    places = {each: f"{i + 1} after" for i, each in reversed([*enumerate(ids[at + 1 :])])}
    places |= {each: f"{at - i} before" for i, each in enumerate(ids[:at])} | {ids[at]: "current"}
    assert [versions.position(each) for each in (*places, "x")] == [*places.values(), ""]
