"""Records of nights that no job wrote."""

from __future__ import annotations

import datetime

import numpy as np
from PIL import Image

from stpm.data.encode import encode_jpeg
from stpm.monitoring.change import Change, Level
from stpm.monitoring.drift import Verdict
from stpm.monitoring.nights import CategoryRecord, ErrorExample, Night, TopImage
from stpm.pages import jpeg_uri

LAST = datetime.date(2026, 11, 24)


def make_record(rng: np.random.Generator, level: Level | None, reason: str) -> CategoryRecord:
    """Make a night of a category with 2,000 images."""
    alarms = int(rng.binomial(2000, 0.01 if level == "fine" else 0.04))
    verdict = Verdict("fine", ()) if level else None
    if level and level != "fine":
        verdict = Verdict(
            level, (Change("brightness", level, 1e-9, 2.0, reason), Change("alarms", level, 1e-4, 1.0, reason))
        )
    brightness = 120 + float(rng.normal(0, 1)) + (12 if level == "act" else 0)
    return CategoryRecord(
        "nut-0123456789ab",
        2000,
        alarms,
        {"damaged": 2, "empty": 1} if level == "watch" else {},
        0.01,
        float(rng.uniform(0.45, 0.55)) if level == "fine" else 0.3,
        {"brightness": brightness},
        {"brightness": 120.0},
        verdict,
    )


def make_nights(
    categories: list[str], count: int, *, act: int, watch: int, text: str = "brighter by 10 %: 132 instead of 120"
) -> list[Night]:
    """Make nights on the last of which the first categories are to act on, and the next ones to watch."""
    rng = np.random.default_rng(0)
    jpeg = encode_jpeg(Image.fromarray(rng.integers(60, 200, (64, 96, 3), np.uint8)).resize((384, 256)))
    top = tuple(
        TopImage(
            f"s3://dump/2026-11-24/{text}/{i}.png",
            categories[i % len(categories)],
            5.0 - i / 10,
            1.0,
            0.002,
            True,
            picture,
        )
        for i, picture in enumerate([jpeg_uri(jpeg)] * 11 + [""])
    )
    examples = tuple(
        ErrorExample(kind, categories[-1], f"s3://dump/{text}/{kind}.png", text) for kind in ("damaged", "empty")
    )
    nights = []
    for number in range(count):
        date = LAST - datetime.timedelta(days=count - 1 - number)
        is_last = number == count - 1
        levels: list[Level] = [
            "act" if i < act and is_last else "watch" if i < act + watch and number > count - 4 else "fine"
            for i in range(len(categories))
        ]
        nights.append(
            Night(
                date.isoformat(),
                (f"s3://dump/{date}",),
                ("001", "002") if number == count - 2 else ("001",),
                3 if is_last else 0,
                text if number in (3, count - 1) else "",
                {name: make_record(rng, level, text) for name, level in zip(categories, levels, strict=True)},
                examples,
                top if is_last else (),
                pages=("001",),
            )
        )
    return nights
