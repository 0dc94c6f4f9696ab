"""Pages that open anywhere: text is escaped, data and pictures lie inside, nothing is fetched."""

from __future__ import annotations

import base64
import html
import io
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy of every page: even a mistake in escaping could fetch nothing and send nothing."""


def escape(text: object) -> str:
    """Text for the inside of an element or a quoted attribute.

    >>> escape('<script>"&')
    '&lt;script&gt;&quot;&amp;'
    """
    return html.escape(str(text), quote=True)


def json_block(name: str, data: Any) -> str:
    """Data for the page's script, in an element of that id that no browser runs.

    >>> json_block("data", {"text": "</script><b>"})
    '<script type="application/json" id="data">{"text":"\\\\u003c/script\\\\u003e\\\\u003cb\\\\u003e"}</script>'
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":  # so that nothing in it can end the element
        text = text.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def png(image: Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def data_uri(image: Image) -> str:
    """The picture as the address of an ``<img>``."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode("ascii")


def photo_uri(image: Image, side: int) -> str:
    """The picture, at most ``side`` pixels on either side, as the address of an ``<img>``: JPEG, or PNG if tiny."""
    if max(image.size) <= side // 2:
        return data_uri(image)
    small = image.copy()
    small.thumbnail((side, side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def document(title: str, body: str, style: str = "", script: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML, its texts escaped already.
        style: CSS. ``script``: JavaScript, run after the body; both our own words, never the model's.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}\n</style>\n</head>\n<body>\n{body}\n"
        f"<script>\n{script}\n</script>\n</body>\n</html>\n"
    )
