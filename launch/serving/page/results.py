"""What the page shows of a request: its place in the queue, its images so far, and the finished ones at their exact sizes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from PIL import Image

from launch.serving.jobs import CANCELLED, STOPPING, Event, Failed, Progress, Result, Waiting
from launch.serving.page.texts import data_url, image_url, prompt_of, shown_scale, status, summary

EMPTY = '<p class="tim-empty">Images appear here.</p>'
STOPPED = "Stopped."
_LOSSLESS = 128 * 128  # pixels of a preview up to which it is sent without loss


def status_of(event: Event, *, seconds: float, remarks: Sequence[str] = ()) -> str:
    """The status line. seconds: since drawing began; remarks: of the request, for example that a prompt was cut."""
    if isinstance(event, Waiting):
        ahead = f"{event.position} request{'s' * (event.position != 1)} before yours" if event.position else "yours is next"
        return status(f"Waiting: {ahead}.", is_busy=True)
    if isinstance(event, Progress):
        number = min(event.image + 1, event.images)
        images = "image" if event.images == 1 else f"image {number} of {event.images}"
        step = f", step {event.step} of {event.steps}" if event.steps else ""
        return status(f"Drawing {images}{step} …", is_busy=True, share=_share(event))
    if isinstance(event, Failed):
        if event.sentence == CANCELLED:
            return status(STOPPED)
        return status(event.sentence, is_error=True, is_busy=event.sentence == STOPPING)
    return status(" ".join([_finished(event.results, seconds), *remarks]))


def previews(event: Progress, *, size: tuple[int, int] | None) -> str:
    """The images in the making, after those of the request that are finished. size: at which all of them are shown; None: their own."""
    finished = [_preview(_thumbnail(result), "finished image", size) for result in event.results]
    unfinished = [_preview(image, "preview", size) for image in event.previews]
    return f'<div class="tim-previews">{"".join([*finished, *unfinished])}</div>'


def cards(results: Sequence[Result]) -> str:
    """The finished images, each with its settings, its file and its actions."""
    return f'<div class="tim-results">{"".join(map(_card, results))}</div>'


def _share(event: Progress) -> float:
    """The share of the work that is done. The previews are those of the pack in hand."""
    in_hand = len(event.previews) * event.step / max(1, event.steps)
    return min(1.0, (event.image + in_hand) / event.images)


def _finished(results: Sequence[Result], seconds: float) -> str:
    evaluations = sum(result.evaluations for result in results)
    memory = max(result.memory for result in results) / 1e9
    seed = results[0].settings.seed
    count = "1 image" if len(results) == 1 else f"{len(results)} images"
    return f"{count} in {seconds:.1f} s, {evaluations} evaluation{'s' * (evaluations != 1)}, {memory:.2f} GB of memory, seed {seed}."


def _card(result: Result) -> str:
    settings, url = result.settings, image_url(result.image_id)
    scale = shown_scale(settings.width, settings.height)
    facts = f"{result.evaluations} evaluation{'s' * (result.evaluations != 1)} · {result.seconds:.1f} s · {result.memory / 1e9:.2f} GB"
    enlarged = f" · shown {scale} × as large" if scale > 1 else ""
    prompt, label = escape(prompt_of(settings), quote=True), escape(result.image_id, quote=True)
    return f"""<figure class="tim-card" data-image="{label}">
<a href="{url}" target="_blank" rel="noopener" title="Open the image alone"><img src="{url}" alt="{prompt}" width="{settings.width * scale}"
 height="{settings.height * scale}" class="{"tim-pixels" if scale > 1 else ""}"></a>
<figcaption><span class="tim-prompt">{prompt}</span><span>{summary(settings)}</span><span>{facts}{enlarged}</span></figcaption>
<div class="tim-actions"><a class="tim-button" href="{url}" download>Download</a>
<button class="tim-button" data-action="input" data-id="{label}" data-url="{url}">Use as input</button>
<button class="tim-button" data-action="load" data-id="{label}">Load parameters</button></div></figure>"""


def _thumbnail(result: Result) -> Image.Image:
    image = result.image
    image.thumbnail((512, 512))
    return image


def _preview(image: Image.Image, alt: str, size: tuple[int, int] | None) -> str:
    """A small image at the size of the finished one, so that nothing moves when that takes its place."""
    is_small = image.width * image.height <= _LOSSLESS
    width, height = size or image.size
    scale = shown_scale(width, height)
    shown = f'width="{width * scale}" height="{height * scale}" class="{"tim-pixels" if scale > 1 else ""}"'
    return f'<img src="{data_url(image, lossless=is_small)}" alt="{alt}" {shown}>'
