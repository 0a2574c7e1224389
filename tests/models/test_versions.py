import pytest
from hypothesis import given
from hypothesis import strategies as st

from stpm.errors import ModelError
from stpm.models.versions import Version, Versions


def version(model_id: str) -> Version:
    return Version(model_id, f"images of {model_id}")


def ids(versions: Versions) -> tuple[str, str, str]:
    """Return the ids before, at and after the current model, one letter each."""
    parts = versions.previous, (versions.current,), versions.next
    before, current, after = ("".join(each.model_id for each in part) for part in parts)
    return before, current, after


def published(letters: str) -> Versions:
    versions = Versions(version(letters[0]))
    for letter in letters[1:]:
        versions = versions.publish(version(letter))
    return versions


def test_two_roll_backs_go_two_back_and_forward_again() -> None:
    versions = published("abc")
    assert ids(versions) == ("ab", "c", "")
    assert ids(versions.roll_back()) == ("a", "b", "c")
    assert ids(versions.roll_back().roll_back()) == ("", "a", "bc")
    assert versions.roll_back().roll_back().roll_forward().roll_forward() == versions
    assert versions.roll_back().current == version("b")
    with pytest.raises(ModelError, match="no model was current before a"):
        versions.roll_back().roll_back().roll_back()
    with pytest.raises(ModelError, match="no model was rolled back since c became current"):
        versions.roll_forward()


def test_a_new_model_after_a_roll_back_takes_the_place_of_those_rolled_back() -> None:
    versions = published("abc").roll_back().publish(version("d"))
    assert ids(versions) == ("ab", "d", "")
    assert ids(versions.roll_back()) == ("a", "b", "d")
    assert "rolled back (c): --roll-forward no" in published("abc").roll_back().describe_replaced("d")


def test_the_same_model_again_adds_no_version() -> None:
    versions = published("ab").roll_back()
    again = versions.publish(Version("a", "the same images, uploaded again"))
    assert ids(again) == ("", "a", "b")
    assert again.current.data_fingerprint == "the same images, uploaded again"
    assert versions.describe_replaced("b") == ""
    # Back to an earlier model by fitting is a version of its own.
    assert ids(published("aba").roll_back()) == ("a", "b", "a")


def test_positions_and_what_is_forgotten() -> None:
    versions = published("abcd").roll_back()
    assert [versions.position(letter) for letter in "abcdx"] == ["2 before", "1 before", "current", "1 after", ""]
    assert ids(versions.forget(1)) == ("b", "c", "d")
    assert ids(versions.forget(9)) == ids(versions)


@given(st.lists(st.sampled_from(["publish", "back", "forward"]), max_size=12))
def test_moving_never_loses_a_version_and_back_undoes_forward(steps: list[str]) -> None:
    versions, number = published("a"), 0
    for step in steps:
        before = versions
        if step == "publish":
            number += 1
            versions = versions.publish(version(f"<{number}>"))
            assert versions.current == version(f"<{number}>")
        elif step == "back" and versions.previous:
            versions = versions.roll_back()
            assert versions.roll_forward() == before
        elif step == "forward" and versions.next:
            versions = versions.roll_forward()
            assert versions.roll_back() == before
        everything = (*versions.previous, versions.current, *versions.next)
        if step != "publish":
            assert {*before.previous, before.current, *before.next} <= {*everything}
