"""Check a TIFF before Pillow: whether Pillow reads its variant correctly, and whether all pixels are in the file.

Pillow opens variants that it reads wrongly (12 bits unscaled, 16-bit planes as noise, 16-bit min-is-white inverted), and shows missing
strips as black. This is a list of variants known to be correct; all others are `unsupported`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pipeline.images.formats.checked_header import Prepared
from pipeline.images.rejection import check_claim, check_size, damaged, unsupported

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_SAMPLES, _PLANAR, _COLOUR_MAP, _EXTRA, _FORMAT = 277, 284, 320, 338, 339
_STRIPS, _TILES = (273, 279), (324, 325)  # offsets, byte counts
_ROWS_PER_STRIP, _TILE_WIDTH, _TILE_HEIGHT, _SUBSAMPLING = 278, 322, 323, 530
_WANTED = {
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _PLANAR, _COLOUR_MAP, _EXTRA, _FORMAT),
    *(*_STRIPS, *_TILES, _ROWS_PER_STRIP, _TILE_WIDTH, _TILE_HEIGHT, _SUBSAMPLING),
}
_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_MAX_VALUES = 1 << 22  # of one tag
_PHOTOMETRICS = {0: "min-is-white", 1: "min-is-black", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELab", 9: "ICCLab"}
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point", 4: "undefined", 5: "complex", 6: "complex floating-point"}
_RAW, _OLD_JPEG, _JPEG, _CCITT = 1, 6, 7, (2, 3, 4)
_COMPRESSIONS = {_RAW, 2, 3, 4, 5, _JPEG, 8, 32773, 32946, 34925, 50000}
# (photometric, bits per sample, kinds of extra samples) that Pillow reads correctly.
_SUPPORTED: set[tuple[int, int, tuple[int, ...]]] = {
    *((photometric, bits, ()) for photometric in (0, 1) for bits in (1, 2, 4, 8)),
    (1, 16, ()),
    (1, 8, (2,)),
    *((2, bits, extra) for bits in (8, 16) for extra in ((), (0,), (1,), (2,))),
    *((3, bits, ()) for bits in (1, 2, 4, 8)),
    *((3, 8, (extra,)) for extra in (0, 2)),
    *((5, bits, ()) for bits in (8, 16)),
    (6, 8, ()),
    (8, 8, ()),
}
_PLANES = ((2, ()), (2, (2,)), (5, ()))  # photometric and extra samples that Pillow reads correctly from separate planes


@dataclass(frozen=True, slots=True)
class _Layout:
    """Pixel layout of a page: values of the tags, or their defaults."""

    height: int
    width: int
    bits: int
    photometric: int
    samples: int
    extra: tuple[int, ...]
    compression: int
    planar: bool
    format: int


def prepare_tiff(data: bytes, *, max_decode_pixels: int) -> Prepared:
    """Check the first page of a TIFF. Raises `Rejection`."""
    tags = _first_directory(data)
    for tag in (_WIDTH, _HEIGHT):
        if len(tags.get(tag, ())) != 1:
            raise damaged("its size is missing")
    height, width = tags[_HEIGHT][0], tags[_WIDTH][0]
    check_size(height, width, max_decode_pixels=max_decode_pixels)
    check_claim(height, width, length=len(data))
    layout = _layout(tags)
    _check_kind(layout, tags=tags)
    _check_strips(layout, tags=tags, length=len(data))
    colour_map = tags.get(_COLOUR_MAP, ())
    if layout.photometric == 3 and len(colour_map) != 3 << layout.bits:
        raise damaged(f"its palette has {len(colour_map)} values, not {3 << layout.bits}")
    info = {"eight_bit_palette": bytes(colour_map)} if layout.photometric == 3 and max(colour_map) < 256 else {}
    return Prepared(data=_contiguous(data) if tags.get(_PLANAR) == (2,) and not layout.planar else data, info=info, size=(height, width))


def _contiguous(data: bytes) -> bytes:
    """Clear the planar flag of a page with one sample, which Pillow misinterprets."""
    order, is_big = "<" if data[:2] == b"II" else ">", 43 in (data[2], data[3])
    (directory,) = struct.unpack_from(order + ("Q" if is_big else "I"), data, 8 if is_big else 4)
    position, entry = directory + (8 if is_big else 2), 20 if is_big else 12
    while struct.unpack_from(order + "H", data, position)[0] != _PLANAR:
        position += entry
    value = position + entry - (8 if is_big else 4)
    return data[:value] + struct.pack(order + "H", 1) + data[value + 2 :]


def _first_directory(data: bytes) -> dict[int, tuple[int, ...]]:
    """Values of the tags of the pixel layout. Raises `Rejection`."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = 43 in (data[2], data[3])
    offset_type, count_type, entry, inline = ("Q", "Q", 20, 8) if is_big else ("I", "H", 12, 4)
    try:
        directory = struct.unpack_from(order + offset_type, data, 8 if is_big else 4)[0]
        (count,) = struct.unpack_from(order + count_type, data, directory)
        start = directory + struct.calcsize("<" + count_type)
        if count * entry > len(data):
            raise damaged("its directory is cut off")
        tags: dict[int, tuple[int, ...]] = {}
        for position in range(start, start + count * entry, entry):
            tag, kind, values = struct.unpack_from(order + ("HHQ" if is_big else "HHI"), data, position)
            if tag not in _WANTED or tag in tags:
                continue
            letter = _TYPES.get(kind)
            if letter is None or values > _MAX_VALUES:
                raise damaged(f"its tag {tag} has {values} values of type {kind}")
            at = position + entry - inline
            if values * struct.calcsize(letter) > inline:
                (at,) = struct.unpack_from(order + offset_type, data, at)
            tags[tag] = struct.unpack_from(f"{order}{values}{letter}", data, at)
    except (struct.error, OverflowError) as error:  # an offset outside the file or out of range
        raise damaged("its directory is cut off") from error
    return tags


