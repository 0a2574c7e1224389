"""HTML pages: one self-contained file each, which loads nothing and escapes all text that comes from data."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jinja2

from stpm.data.heatmaps import FIRST_LEVEL, OVERLAY_COLOURS

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("stpm", "."), autoescape=True, undefined=jinja2.StrictUndefined
)


def _bar_colours() -> str:
    """Write the colours of overlays as a gradient of CSS, from level 0 to 255."""
    stops = [FIRST_LEVEL - 1, *range(FIRST_LEVEL, 256, 16), 255]
    colours = ("rgb({} {} {} / {:.0%})".format(*OVERLAY_COLOURS[i, :3], OVERLAY_COLOURS[i, 3] / 255) for i in stops)
    return ", ".join(f"{colour} {i / 2.55:.1f}%" for colour, i in zip(colours, stops, strict=True))


def _view_scores(row: Mapping[str, Any]) -> str:
    """Write what each of two views has in an image's anomaly map; "" if the model has one view."""
    scores = [f"{view} {row[name]:.3g}" for view in ("fine", "coarse") if row[name := f"{view}_score"] is not None]
    return ", ".join(scores) if len(scores) > 1 else ""


_TEMPLATES.globals["bar_colours"] = _bar_colours()
_TEMPLATES.filters["views"] = _view_scores


def render(template: str, /, **values: Any) -> str:
    """Render a page from a template, given by its path in the package.

    The template extends `pages/page.html`, whose policy blocks all loading. In the policy, replace SCRIPT-HASH by the
    hash of the page's last script, so that no other one runs.
    """
    page = _TEMPLATES.get_template(template).render(values)
    script = _SCRIPT.findall(page)[-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.replace("SCRIPT-HASH", f"sha256-{digest}", 1)


def data_uri(kind: Literal["jpeg", "png"], picture: bytes) -> str:
    """Write a picture as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
