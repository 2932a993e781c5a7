"""Write sampled images with their settings, and read the settings back.

| format | A1111's text | full settings | XMP |
| --- | --- | --- | --- |
| PNG | text chunk `parameters` | text chunk `tim` (JSON) | text chunk `XML:com.adobe.xmp` |
| JPEG, WebP, AVIF | EXIF UserComment | in the XMP packet, `tim:settings` (JSON) | XMP packet |
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from launch.sampling.files import xmp
from launch.sampling.files.a1111 import from_a1111, parameters_of, to_a1111
from launch.sampling.files.exif import EXIF_IFD, USER_COMMENT, comment_of, exif_with_comment
from launch.sampling.files.formats import ImageFormat
from launch.sampling.files.settings import Settings
from pipeline.errors import one_line
from pipeline.storage.atomic import publish

TRANSPARENT = ("LA", "PA", "RGBA")  # modes of Pillow
FORMATS_READ = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "BMP")
_PARAMETERS, _TIM, _XMP_OF_PNG = "parameters", "tim", "XML:com.adobe.xmp"
_LONGEST_IN_JPEG = 6_500  # characters of a prompt in an EXIF block of JPEG, which holds 64 kB
_MODES = {"png": ("1", "L", "LA", "RGB", "RGBA"), "jpeg": ("L", "RGB"), "webp": ("RGB", "RGBA"), "avif": ("RGB", "RGBA")}
_CARRIED = {"icc_profile", "exif", "xmp", "comment", "dpi", "transparency"}
_REMEDY = "give an image that tim or A1111 wrote with its metadata"


class NoSettings(ValueError):
    """An image without settings that can be read."""


class Recorded(NamedTuple):
    """What an image file records. of_a1111: the parameters of A1111's text by name, empty if the file has our settings."""

    settings: Settings
    of_a1111: Mapping[str, str]


def write_image(path: Path, image: Image.Image, settings: Settings, *, form: ImageFormat, metadata: bool = True) -> None:
    """Write an image atomically, with its settings unless `metadata` is false. Creates its folder.

    Raises:
        ValueError: the format cannot store its size or its transparency.
        OSError: the file cannot be written; names it.
    """
    try:
        content = encode_image(image, settings, form=form, metadata=metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with publish(path) as stream:
            stream.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror or one_line(error), str(path)) from error


def encode_image(image: Image.Image, settings: Settings, *, form: ImageFormat, metadata: bool = True) -> bytes:
    """The bytes of an image file, with its settings unless `metadata` is false.

    Raises:
        ValueError: the format cannot store its size or its transparency.
    """
    form.check_size(image.width, image.height)
    if form.name == "jpeg" and image.mode in TRANSPARENT:
        raise ValueError("jpeg has no transparency; use --format png, webp or avif")
    stored = image if image.mode in _MODES[form.name] else image.convert("RGBA" if image.mode in TRANSPARENT else "RGB")
    if _CARRIED & stored.info.keys():  # Pillow would write them; nothing of where the image came from is kept
        stored = stored.copy() if stored is image else stored
        stored.info = {}
    extra = _metadata(settings, form=form) if metadata else {}
    content = io.BytesIO()
    stored.save(content, **form.save_options(), **extra)
    return content.getvalue()


def read_settings(path: Path) -> Settings:
    """The settings that an image was drawn with: ours, or of A1111's what it has.

    Raises:
        NoSettings: no such file, not an image, or no settings in it; names the file and the remedy.
    """
    try:
        with open(path, "rb") as stream:
            return recorded_in(stream, named=str(path)).settings
    except FileNotFoundError as error:
        raise NoSettings(f"{path}: no such file; {_REMEDY}") from error
    except OSError as error:
        raise NoSettings(f"{path}: not an image that can be read ({one_line(error)}); {_REMEDY}") from error


def recorded_in(stream: BinaryIO, *, named: str) -> Recorded:
    """What the bytes of an image file record. named: in messages. Raises NoSettings, like `read_settings`."""
    try:
        with Image.open(stream, formats=FORMATS_READ) as image:
            found = _read(image)
    except NoSettings as error:
        raise NoSettings(f"{named}: {error}; {_REMEDY}") from error
    except Exception as error:  # the parsers of damaged files raise their own types
        raise NoSettings(f"{named}: not an image that can be read ({_reason(error)}); {_REMEDY}") from error
    if found is None:
        raise NoSettings(f"{named}: has no settings of its drawing; {_REMEDY}")
    return found


def is_complete(path: Path) -> bool:
    """Whether an image file ends where its format says, so that no part is missing. False if it cannot be read."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(12)
            stream.seek(max(0, size - 12))
            tail = stream.read()
            if head.startswith(b"\x89PNG\r\n\x1a\n"):
                return tail == b"\0\0\0\0IEND\xaeB`\x82"
            if head.startswith(b"\xff\xd8"):
                return tail.endswith(b"\xff\xd9")
            if head[:4] == b"RIFF" and head[8:] == b"WEBP":
                return size == int.from_bytes(head[4:8], "little") + 8
            return head[4:8] == b"ftyp" and _ends_with_a_box(stream, size=size)
    except OSError:
        return False


def _metadata(settings: Settings, *, form: ImageFormat) -> dict[str, Any]:
    """The arguments of `Image.save` that store the settings."""
    text = settings.to_json()
    source = xmp.COMPOSITE if settings.mask is not None else xmp.GENERATED
    tool = "tim" if settings.tim_version is None else f"tim {settings.tim_version}"
    if form.name == "png":
        chunks = PngInfo()
        chunks.add_text(_PARAMETERS, to_a1111(settings))
        chunks.add_text(_TIM, text)
        chunks.add_itxt(_XMP_OF_PNG, xmp.packet(source=source, tool=tool, settings=None).decode())
        return {"pnginfo": chunks}
    if form.name == "jpeg":
        packet, segments = xmp.packets_of_jpeg(source=source, tool=tool, settings=text)
        return {"exif": exif_with_comment(to_a1111(settings, longest=_LONGEST_IN_JPEG)), "xmp": packet, "extra": segments}
    return {"exif": exif_with_comment(to_a1111(settings)), "xmp": xmp.packet(source=source, tool=tool, settings=text)}


def _read(image: Image.Image) -> Recorded | None:
    """What the metadata of an opened image record, None if they have no settings. Raises NoSettings if ours are damaged."""
    packet = image.info.get("xmp", b"")
    packet = packet.encode() if isinstance(packet, str) else packet
    segments = [body for name, body in getattr(image, "applist", []) if name == "APP1"]
    ours = image.info.get(_TIM) or xmp.settings_in(packet, segments=segments)
    if isinstance(ours, str):
        try:
            return Recorded(Settings.from_json(ours), {})
        except ValueError as error:
            raise NoSettings(str(error)) from error
    if xmp.lacks_settings(packet):
        raise NoSettings("has lost a part of its settings")
    text = image.info.get(_PARAMETERS)
    if not isinstance(text, str):
        text = comment_of(image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT))
    settings = from_a1111(text, width=image.width, height=image.height)
    return None if settings is None else Recorded(settings, parameters_of(text))


def _reason(error: Exception) -> str:
    return "no known image format" if isinstance(error, UnidentifiedImageError) else one_line(error)  # Pillow's names an object in memory


def _ends_with_a_box(stream: io.BufferedReader, *, size: int) -> bool:
    """Whether the boxes of an ISO media file, such as AVIF, end with the file."""
    position = 0
    while position < size:
        stream.seek(position)
        header = stream.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0:  # up to the end of the file
            return True
        if length < 8:
            return False
        position += length
    return position == size
