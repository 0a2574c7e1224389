"""HTML pages: one self-contained file each, which loads nothing and escapes all text that comes from data."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jinja2
import numpy as np

from stpm.data.heatmaps import overlay_png

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("stpm", "."), autoescape=True, undefined=jinja2.StrictUndefined
)


def _view_scores(row: Mapping[str, Any]) -> str:
    """Write what each of two views has in an image's anomaly map; "" if the model has one view."""
    scores = [f"{view} {row[name]:.3g}" for view in ("fine", "coarse") if row[name := f"{view}_score"] is not None]
    return ", ".join(scores) if len(scores) > 1 else ""


def render(template: str, /, **values: Any) -> str:
    """Render a page from a template, given by its path in the package.

    The template extends `pages/page.html`, whose policy blocks all loading. In the policy, replace SCRIPT-HASH by the
    hash of the page's last script, or of an empty one, so that no other one runs.
    """
    page = _TEMPLATES.get_template(template).render(values)
    script = ["", *_SCRIPT.findall(page)][-1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return page.replace("SCRIPT-HASH", f"sha256-{digest}", 1)


def data_uri(kind: Literal["jpeg", "png"], picture: bytes) -> str:
    """Write a picture as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


_TEMPLATES.globals["bar_colours"] = lambda: data_uri("png", overlay_png(np.arange(256, dtype=np.uint8)[None]))
_TEMPLATES.filters |= {"views": _view_scores, "jpeg_uri": partial(data_uri, "jpeg")}
