"""Pages for people: one file each, that asks nobody for anything and in which whatever comes from data is text."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import jinja2
from PIL import Image

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("stpm", "."), autoescape=True, undefined=jinja2.StrictUndefined
)


def template(name: str) -> jinja2.Template:
    """A template by its path in the package; it extends `pages/page.html`, whose policy lets nothing be loaded."""
    return _TEMPLATES.get_template(name)


def score_parts(row: Mapping[str, Any]) -> str:
    """What the student and the memory add to an image's score, in words; "" where the score is not their sum."""
    parts = {name: row[f"{name}_score"] for name in ("student", "memory")}
    return " + ".join(f"{name} {value:.3g}" for name, value in parts.items() if value is not None)


def jpeg(image: Image.Image) -> bytes:
    """An RGB image as the bytes of a JPEG."""
    sink = io.BytesIO()
    image.save(sink, "JPEG")
    return sink.getvalue()


def jpeg_uri(data: bytes) -> str:
    """A JPEG as a URI that holds it."""
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
