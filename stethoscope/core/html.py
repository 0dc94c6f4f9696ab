"""Pages that open anywhere: templates escape every text, data and images lie inside, nothing is fetched."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from PIL.Image import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy of every page: even a mistake in escaping could fetch nothing and send nothing."""
LARGEST_PNG = 256  # pixels along the longer side; larger images become JPEG


def escape(text: object) -> str:
    """Escape text for the inside of an element or a quoted attribute, as the templates do.

    >>> escape('<script>"&')
    '&lt;script&gt;&#34;&amp;'
    """
    from markupsafe import escape as escape_markup

    return str(escape_markup(str(text)))


def json_text(data: Any) -> str:
    """Write JSON in which no text can be taken for a tag, wherever it is put.

    Raises:
        ValueError: a number in it is not finite, which JSON does not know.

    >>> json_text({"text": "</script>"})
    '{"text":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def json_block(name: str, data: Any) -> Markup:
    """Write data for the page's script into an element of that id that no browser runs.

    >>> print(json_block("data", {"text": "</script><b>"}))
    <script type="application/json" id="data">{"text":"\\u003c/script\\u003e\\u003cb\\u003e"}</script>
    """
    from markupsafe import Markup

    return Markup(f'<script type="application/json" id="{escape(name)}">{json_text(data)}</script>')


def data_uri(image: Image, side: int | None = None) -> str:
    """Write an image as the address of an ``<img>``: a PNG where it is small, else a JPEG.

    Args:
        image: RGB.
        side: pixels; an image whose longer side is longer is made smaller. None keeps its size.
    """
    if side is not None and max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    kind, options = ("png", {"optimize": True}) if max(image.size) <= LARGEST_PNG else ("jpeg", {"quality": 85})
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def asset(name: str) -> Markup:
    """Read a style sheet or script of our own, to be put into a page as it is.

    Args:
        name: package and file, such as ``diagnosis/viewer.css``; it lies in the package's ``templates`` folder.
    """
    from markupsafe import Markup

    return Markup(_read(name))


def render(name: str, **values: Any) -> Markup:
    """Fill in a template; every value that is not markup is escaped.

    Args:
        name: package and file, such as ``report/report.html``; it lies in the package's ``templates`` folder.
        values: by the names that the template uses.
    """
    from markupsafe import Markup

    return Markup(_environment().get_template(name).render(**values))


def document(title: str, body: Markup, style: str = "", script: str = "") -> str:
    """Write a whole page.

    Args:
        title: plain text.
        body: HTML, its texts escaped already.
        style: CSS; like ``script`` of our own, with no text of a model in it.
        script: JavaScript, run after the body.
    """
    return str(render("core/document.html", title=title, body=body, style=style, script=script, policy=POLICY))


def _read(name: str) -> str:
    package, _, file = name.partition("/")
    return files(f"stethoscope.{package}").joinpath("templates", file).read_text("utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
