"""Records of nights that no job wrote."""

import datetime

import numpy as np

from stpm.line.change import Change, Level
from stpm.line.night import CategoryNight, Night

LAST = datetime.date(2026, 11, 24)


def make_record(rng: np.random.Generator, level: Level, reason: str) -> CategoryNight:
    """Make a night of a category with 2,000 images."""
    alarms = int(rng.binomial(2000, 0.01 if level == "fine" else 0.04))
    changes: tuple[Change, ...] = ()
    if level == "cannot tell":
        changes = (Change("alarms", level, p_value=1.0, size=0.0, text=reason),)
    elif level in ("act", "watch"):
        changes = (
            Change("brightness", level, p_value=1e-9, size=2.0, text=reason),
            Change("alarms", level, p_value=1e-4, size=1.0, text=reason),
        )
    brightness = 120 + float(rng.normal(0, 1)) + (12 if level == "act" else 0)
    return CategoryNight(
        model_id="nut-0123456789ab",
        images=2000,
        alarms=alarms,
        errors={"damaged": 2, "empty": 1} if level == "watch" else {},
        false_alarm_rate=0.01,
        decision=reason if level == "act" else "",
        median_p_value=float(rng.uniform(0.45, 0.55)) if level == "fine" else 0.3,
        medians={"brightness": brightness},
        training_medians={"brightness": 120.0},
        level=level,
        changes=changes,
    )


def make_nights(
    categories: list[str],
    count: int,
    *,
    act: int,
    watch: int,
    unclear: int = 0,
    text: str = "brighter by 10 %: 132 instead of 120",
) -> list[Night]:
    """Make nights on the last of which the first categories are to act on, the next ones to watch, the next unclear."""
    rng = np.random.default_rng(0)
    examples = tuple(
        {"kind": kind, "category": categories[-1], "uri": f"s3://dump/{text}/{kind}.png", "message": text}
        for kind in ("damaged", "empty")
    )
    nights = []
    for number in range(count):
        date = LAST - datetime.timedelta(days=count - 1 - number)
        is_last = number == count - 1
        levels: list[Level] = [
            "act"
            if i < act and is_last
            else "watch"
            if i < act + watch and number > count - 4
            else "cannot tell"
            if act + watch <= i < act + watch + unclear
            else "fine"
            for i in range(len(categories))
        ]
        nights.append(
            Night(
                date=date.isoformat(),
                sources=(f"s3://dump/{date}",),
                runs=("001", "002") if number == count - 2 else ("001",),
                unfinished=3 if is_last else 0,
                problem=text if number in (3, count - 1) else "",
                categories={
                    name: make_record(rng, level, text) for name, level in zip(categories, levels, strict=True)
                },
                error_examples=examples,
                pages=("001",),
            )
        )
    return nights
