"""The Jinja templates of the report. Every value is escaped unless it is markup that a template rendered."""

from __future__ import annotations

import unicodedata
from base64 import b64encode
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_MAX_CHARACTERS = 300  # shown of a caption, path or message


def shown(text: str) -> str:
    """At most 300 characters, without control characters and bidirectional marks, which could reorder the text around them."""
    kept = "".join(character for character in text[: 2 * _MAX_CHARACTERS] if unicodedata.category(character)[0] != "C")
    return kept if len(kept) <= _MAX_CHARACTERS else kept[:_MAX_CHARACTERS] + "…"


def render_template(name: str, **values: Any) -> Markup:
    """Render a template file of this folder."""
    return Markup(_TEMPLATES.get_template(name).render(values))


_TEMPLATES = Environment(
    loader=PackageLoader("dataprep.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
_TEMPLATES.filters |= {"shown": shown, "base64": lambda data: b64encode(data).decode("ascii")}
