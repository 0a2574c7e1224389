"""nightly.json and the message of the webhook: the nights for machines. nightly.schema.json is its JSON schema."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from stpm import storage
from stpm.monitoring.night_folder import NightFolder
from stpm.monitoring.nights import CategoryRecord, Night, headline, ordered_categories

PAGE_FILE, JSON_FILE = "nightly.html", "nightly.json"
_FORMAT = 1
_DISCOVERIES = ("rate", "cut_off", "count", "categories")
# Maximum number of categories in a message of the webhook.
_MAX_CATEGORIES = 100


def nightly_json(nights: Sequence[Night], out: str, created: str) -> bytes:
    """Write nightly.json.

    Args:
        nights: one or more, oldest first.
        out: URI of the folder of all nights.
        created: time of writing.
    """
    values = {"format": _FORMAT, "created": created, "out": out, "nights": [_night(night, out) for night in nights]}
    return json.dumps(values, indent=1, ensure_ascii=False).encode()


def webhook_message(night: Night, out: str, created: str) -> bytes:
    """Write the message of the webhook: the night, with the categories to look at. Chats show its `text`."""
    values = _night(night, out)
    flagged = {
        name: category for name, category in values["categories"].items() if category["level"] in ("act", "watch")
    }
    values["categories"] = dict(list(flagged.items())[:_MAX_CATEGORIES])
    message = {
        "format": _FORMAT,
        "text": _chat_text(headline(night)),
        "created": created,
        "page": storage.join(out, PAGE_FILE),
    }
    return json.dumps(message | values, ensure_ascii=False).encode()


def _chat_text(text: str) -> str:
    """Escape markup of chats, which names of categories may hold: `<!channel>` would call everybody."""
    return html.escape("".join(character if character.isprintable() else " " for character in text), quote=False)


def _night(night: Night, out: str) -> dict[str, Any]:
    found = night.discoveries
    return {
        "date": night.date,
        "folder": NightFolder.of(out, night.day).uri,
        "sources": list(night.sources),
        "images": night.images,
        "alarms": night.alarms,
        "errors": night.errors,
        "unfinished": night.unfinished,
        "problem": night.problem,
        "levels": night.levels,
        "categories": {name: _category(record) for name, record in ordered_categories(night)},
        "discoveries": {name: getattr(found, name) for name in _DISCOVERIES} if found else None,
        "error_examples": [asdict(example) for example in night.error_examples],
    }


def _category(record: CategoryRecord) -> dict[str, Any]:
    rate = record.alarm_rate
    return {
        "level": record.verdict.level if record.verdict else None,
        "changes": [asdict(change) for change in record.verdict.changes] if record.verdict else [],
        "model_id": record.model_id,
        "images": record.images,
        "alarms": record.alarms,
        "alarm_rate": rate.value if rate else None,
        "alarm_rate_interval": list(rate.interval()) if rate else None,
        "false_alarm_rate": record.false_alarm_rate,
        "median_p_value": record.median_p_value,
        "errors": record.errors,
    }
