"""Every kind of image against an independent reference: its pixels are right, or it is rejected by name; damage is never kept."""

from __future__ import annotations

import io
import itertools
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.images import REASONS, Rejection, load_image, read_image
from pipeline.images.headers import careful_size, quick_size
from tests.pipeline.images.image_files import PNG_SAMPLES, Levels, every_mode, packed, png, tiff

HEIGHT, WIDTH = 9, 13
MAX_PIXELS = 1 << 20
SOAK_SECONDS = 600
MODES = every_mode()


def ends(data: bytes, **options: Any) -> np.ndarray | str:
    """Pixels, or the reason of a rejection."""
    try:
        return read_image(data, **options).pixels
    except Rejection as rejection:
        reason, words = rejection.reason, str(rejection)
    assert reason in REASONS
    assert "\n" not in words
    return reason


def on_white(rgb: np.ndarray, alpha: np.ndarray | float = 1.0) -> np.ndarray:
    """Both from 0 to 1 → levels."""
    return 255 * (rgb * alpha + 1 - alpha)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32])
@pytest.mark.parametrize("photometric", [0, 1, 2, 3, 5, 6, 8])
def test_every_tiff(bits: int, photometric: int) -> None:
    """Over byte orders, planes, extra samples and compression."""
    random_levels = np.random.default_rng(bits)
    seen: Counter[str] = Counter()
    for planes, order, deflate, extra in itertools.product((1, 2), "<>", (False, True), ((), (0,), (1,), (2,))):
        samples = {2: 3, 5: 4, 6: 3, 8: 3}.get(photometric, 1) + len(extra)
        levels = random_levels.integers(0, 1 << bits, (HEIGHT, WIDTH, samples))
        if extra == (1,):
            levels[..., :-1] = np.minimum(levels[..., :-1], levels[..., -1:])  # colours that alpha is part of
        palette = random_levels.integers(0, 256, (1 << min(bits, 8), 3)) * 257
        pixels = ends(
            tiff_of(levels, bits=bits, photometric=photometric, planes=planes, order=order, deflate=deflate, extra=extra, palette=palette)
        )
        seen["kept" if isinstance(pixels, np.ndarray) else pixels] += 1
        if isinstance(pixels, str):
            assert pixels == "unsupported"
        elif photometric != 8:
            wanted = tiff_colours(levels, bits=bits, photometric=photometric, extra=extra, palette=palette)
            assert np.abs(pixels - wanted).max() < 3, (planes, order, deflate, extra)
    assert ("kept" in seen) == ((photometric, bits) in KEPT_TIFFS)


