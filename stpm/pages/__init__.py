"""HTML pages: one self-contained file each, which loads nothing and escapes all text that comes from data."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("stpm", "."), autoescape=True, undefined=jinja2.StrictUndefined
)


def template(name: str) -> jinja2.Template:
    """Return a template by its path in the package. It extends `pages/page.html`, whose policy lets nothing load."""
    return _TEMPLATES.get_template(name)


def score_parts(row: Mapping[str, Any]) -> str:
    """Write what student and memory add to an image's score; "" where the score is not their sum."""
    parts = {name: row[f"{name}_score"] for name in ("student", "memory")}
    return " + ".join(f"{name} {value:.3g}" for name, value in parts.items() if value is not None)


def jpeg_uri(jpeg: bytes) -> str:
    """Write a JPEG as a data URI."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
