"""Pages, fragments of pages and model cards from the templates, style sheet and script in assets/.

A page is one file that loads nothing from elsewhere: style, script, plots and videos stand in it.
"""

import base64
import functools
import io
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image


def asset(name: str) -> str:
    """Return the text of a file in assets/."""
    return (resources.files("promag.reports") / "assets" / name).read_text(encoding="utf-8")


def render(template: str, **values: Any) -> str:
    """Return a template of assets/ with `values` in it; in HTML every value is escaped unless it is Markup."""
    return _environment().get_template(template).render(values)


def render_part(template: str, part: str, **values: Any) -> str:
    """Return one macro of a template, called with `values`."""
    return str(getattr(_environment().get_template(template).module, part)(**values))


def render_page(template: str, **values: Any) -> str:
    """Return a whole page, with the style sheet and the script inside."""
    return render(template, style=Markup(asset("page.css")), script=Markup(asset("page.js")), **values)


def jpeg_uri(picture: Image.Image) -> str:
    """Return a picture as the data URI of a JPEG."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