@pytest.mark.parametrize("compression", ["group3", "group4"])
def test_a_fax_that_libtiff_complains_of_is_damaged(compression: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Pillow shows it as far as it can be read, and libtiff writes to standard error why it ends there."""
    image = Image.fromarray(np.tri(120, 160, dtype=bool)[:, ::-1] ^ (np.arange(120) % 7 < 3)[:, None])
    buffer = io.BytesIO()
    image.save(buffer, "TIFF", compression=compression)
    tags = Image.open(buffer).tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    complaints = 0
    for number in range(tags[279][0]):
        data = bytearray(buffer.getvalue())
        data[tags[273][0] + number] ^= 1 << number % 8
        capfd.readouterr()
        with suppress(OSError):
            Image.open(io.BytesIO(bytes(data))).load()
        if "Bad code word" in capfd.readouterr().err:
            complaints += 1
            assert ends(bytes(data)) == "damaged"
            assert capfd.readouterr().err == ""
    assert complaints > 3


KEPT_TIFFS = {*itertools.product((0, 1, 3), (1, 2, 4, 8)), (1, 16), *itertools.product((2, 5), (8, 16)), (6, 8), (8, 8)}


def tiff_of(
    levels: Levels, *, bits: int, photometric: int, planes: int, order: str, deflate: bool, extra: tuple[int, ...], palette: Levels
) -> bytes:
    samples, rows = levels.shape[2], 4
    layers = [levels.reshape(HEIGHT, -1)] if planes == 1 else [levels[..., number] for number in range(samples)]
    parts = [
        packed(layer[top : top + rows], bits=bits, order=order) if bits != 24 else bytes(rows * layer.shape[1] * 3)
        for layer in layers
        for top in range(0, HEIGHT, rows)
    ]
    tags = {
        256: ("I", [WIDTH]),
        257: ("I", [HEIGHT]),
        258: ("H", [bits] * samples),
        259: ("H", [8 if deflate else 1]),
        262: ("H", [photometric]),
        277: ("H", [samples]),
        278: ("I", [rows]),
        284: ("H", [planes]),
        **({338: ("H", list(extra))} if extra else {}),
        **({320: ("H", palette.T.ravel().tolist())} if photometric == 3 else {}),
        **({530: ("H", [1, 1])} if photometric == 6 else {}),
    }
    return tiff([zlib.compress(part) for part in parts] if deflate else parts, order=order, tags=tags)


def tiff_colours(levels: Levels, *, bits: int, photometric: int, extra: tuple[int, ...], palette: Levels) -> np.ndarray:
    share = levels / ((1 << bits) - 1)
    if photometric in (0, 1):
        rgb = np.repeat(share[..., :1] if photometric else 1 - share[..., :1], 3, axis=-1)
    elif photometric == 3:
        rgb = palette[levels[..., 0]] / 65535
    elif photometric == 5:
        rgb = (1 - share[..., :3]) * (1 - share[..., 3:4])
    elif photometric == 6:
        y, blue, red = (255 * share[..., number] - (128 if number else 0) for number in range(3))
        rgb = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], axis=-1).clip(0, 255) / 255
    else:
        rgb = share[..., :3]
    alpha = share[..., -1:]
    return on_white(rgb, alpha) if extra == (2,) else 255 * (rgb + 1 - alpha) if extra == (1,) else on_white(rgb)


@pytest.mark.parametrize("tag", [(339, 2), (339, 3), (258, 12), (259, 34712), (262, 32803)])
def test_what_a_tiff_does_not_have_a_decoder_for_is_unsupported(tag: tuple[int, int]) -> None:
    tags = {256: 4, 257: 4, 258: 16, 259: 1, 262: 1, 277: 1, 278: 4} | dict([tag])
    assert ends(tiff([bytes(64)], order="<", tags={key: ("H", [value]) for key, value in tags.items()})) == "unsupported"


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("colour", PNG_SAMPLES)
def test_every_png(colour: int, transparent: bool, interlace: bool) -> None:
    random_levels = np.random.default_rng(colour)
    for bits in {0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8)}.get(colour, (8, 16)):
        for size in ((HEIGHT, WIDTH), (1, 1), (3, 2)):
            levels = random_levels.integers(0, 1 << bits, (*size, PNG_SAMPLES[colour]))
            palette, palette_alpha = (
                random_levels.integers(0, 256, (1 << min(bits, 8), 3)),
                random_levels.integers(0, 256, 1 << min(bits, 8)),
            )
            extra, alpha, hidden = [], np.ones((*size, 1)), levels[size[0] // 2, size[1] // 2]
            if colour == 3:
                extra.append((b"PLTE", palette.astype(np.uint8).tobytes()))
            if transparent and colour in (0, 2):
                levels[0, 0] = levels[0, 0] if size == (1, 1) else hidden ^ 1  # differs by one level
                extra.append((b"tRNS", struct.pack(f">{len(hidden)}H", *hidden.tolist())))
                alpha = 1.0 - (levels == hidden).all(axis=-1, keepdims=True)
            if transparent and colour == 3:
                extra.append((b"tRNS", palette_alpha.astype(np.uint8).tobytes()))
                alpha = palette_alpha[levels[..., 0]][..., None] / 255
            share = levels / ((1 << bits) - 1)
            alpha = share[..., -1:] if colour in (4, 6) else alpha
            rgb = palette[levels[..., 0]] / 255 if colour == 3 else share[..., :3] if colour in (2, 6) else np.repeat(share[..., :1], 3, -1)
            pixels = ends(png(levels, bits=bits, colour=colour, interlace=interlace, extra=tuple(extra)))
            assert isinstance(pixels, np.ndarray)
            assert np.abs(pixels - on_white(rgb, alpha)).max() < 2.1, (bits, size)


@pytest.mark.parametrize("magic", [b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"])
def test_every_portable_map(magic: bytes) -> None:
    for greatest in (1,) if magic in (b"P1", b"P4") else (1, 3, 15, 100, 255, 256, 1000, 4095, 65535):
        levels = np.random.default_rng(greatest).integers(0, greatest + 1, (HEIGHT, WIDTH, 3 if magic in (b"P3", b"P6") else 1))
        head = b"%s %d %d " % (magic, WIDTH, HEIGHT) + (b"" if magic in (b"P1", b"P4") else b"%d\n" % greatest)
        if magic in (b"P1", b"P2", b"P3"):
            body = b" ".join(b"%d" % level for level in levels.ravel()) + b"\n"
        else:
            body = packed(levels.reshape(HEIGHT, -1), bits=1 if magic == b"P4" else 8 if greatest < 256 else 16)
        wanted = 255 * levels / greatest
        assert np.abs(ends(head + body) - (255 - wanted if magic in (b"P1", b"P4") else wanted)).max() < 1.1
        assert isinstance(ends((head + body)[: len(head) + len(body) // 2]), str)


@pytest.mark.parametrize("format", sorted({name.split()[0] for name in MODES}))
def test_cut_anywhere_nothing_is_blank(format: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Rejected, or every pixel of the whole."""
    for name, data in MODES.items():
        whole = ends(data)
        if name.split()[0] != format or isinstance(whole, str):
            continue
        for cut in {len(data) - 1, len(data) - 5, len(data) - 13, *(int(len(data) * share) for share in (0.3, 0.7, 0.95))}:
            found = ends(data[:cut])
            assert isinstance(found, str) or np.array_equal(found, whole), (name, cut)
    assert capfd.readouterr().err == ""


def test_every_flipped_bit_in_a_png_that_pillow_refuses() -> None:
    rough = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 4, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    rough.quantize(16).save(buffer, "PNG", transparency=3)
    data = buffer.getvalue()
    for place, bit in itertools.product(range(8, len(data)), range(8)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << bit
        if _pillow_refuses(bytes(flipped)):
            assert ends(bytes(flipped)) in ("damaged", "unsupported", "too-large"), (place, bit)


def _pillow_refuses(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).verify()
        Image.open(io.BytesIO(data)).load()
    except Exception:
        return True
    return False


def test_a_png_whose_stream_ends_early_is_damaged() -> None:
    """Its checksums are right, and Pillow leaves the missing rows black."""
    whole = png(np.full((HEIGHT, WIDTH, 3), 200), bits=8, colour=2)
    part = png(np.full((HEIGHT - 3, WIDTH, 3), 200), bits=8, colour=2)
    head, tail = whole.index(b"IDAT") - 4, part.index(b"IDAT") - 4
    assert ends(whole[:head] + part[tail:]) == "damaged"


def test_a_gif_that_stops_early_is_damaged() -> None:
    bits = "".join(format(code, "09b")[::-1] for code in (256, 1, 2, 3, 257))
    codes = bytes(int(bits[place : place + 8][::-1], 2) for place in range(0, 40, 8)) + b"\1"
    head = b"GIF89a" + struct.pack("<HHBBB", 20, 20, 0xF7, 0, 0) + np.random.default_rng(0).bytes(768)
    for control in (b"", b"\x21\xf9\x04\x01\0\0\x05\0"):
        frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 20, 20, 0) + b"\x08" + bytes([len(codes)]) + codes + b"\0;"
        assert ends(head + control + frame) == "damaged"


def jpeg(**options: Any) -> bytes:
    buffer = io.BytesIO()
    smooth = np.random.default_rng(3).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    Image.fromarray(smooth).resize((64, 48), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
def test_junk_between_segments_is_kept_and_in_a_scan_is_damage(progressive: bool) -> None:
    data = jpeg(progressive=progressive)
    wanted = ends(data)
    for segment in (b"\xff\xdb", b"\xff\xc2" if progressive else b"\xff\xc0", b"\xff\xc4"):
        place = data.index(segment)
        picture = read_image(data[:place] + b"\1\2\3\4\5" + data[place:])
        assert np.array_equal(picture.pixels, wanted)
        assert not picture.clean
    end = len(data) - 2
    assert ends(data[:end] + b"\1\2\3\4\5" * 9 + data[end:]) == "damaged"
    place = data.index(b"\xff\xdb")
    both = data[:place] + b"\1\2\3" + data[place:end] + b"\1\2\3\4\5" * 9 + data[end:]
    assert ends(both) == "damaged"  # the first warning does not hide the second


@pytest.mark.parametrize(
    ("frame", "bits", "reason"),
    [(0xC3, 12, "unsupported"), (0xC5, 8, "unsupported"), (0xCB, 8, "unsupported"), (0xC1, 12, "unsupported"), (0xC0, 12, "unsupported")],
)
def test_jpeg_frames_without_a_decoder(frame: int, bits: int, reason: str) -> None:
    data = bytearray(jpeg())
    place = data.index(b"\xff\xc0")
    data[place + 1], data[place + 4] = frame, bits
    assert ends(bytes(data)) == reason
    assert ends_loading(bytes(data)) == reason


def test_a_jpeg_says_its_size_once() -> None:
    """A second frame, or one behind the scan, never makes a buffer of another size."""
    data = jpeg()
    place, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    larger = data[place : place + 5] + struct.pack(">HH", 4096, 4096) + data[place + 9 : place + 19]
    for where in (place, scan, len(data) - 2):
        assert isinstance(ends(data[:where] + larger + data[where:]), str) or where == len(data) - 2
        ends_loading(data[:where] + larger + data[where:])


def ends_loading(data: bytes) -> str:
    try:
        load_image(data, resize=(4, 5), crop=(4, 5))
    except Rejection as rejection:
        return rejection.reason
    return ""


@pytest.mark.parametrize(("primaries", "transfer"), [(1, 8), (12, 13), (9, 4), (9, 1), (1, 5)])
def test_code_points_of_colours(primaries: int, transfer: int) -> None:
    """What sRGB shows is encoded in other primaries by hand, and comes back."""
    corners = {
        1: (0.64, 0.33, 0.30, 0.60, 0.15, 0.06),
        9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
        12: (0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    }
    levels = np.random.default_rng(1).integers(40, 256, (16, 16, 3))
    light = np.where(levels / 255 <= 0.04045, levels / 255 / 12.92, ((levels / 255 + 0.055) / 1.055) ** 2.4)
    other = light @ (np.linalg.inv(_to_xyz(corners[primaries])) @ _to_xyz(corners[1])).T
    stored = _encode(other.clip(0, 1), transfer)
    chunks = ((b"cICP", bytes([primaries, transfer, 0, 1])),)
    sixteen = png((stored * 255).round().astype(np.int64), bits=8, colour=2, extra=chunks)
    picture = read_image(sixteen)
    assert "colours-to-srgb" in picture.changes
    assert np.abs(picture.pixels - levels.astype(int)).mean() < (3 if transfer == 8 else 2)


def _to_xyz(corners: tuple[float, ...]) -> np.ndarray:
    def xyz(x: float, y: float) -> list[float]:
        return [x / y, 1, (1 - x - y) / y]

    columns = np.array([xyz(*corners[place : place + 2]) for place in (0, 2, 4)]).T
    return columns * np.linalg.solve(columns, xyz(0.3127, 0.3290))


def _encode(light: np.ndarray, transfer: int) -> np.ndarray:
    if transfer in (4, 5, 8):
        return light ** (1 / {4: 2.2, 5: 2.8, 8: 1}[transfer])
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("transfer", [16, 18])
def test_high_dynamic_range_is_unsupported(transfer: int) -> None:
    data = png(np.full((4, 4, 3), 90), bits=8, colour=2, extra=((b"cICP", bytes([9, transfer, 0, 1])),))
    assert ends(data) == "unsupported"
    assert quick_size(_peek(data), length=len(data)) is None
    with pytest.raises(Rejection, match="unsupported"):
        careful_size(_peek(data), length=len(data))


def test_gamma_of_a_png_counts_only_without_srgb() -> None:
    levels = np.arange(256).reshape(16, 16, 1)
    linear, usual = (b"gAMA", struct.pack(">I", 100_000)), (b"gAMA", struct.pack(">I", 45_455))
    bright = ends(png(levels, bits=8, colour=0, extra=(linear,)))
    light = levels / 255
    wanted = 255 * np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    assert np.abs(bright - wanted).max() <= 1
    for chunks in ((usual,), (linear, (b"sRGB", b"\0"))):
        assert np.array_equal(read_image(png(levels, bits=8, colour=0, extra=chunks)).pixels, np.repeat(levels, 3, axis=-1))


def test_large_metadata_of_a_png_is_no_reason() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (4, 4, 3))
    text = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20), 1))
    profile = (b"iCCP", b"p\0\0" + zlib.compress(bytes(80 << 20), 1))
    assert np.array_equal(read_image(png(levels, bits=8, colour=2, extra=(text,))).pixels, levels)
    assert "icc-ignored" in read_image(png(levels, bits=8, colour=2, extra=(profile,))).changes


