"""A page as a real browser shows it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def check_page(browser: Any, uri: str, width: int, scheme: str) -> None:
    """Nothing on it runs that came from data, it asks nobody for anything, fits the width, and can be read."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    told: list[str] = []
    asked: list[str] = []
    tab.on("dialog", lambda dialog: (told.append(dialog.message), dialog.dismiss()))
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(uri)
    assert told == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.locator("img:not([src^='data:'])").count() == 0
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    # What carries text must stand out from what is behind it.
    picture = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("L"), float)
    assert abs(np.median(picture) - (255 if scheme == "light" else 0)) < 60
    assert picture.std() > 15
    tab.close()