def _layout(tags: dict[int, tuple[int, ...]]) -> _Layout:
    def one(tag: int, default: int) -> int:
        return (tags.get(tag) or (default,))[0]

    compression = one(_COMPRESSION, _RAW)
    photometric = one(_PHOTOMETRIC, 0)
    extra = tags.get(_EXTRA, ())
    bits = tags.get(_BITS) or (1,)
    samples = one(_SAMPLES, 1)
    colours = {2: 3, 6: 3, 8: 3, 9: 3, 5: 4}.get(photometric, 1)
    if photometric == 2 and samples == 4 and not extra:
        extra = (2,)  # Pillow's interpretation of an unspecified fourth sample
    if len(set(bits[:samples])) > 1 or len(bits) not in (1, samples) or samples != colours + len(extra):
        raise unsupported(f"TIFF of {samples} samples of {'/'.join(map(str, bits[:8]))} bits, {len(extra)} of them extra")
    formats = set(tags.get(_FORMAT) or (1,))
    if len(formats) > 1:
        raise unsupported("TIFF whose samples are of several number formats")
    return _Layout(
        height=one(_HEIGHT, 0),
        width=one(_WIDTH, 0),
        bits=bits[0],
        photometric=photometric,
        samples=samples,
        extra=extra,
        compression=compression,
        planar=one(_PLANAR, 1) == 2 and samples > 1,
        format=formats.pop(),
    )


def _check_kind(layout: _Layout, *, tags: dict[int, tuple[int, ...]]) -> None:
    """Raise `Rejection` for variants that Pillow cannot read, or reads wrongly."""
    colour = _PHOTOMETRICS.get(layout.photometric, f"photometric {layout.photometric}")
    extra = f" with extra samples {layout.extra}" if layout.extra else ""
    kind = f"{_FORMATS.get(layout.format, 'unknown')} {layout.bits}-bit {colour} TIFF{extra}"
    if layout.format != 1 or (layout.photometric, layout.bits, layout.extra) not in _SUPPORTED:
        raise unsupported(kind)
    if layout.compression not in _COMPRESSIONS:
        raise unsupported(f"TIFF of compression {layout.compression}")
    if layout.planar and (layout.bits != 8 or (layout.photometric, layout.extra) not in _PLANES or layout.compression == _JPEG):
        raise unsupported(f"{kind} in separate planes")
    if layout.photometric == 6 and layout.compression == _RAW:
        raise unsupported(f"{kind} without compression")  # before version 13, Pillow reads it as RGB
    if layout.photometric == 6 and layout.compression != _JPEG and tags.get(_SUBSAMPLING, (2, 2)) != (1, 1):
        raise unsupported(f"{kind} with subsampled colour and without JPEG compression")
    if tags.get(_FILL_ORDER, (1,))[0] != 1 and (layout.bits != 1 or layout.samples != 1):
        raise unsupported(f"{kind} with reversed bits")
    if layout.compression in _CCITT and (layout.bits, layout.samples) != (1, 1):
        raise damaged("fax compression of more than one bit a pixel")


def _check_strips(layout: _Layout, *, tags: dict[int, tuple[int, ...]], length: int) -> None:
    """Raise `Rejection` if a strip or tile is missing or truncated."""
    is_tiled = _TILES[0] in tags and _STRIPS[0] not in tags
    offsets, counts = (tags.get(tag, ()) for tag in (_TILES if is_tiled else _STRIPS))
    if is_tiled:
        across, down = (tags.get(_TILE_WIDTH) or (0,))[0], (tags.get(_TILE_HEIGHT) or (0,))[0]
        if not 0 < across <= 1 << 16 or not 0 < down <= 1 << 16 or across * down > 1 << 26:
            raise damaged(f"its tiles are {across}x{down} pixels")
    else:
        across, down = layout.width, min((tags.get(_ROWS_PER_STRIP) or (layout.height,))[0], layout.height)
        if down <= 0:
            raise damaged("its strips have no rows")
    planes = layout.samples if layout.planar else 1
    wanted = -(-layout.width // across) * -(-layout.height // down) * planes
    if len(offsets) < wanted:
        raise damaged(f"it has {len(offsets)} of {wanted} strips or tiles")
    row_bytes = (across * layout.bits * (layout.samples // planes) + 7) // 8
    for number, offset in enumerate(offsets[:wanted]):
        rows = down if is_tiled else min(down, layout.height - down * (number % (wanted // planes)))
        stated = counts[number] if number < len(counts) else 1
        needed = row_bytes * rows if layout.compression == _RAW else stated
        if not 0 < offset <= offset + needed <= length or stated <= 0:
            raise damaged(f"the pixels from byte {offset} on are not in the file")