@pytest.mark.parametrize("data", [b"\xff\x0a" + bytes(40), b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(40)])
def test_jpeg_xl_without_its_plugin_says_what_to_install(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.images.formats.jxl.jxl_plugin", lambda: False)
    with pytest.raises(Rejection, match=r"unsupported: .*pip install \"\.\[jxl\]\""):
        read_image(data)


def _peek(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


def mutated(chance: random.Random) -> bytes:
    """One of all modes with bits flipped, bytes overwritten, cut out and put in, often in its header."""
    data = bytearray(MODES[chance.choice(sorted(MODES))])
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) if chance.random() < 0.5 else min(len(data), 200))
        what = chance.random()
        if what < 0.5:
            data[place] ^= 1 << chance.randrange(8)
        elif what < 0.8:
            value = chance.choice((b"\0", b"\xff", b"\1", b"\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
            data[place : place + len(value)] = value
        elif what < 0.9 and len(data) > 60:
            del data[place : place + chance.randint(1, 20)]
        else:
            data[place:place] = chance.randbytes(chance.randint(1, 20))
    return bytes(data)


def check(data: bytes) -> None:
    """Pixels or a named rejection; headers agree; training reads what preparing keeps."""
    pixels = ends(data, max_decode_pixels=MAX_PIXELS)
    try:
        size = quick_size(_peek(data), length=len(data)) or careful_size(_peek(data), length=len(data))
    except Rejection:
        size = (0, 0)
    if isinstance(pixels, np.ndarray):
        assert pixels.shape == (*size, 3)
        smaller = (-(-size[0] // 2), -(-size[1] // 2))
        assert load_image(data, resize=smaller, crop=smaller).shape == (*smaller, 3)


def test_five_thousand_mutations(capfd: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(0)
    for _ in range(5000):
        check(mutated(chance))
    assert capfd.readouterr().err == ""


@pytest.mark.soak
def test_mutations_for_ten_minutes() -> None:
    chance, end = random.Random(), time.monotonic() + SOAK_SECONDS
    while time.monotonic() < end:
        data = mutated(chance)
        try:
            check(data)
        except Exception as error:
            raise AssertionError(f"{error!r}: {data.hex()}") from error
