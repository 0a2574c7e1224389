import pytest

from stpm.errors import ConfigError
from stpm.scoring.inputs.category_rule import CategoryRule


@pytest.mark.parametrize(
    ("pattern", "uri", "category"),
    [
        ("{category}/{date}/{name}", "s3://dump/plant/nut/2026-11-24/1.png", "nut"),
        ("{category}/{name}", "nut/1.png", "nut"),
        ("{line}-{category}.png", "s3://dump/7-nut.png", "nut"),
        ("{category}/{date}/{name}", "1.png", ""),
        ("raw.{category}/{name}", "/data/rawXnut/1.png", ""),
        ("raw.{category}/{name}", "/data/raw.nut/1.png", "nut"),
    ],
)
def test_a_pattern_matches_the_end_of_the_path(pattern: str, uri: str, category: str) -> None:
    assert CategoryRule(pattern=pattern).category(uri) == category


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("{name}", "exactly once, and every other name at most once"),
        ("{category}/{category}", "exactly once, and every other name at most once"),
        ("{category}/{a}/{a}", "exactly once, and every other name at most once"),
        ("{category}/{2}", r"\{2\} is not a name"),
        ("{category}/{shot-date}/{name}", "only letters, digits and _"),
        ("{category}/{}/{name}", "only letters, digits and _"),
        ("{category}}/{name}", "only letters, digits and _"),
    ],
)
def test_a_pattern_must_be_valid(pattern: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        CategoryRule(pattern=pattern)
    with pytest.raises(ConfigError, match="give one"):
        CategoryRule("nut", pattern)
