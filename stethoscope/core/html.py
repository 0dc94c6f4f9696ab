"""Write self-contained HTML pages: text is escaped, data and images are inlined, nothing is fetched."""

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
"""Content security policy of every page: even if escaping failed, nothing could be fetched or sent."""
LARGEST_PNG = 256  # pixels along the longer side; larger images become JPEG


def escape(text: object) -> str:
    """Escape text for an element or a quoted attribute, as the templates do.

    >>> escape('<script>"&')
    '&lt;script&gt;&#34;&amp;'
    """
    from markupsafe import escape as escape_markup

    return str(escape_markup(str(text)))


def json_text(data: Any) -> str:
    """Write JSON in which no text can be read as a tag, wherever it is put in a page.

    Raises:
        ValueError: a number is not finite, so that JSON has no value for it.

    >>> json_text({"text": "</script>"})
    '{"text":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def json_block(data: Any) -> Markup:
    """Write data for the page's script into a ``<script id="data">`` that browsers do not run.

    >>> print(json_block({"text": "</script><b>"}))
    <script type="application/json" id="data">{"text":"\\u003c/script\\u003e\\u003cb\\u003e"}</script>
    """
    from markupsafe import Markup

    return Markup(f'<script type="application/json" id="data">{json_text(data)}</script>')


def data_uri(image: Image, side: int | None = None) -> str:
    """Encode an image as a data URI: a PNG if it is small, else a JPEG.

    Args:
        image: RGB.
        side: pixels of the longer side at most; larger images are scaled down. None for no limit.
    """
    if side is not None and max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    kind, options = ("png", {"optimize": True}) if max(image.size) <= LARGEST_PNG else ("jpeg", {"quality": 85})
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def asset(name: str) -> Markup:
    """Read a style sheet or script of ours as markup.

    Args:
        name: package and file, such as ``diagnosis/viewer.css``; it lies in the package's ``templates`` folder.
    """
    from markupsafe import Markup

    return Markup(_read(name))


def render(name: str, **values: Any) -> Markup:
    """Render a template; every value that is not markup is escaped.

    Args:
        name: package and file, such as ``report/report.html``; it lies in the package's ``templates`` folder.
        values: for the template's variables.
    """
    from markupsafe import Markup

    return Markup(_environment().get_template(name).render(**values))


def document(title: str, body: Markup, style: str = "", script: str = "") -> str:
    """Write a complete page.

    Args:
        title: plain text.
        body: markup, in which all text is escaped already.
        style: CSS; like ``script`` it is not escaped, and must not contain text of a model.
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
