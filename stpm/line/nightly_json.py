"""nightly.json and the message of the webhook: the nights for machines. nightly.schema.json is its JSON schema."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from stpm import storage
from stpm.line.night import CategoryNight, Night
from stpm.line.night_folder import NightFolder

PAGE_FILE, JSON_FILE = "nightly.html", "nightly.json"
_FORMAT = 1
# Maximum number of categories in a message of the webhook.
_MAX_CATEGORIES = 100


def nightly_json(nights: Sequence[Night], out: str, created: str) -> bytes:
    """Write nightly.json about one night or more, oldest first, that are in the folder with this URI."""
    values = {"format": _FORMAT, "created": created, "out": out, "nights": [_night(night, out) for night in nights]}
    return json.dumps(values, indent=1, ensure_ascii=False).encode()


def webhook_message(night: Night, out: str, created: str) -> bytes:
    """Write the message of the webhook: the night, with the categories to look at. Chats show its `text`."""
    values = _night(night, out)
    flagged = [item for item in values["categories"].items() if item[1]["level"] not in (None, "fine")]
    # Escape what chats take for markup: a category named `<!channel>` would call everybody.
    text = "".join(character if character.isprintable() else " " for character in night.headline())
    message = {
        "format": _FORMAT,
        "text": html.escape(text, quote=False),
        "created": created,
        "page": storage.join(out, PAGE_FILE),
    }
    return json.dumps(message | values | {"categories": dict(flagged[:_MAX_CATEGORIES])}, ensure_ascii=False).encode()


def _night(night: Night, out: str) -> dict[str, Any]:
    """Write the record of a night, without its pictures, and with what follows from it."""
    values = asdict(replace(night, categories={})) | asdict(night.total)
    values.pop("top")
    return values | {
        "folder": NightFolder.of(out, night.day).uri,
        "levels": night.levels,
        "categories": {name: _category(category) for name, category in night.ordered_categories()},
    }


def _category(category: CategoryNight) -> dict[str, Any]:
    values, rate = asdict(category), category.alarm_rate
    values |= values.pop("verdict") or {"level": None, "changes": ()}
    return values | {"alarm_rate": rate and rate.value, "alarm_rate_interval": rate and rate.interval()}
