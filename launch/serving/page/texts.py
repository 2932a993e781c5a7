"""Pieces of HTML that several sections write. Whatever a user typed is escaped here."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from launch.sampling.files.settings import Settings

SMALL = 192  # images whose longer side is below this are shown enlarged
_LONGEST_PROMPT = 160  # characters that are shown


def hint(text: str, *, is_error: bool = False) -> str:
    """A line beside a control."""
    return f'<p class="tim-hint{" tim-error" if is_error else ""}">{escape(text)}</p>'


def status(text: str, *, is_error: bool = False, is_busy: bool = False, share: float | None = None) -> str:
    """The status line. is_busy: a request waits or is drawn, or the server is stopping: the page looks whether it
    is there; share: of it that is drawn, from 0 to 1, None if it waits."""
    bar = "" if share is None else f'<progress max="1" value="{share:.4f}" aria-label="Progress"></progress>'
    state = "" if not is_busy else ' data-busy="waiting"' if share is None else ' data-busy="drawing"'
    return f'<p class="tim-status{" tim-error" if is_error else ""}"{state}>{escape(text)}{bar}</p>'


def summary(settings: Settings) -> str:
    """The settings in a line, as text."""
    steps = settings.steps if settings.times is None else len(settings.times) - 1
    parts = [f"{settings.width} × {settings.height}", f"{steps} step{'s' * (steps != 1)}", f"guidance {settings.guidance or 0:g}"]
    return " · ".join([*parts, f"seed {settings.seed}"])


def prompt_of(settings: Settings) -> str:
    """The prompt as text, cut where it is long."""
    text = settings.prompt if isinstance(settings.prompt, str) else f"class {settings.prompt}"
    return text if len(text) <= _LONGEST_PROMPT else text[: _LONGEST_PROMPT - 1] + "…"


def shown_scale(width: int, height: int) -> int:
    """The whole number by which an image of this size is enlarged for viewing."""
    return -(-SMALL // max(width, height))


def data_url(image: Image.Image, *, lossless: bool) -> str:
    """An image within a page, as PNG or JPEG."""
    content = io.BytesIO()
    rgb = image.convert("RGB")
    rgb.save(content, "PNG") if lossless else rgb.save(content, "JPEG", quality=90)
    return f"data:image/{'png' if lossless else 'jpeg'};base64,{base64.b64encode(content.getvalue()).decode()}"


def image_url(image_id: str) -> str:
    """Where the server has the file of an image, relative to the page."""
    return f"api/images/{escape(image_id)}.png"
