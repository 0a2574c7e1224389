"""nightly.json and the message of the webhook: the nights for machines. nightly.schema.json is its JSON schema."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from stpm import storage
from stpm.line.night import Night
from stpm.line.night_folder import NightFolder

PAGE_FILE, JSON_FILE = "nightly.html", "nightly.json"
_FORMAT = 2
# Maximum number of categories in a message of the webhook.
_MAX_CATEGORIES = 100


def nightly_json(nights: Sequence[Night], out: str, created: str) -> bytes:
    """Write nightly.json about one night or more, oldest first, that are in the folder with this URI."""
    values = {"format": _FORMAT, "created": created, "out": out, "nights": [_night(night, out) for night in nights]}
    return json.dumps(values, indent=1, ensure_ascii=False).encode()


def webhook_message(night: Night, out: str, created: str) -> bytes:
    """Write the message of the webhook: the night, with the categories to look at. Chats show its `text`."""
    # Escape what chats take for markup: a category named `<!channel>` would call everybody.
    text = "".join(character if character.isprintable() else " " for character in night.headline())
    values = _night(night, out)
    values |= {
        "format": _FORMAT,
        "text": html.escape(text, quote=False),
        "created": created,
        "page": storage.join(out, PAGE_FILE),
        "categories": {name: values["categories"][name] for name in night.flagged()[:_MAX_CATEGORIES]},
    }
    return json.dumps(values, ensure_ascii=False).encode()


def _night(night: Night, out: str) -> dict[str, Any]:
    """Return the record of a night, with what follows from it."""
    categories = {}
    for name, category in night.ordered_categories().items():
        rate = category.alarm_rate
        rates = {"alarm_rate": rate and rate.value, "alarm_rate_interval": rate and rate.interval()}
        categories[name] = asdict(category) | rates
    derived = {"folder": NightFolder.of(out, night.day).uri, "levels": night.levels, "categories": categories}
    return asdict(replace(night, categories={})) | asdict(night.total) | derived
