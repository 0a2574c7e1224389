"""Checks of a page: its tags, and how a real browser shows it."""

import io
import re
from html.parser import HTMLParser
from itertools import product
from typing import Any

import numpy as np
from PIL import Image

# A text from data that is markup.
EVIL = "<img src=x onerror=alert(1)>$\"'</script>"


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


def check_tags(tags: Tags, scripts: int = 1) -> None:
    """Check that a page has no other script than its own, and loads no more than the pictures that it holds."""
    assert [tag for tag, _ in tags.found].count("script") == scripts
    for tag, attributes in tags.found:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name) or ""
            assert tag == "a" or not value or re.match("data:image/(jpeg|png);base64,|#", value), (tag, value[:100])


def open_tab(browser: Any, uri: str) -> tuple[Any, list[str]]:
    """Open a page, and collect what scripts in it say, and what it requests of others."""
    tab = browser.new_page()
    messages: list[str] = []
    tab.on("dialog", lambda dialog: (messages.append(dialog.message), dialog.dismiss()))
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on(
        "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or messages.append(request.url)
    )
    tab.goto(uri)
    return tab, messages


def check_page(browser: Any, uri: str) -> None:
    """Check that a page runs no code from data, requests nothing, fits a phone and a screen, and is readable."""
    tab, messages = open_tab(browser, uri)
    assert tab.locator("img:not([src^='data:']), image:not([href^='data:'])").count() == 0
    # It fails for an image that is not one.
    tab.evaluate("Promise.all([...document.querySelectorAll('img, image')].map(image => image.decode()))")
    for width, scheme in product((390, 1440), ("light", "dark")):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)
        assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        # Text must stand out from its background.
        picture = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("L"), float)
        assert abs(np.median(picture) - (255 if scheme == "light" else 0)) < 60
        assert picture.std() > 15
    assert messages == []
    tab.close()
