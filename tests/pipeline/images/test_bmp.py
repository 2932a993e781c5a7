"""Every kind of BMP against levels of our own: its pixels are right, or it is rejected by name."""

from __future__ import annotations

import itertools
import struct

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.images import Rejection, read_image

HEIGHT, WIDTH = 7, 13
RGB_565, RGB_555, RGB_888 = (0xF800, 0x7E0, 0x1F), (0x7C00, 0x3E0, 0x1F), (0xFF0000, 0xFF00, 0xFF)


def bmp(payload: bytes, *, bits: int, header: int = 40, compression: int = 0, palette: bytes = b"", down: bool = False) -> bytes:
    if header == 12:
        fields = struct.pack("<IHHHH", header, WIDTH, HEIGHT, 1, bits)
    else:
        height = -HEIGHT if down else HEIGHT
        fields = struct.pack("<IiiHHIIiiII", header, WIDTH, height, 1, bits, compression, len(payload), 2835, 2835, 0, 0)[:header]
        fields += bytes(header - len(fields))
    start = 14 + len(fields) + len(palette)
    return struct.pack("<2sIHHI", b"BM", start + len(payload), 0, 0, start) + fields + palette + payload


def rows_of(numbers: NDArray[np.int64], *, bits: int, down: bool) -> bytes:
    """Rows of numbers of so many bits, each filled up to four bytes."""
    lines = []
    for row in numbers if down else numbers[::-1]:
        if bits >= 8:
            line = b"".join(int(number).to_bytes(bits // 8, "little") for number in row)
        else:
            line = np.packbits((row[:, None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)).tobytes()
        lines.append(line + bytes(-len(line) % 4))
    return b"".join(lines)


def run_lengths(numbers: NDArray[np.int64], *, bits: int) -> bytes:
    """Every other row as runs, every other one as it is."""
    lines = []
    for number, row in enumerate(numbers[::-1]):
        if number % 2:
            lines += [bytes((len(list(run)), value * (0x11 if bits == 4 else 1))) for value, run in itertools.groupby(row.tolist())]
        else:
            line = bytes(row.tolist()) if bits == 8 else bytes.fromhex("".join(f"{value:x}" for value in row) + "0" * (len(row) % 2))
            lines.append(bytes((0, len(row))) + line + bytes(len(line) % 2))
        lines.append(b"\0\0")
    return b"".join(lines) + b"\0\1"


def ends(data: bytes) -> NDArray[np.uint8] | str:
    try:
        return read_image(data).pixels
    except Rejection as rejection:
        return rejection.reason


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("header", [12, 16, 40, 64, 108, 124])
def test_palettes(header: int, bits: int, down: bool) -> None:
    rng = np.random.default_rng(bits)
    colours, numbers = rng.integers(0, 256, (1 << bits, 3)), rng.integers(0, 1 << bits, (HEIGHT, WIDTH))
    down = down and header > 16
    palette = b"".join(bytes(colour[::-1].tolist()) + bytes(header > 12) for colour in colours)
    found = ends(bmp(rows_of(numbers, bits=bits, down=down), bits=bits, header=header, palette=palette, down=down))
    if bits == 2 or header == 16:
        assert isinstance(found, str)
        assert found == "unsupported"
    else:
        np.testing.assert_array_equal(found, colours[numbers])


@pytest.mark.parametrize("bits", [4, 8])
def test_run_lengths(bits: int) -> None:
    """Pillow 12 garbles those of 4 bits."""
    rng = np.random.default_rng(bits)
    colours, numbers = rng.integers(0, 256, (1 << bits, 3)), rng.integers(0, 1 << bits, (HEIGHT, WIDTH))
    palette = b"".join(bytes(colour[::-1].tolist()) + b"\0" for colour in colours)
    found = ends(bmp(run_lengths(numbers, bits=bits), bits=bits, compression=2 if bits == 4 else 1, palette=palette))
    if bits == 4:
        assert isinstance(found, str)
        assert found == "unsupported"
    else:
        np.testing.assert_array_equal(found, colours[numbers])


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize(
    ("bits", "masks"),
    [
        (16, None), (24, None), (32, None),
        (16, RGB_565), (16, RGB_555), (16, (0xF00, 0xF0, 0xF)), (16, (0xE000, 0x1F00, 0xFF)),
        (32, RGB_888), (32, (0xFF000000, 0xFF0000, 0xFF00)), (32, (0x3FF00000, 0xFFC00, 0x3FF)), (32, (0xFF, 0xFF00, 0xFF0000)),
    ],
)  # fmt: skip
def test_masks(bits: int, masks: tuple[int, int, int] | None, down: bool) -> None:
    """Each colour in the bits of its mask, without one as Windows has it."""
    chosen = masks or (RGB_555 if bits == 16 else RGB_888)
    widths, shifts = [mask.bit_count() for mask in chosen], [(mask & -mask).bit_length() - 1 for mask in chosen]
    levels = np.random.default_rng(bits).integers(0, [1 << width for width in widths], (HEIGHT, WIDTH, 3))
    numbers = (levels << np.array(shifts)).sum(-1)
    palette = struct.pack("<III", *masks) if masks else b""
    found = ends(bmp(rows_of(numbers, bits=bits, down=down), bits=bits, compression=3 if masks else 0, palette=palette, down=down))
    if isinstance(found, str):
        assert found == "unsupported"
        assert masks not in (None, RGB_565, RGB_555, RGB_888)
    else:
        expected = levels / (2.0 ** np.array(widths) - 1) * 255
        assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("compression", [4, 5])
def test_files_within_a_bmp_are_unsupported(compression: int) -> None:
    assert ends(bmp(b"\xff\xd8" * 20, bits=24, compression=compression)) == "unsupported"
