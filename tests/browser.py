"""Checks of a page: its tags, and how a real browser shows it."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from typing import Any

import numpy as np
from PIL import Image


class Tags(HTMLParser):
    """The tags of a page, with their attributes, in the order in which they start; and its pieces of text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def open_tab(browser: Any, **options: Any) -> tuple[Any, list[str]]:
    """Open a tab, and collect what scripts in it say."""
    tab = browser.new_page(**options)
    messages: list[str] = []
    tab.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    return tab, messages


def check_page(browser: Any, uri: str, width: int, scheme: str) -> None:
    """Check that a page runs no code from data, requests nothing, fits the width, and is readable."""
    tab, messages = open_tab(browser, viewport={"width": width, "height": 900}, color_scheme=scheme)
    requests: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(uri)
    assert messages == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.locator("img:not([src^='data:'])").count() == 0
    assert tab.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    # Text must stand out from its background.
    picture = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("L"), float)
    assert abs(np.median(picture) - (255 if scheme == "light" else 0)) < 60
    assert picture.std() > 15
    tab.close()
