"""Every trap of real image files, made on the spot and read back against what a viewer shows."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from pipeline.images import REASONS, Rejection, encode_image, load_image, read_image

HEIGHT, WIDTH = 48, 64


def scene(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A smooth image whose four corners differ, so that no turn or flip maps it on itself."""
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    return (np.stack([x, y, (x + y) / 2], axis=-1) * 200 + 20).astype(np.uint8)


def save(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def sixteen_bit_png(levels: np.ndarray) -> bytes:
    """(H, W) or (H, W, 3) uint16 → PNG, written by hand because Pillow cannot."""
    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2 if levels.ndim == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def far(a: np.ndarray, b: np.ndarray) -> float:
    assert a.shape == b.shape
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


def reason_of(data: bytes, **options: Any) -> str:
    with pytest.raises(Rejection) as caught:
        read_image(data, **options)
    assert caught.value.reason in REASONS
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_a_clean_jpeg_keeps_its_bytes() -> None:
    picture = read_image(save(Image.fromarray(scene()), "JPEG", quality=95))
    assert picture.clean
    assert picture.changes == ()
    assert (picture.format, picture.original_height, picture.original_width) == ("JPEG", HEIGHT, WIDTH)
    assert far(picture.pixels, scene()) < 2


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_ends_upright(format: str, orientation: int) -> None:
    stored = Image.fromarray(scene())
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(stored, format, exif=exif)
    picture = read_image(data)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert picture.pixels.shape == ((WIDTH, HEIGHT, 3) if orientation >= 5 else (HEIGHT, WIDTH, 3))
    assert far(picture.pixels, np.asarray(reference)) < 2
    assert (picture.original_height, picture.original_width) == (HEIGHT, WIDTH)
    assert picture.clean == (format == "JPEG" and orientation == 1)


def test_broken_exif_does_not_cost_the_image() -> None:
    data = save(Image.fromarray(scene()), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert read_image(data).pixels.shape == (HEIGHT, WIDTH, 3)


def test_a_wide_gamut_profile_is_converted_and_srgb_is_not() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read_image(save(Image.fromarray(scene()), "JPEG", icc_profile=srgb)).clean
    swapped = swapped_profile(srgb)
    plain = save(Image.fromarray(scene()), "JPEG", quality=95)
    tagged = read_image(save(Image.fromarray(scene()), "JPEG", quality=95, icc_profile=swapped))
    assert tagged.changes == ("icc-to-srgb",)
    assert not tagged.clean
    assert far(tagged.pixels[..., ::-1], read_image(plain).pixels) < 3


def swapped_profile(profile: bytes) -> bytes:
    """The same profile with the tags of its red and blue primaries exchanged."""
    return profile.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


def test_a_broken_profile_is_ignored() -> None:
    picture = read_image(save(Image.fromarray(scene()), "JPEG", icc_profile=b"not a profile" * 20))
    assert picture.changes == ("icc-ignored",)
    assert far(picture.pixels, scene()) < 3


def test_an_rgb_profile_on_a_gray_image_is_used() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    gray = Image.fromarray(scene()).convert("L")
    picture = read_image(save(gray, "JPEG", quality=95, icc_profile=srgb))
    assert far(picture.pixels, np.asarray(gray.convert("RGB"))) < 2


def test_cmyk_jpeg_has_the_colours_that_went_in() -> None:
    picture = read_image(save(Image.fromarray(scene()).convert("CMYK"), "JPEG", quality=95))
    assert picture.changes == ("cmyk",)
    assert not picture.clean
    assert far(picture.pixels, scene()) < 3


def test_alpha_is_matted_on_white() -> None:
    rgba = np.dstack([scene(), np.full((HEIGHT, WIDTH), 255, np.uint8)])
    rgba[: HEIGHT // 2, :, 3] = 0
    rgba[HEIGHT // 2 :, : WIDTH // 2, 3] = 128
    for format in ("PNG", "WEBP"):
        picture = read_image(save(Image.fromarray(rgba), format, **({"lossless": True} if format == "WEBP" else {})))
        assert "alpha-on-white" in picture.changes
        assert (picture.pixels[: HEIGHT // 2] == 255).all()
        blend = rgba[HEIGHT // 2 :, : WIDTH // 2, :3] * (128 / 255) + 255 * (127 / 255)
        assert far(picture.pixels[HEIGHT // 2 :, : WIDTH // 2], blend.round()) < 1
        assert far(picture.pixels[HEIGHT // 2 :, WIDTH // 2 :], scene()[HEIGHT // 2 :, WIDTH // 2 :]) < 1


def test_the_colour_behind_what_is_transparent_can_be_set() -> None:
    rgba = np.dstack([scene(), np.zeros((HEIGHT, WIDTH), np.uint8)])
    picture = read_image(save(Image.fromarray(rgba)), background=(10, 200, 30))
    assert (picture.pixels == (10, 200, 30)).all()
    assert "alpha-on-colour" in picture.changes


def test_palettes_with_and_without_transparency() -> None:
    palette = Image.fromarray(scene()).quantize(16)
    assert far(read_image(save(palette)).pixels, np.asarray(palette.convert("RGB"))) == 0
    transparent = read_image(save(palette, transparency=3))
    hole = np.asarray(palette) == 3
    assert hole.any()
    assert (transparent.pixels[hole] == 255).all()
    assert (transparent.pixels[~hole] == np.asarray(palette.convert("RGB"))[~hole]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "I;16"])
def test_every_png_mode_becomes_rgb(mode: str) -> None:
    source = Image.fromarray(scene()).convert("L") if mode == "I;16" else Image.fromarray(scene())
    picture = read_image(save(source.convert(mode)))
    assert picture.pixels.shape == (HEIGHT, WIDTH, 3)
    assert picture.pixels.dtype == np.uint8


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
    gray = read_image(sixteen_bit_png(ramp))
    assert (gray.pixels[..., 0] == np.round(ramp / 257)).all()
    assert "16-bit" in gray.changes
    colour = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1)
    assert np.abs(read_image(sixteen_bit_png(colour)).pixels - colour / 257).max() <= 1
    tiff = save(Image.fromarray(ramp), "TIFF")
    assert (read_image(tiff).pixels[..., 0] == np.round(ramp / 257)).all()


@pytest.mark.parametrize("level", [-5.0, 0.5, 70_000.0])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_levels_of_no_known_range_are_refused_rather_than_turned_black_or_white(level: float, kind: type) -> None:
    if kind is np.int32 and level == 0.5:
        pytest.skip("0 is a level")
    assert reason_of(save(Image.fromarray(np.full((32, 32), level, kind)), "TIFF")) == "unsupported"


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_counts(format: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "lime", "blue")]
    picture = read_image(save(frames[0], format, save_all=True, append_images=frames[1:]))
    assert "first-frame" in picture.changes
    assert far(picture.pixels, np.full((HEIGHT, WIDTH, 3), (255, 0, 0))) < 3


@pytest.mark.parametrize("format", ["AVIF", "HEIF", "BMP", "TIFF", "GIF", "JPEG2000"])
def test_the_rarer_formats_are_read(format: str) -> None:
    if format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    picture = read_image(save(Image.fromarray(scene()), format))
    assert (picture.format, picture.clean) == (format, False)
    assert f"from-{format.lower()}" in picture.changes
    assert far(picture.pixels, scene()) < (6 if format == "GIF" else 3)


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
def test_images_of_phones_end_upright_and_on_white(format: str) -> None:
    if format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_image(save(Image.fromarray(scene()), format, exif=exif.tobytes()))
    assert far(turned.pixels, np.asarray(Image.fromarray(scene()).transpose(Image.Transpose.ROTATE_270))) < 3
    hidden = np.dstack([scene(), np.zeros((HEIGHT, WIDTH), np.uint8)])
    assert far(read_image(save(Image.fromarray(hidden), format)).pixels, np.full((HEIGHT, WIDTH, 3), 255)) < 2


def test_heif_without_its_plugin_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.images.opening._heif_plugin", lambda: False)
    with pytest.raises(Rejection, match=r"unsupported: reading HEIF needs pillow-heif: pip install \"\.\[heif\]\""):
        read_image(b"\0\0\0\x18ftypheic" + bytes(100))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF"])
def test_a_file_cut_anywhere_is_rejected(format: str) -> None:
    if format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    rough = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    data = save(Image.fromarray(rough), format)
    for share in (0.3, 0.6, 0.95):
        assert reason_of(data[: int(len(data) * share)]) == "damaged"
    progressive = save(Image.fromarray(rough), "JPEG", progressive=True)
    assert reason_of(progressive[:-20]) == "damaged"


def test_a_jpeg_with_damaged_entropy_data_is_rejected() -> None:
    rough = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    data = bytearray(save(Image.fromarray(rough), "JPEG", quality=90))
    middle = len(data) // 2
    data[middle : middle + 64] = b"\xff\xd9" * 32  # an early end of image
    assert reason_of(bytes(data)) == "damaged"


def test_what_is_no_image_is_named() -> None:
    assert reason_of(b"") == "empty"
    assert reason_of(b"<html>not found</html>") == "not-an-image"
    assert reason_of(np.random.default_rng(1).bytes(4096)) == "not-an-image"
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "not-an-image"
    assert reason_of(b"\xff\xd8\xff\xe0") == "damaged"
    assert reason_of(b"\x89PNG\r\n\x1a\n") == "damaged"


def test_the_pixel_limit_is_checked_before_decoding() -> None:
    claims = save(Image.fromarray(scene()))
    huge = claims[:16] + struct.pack(">II", 100_000, 100_000) + claims[24:29]
    huge += struct.pack(">I", zlib.crc32(huge[12:29])) + claims[33:]
    assert reason_of(huge) == "too-large"
    assert reason_of(claims, max_decode_pixels=HEIGHT * WIDTH - 1) == "too-large"
    read_image(claims, max_decode_pixels=HEIGHT * WIDTH)
    for lossless in (True, False):
        webp = save(Image.fromarray(scene()), "WEBP", lossless=lossless)
        assert reason_of(webp, max_decode_pixels=HEIGHT * WIDTH - 1) == "too-large"
        assert read_image(webp, max_decode_pixels=HEIGHT * WIDTH).pixels.shape == (HEIGHT, WIDTH, 3)


def test_a_few_bytes_that_claim_to_be_a_hundred_megapixels_are_not_decoded() -> None:
    side = 13_000  # 169 megapixels
    claim = bytearray(save(Image.new("RGB", (16, 16)), "WEBP", lossless=True))
    claim[21:25] = ((side - 1) | (side - 1) << 14).to_bytes(4, "little")
    assert reason_of(bytes(claim)) == "too-large"
    read_image(save(Image.new("RGB", (2000, 2000)), "WEBP", lossless=True))  # flat images of common sizes are fine


def test_pillows_own_limit_is_left_as_it_was() -> None:
    before = Image.MAX_IMAGE_PIXELS
    read_image(save(Image.fromarray(scene())))
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_encoding_round_trips(format: Any) -> None:
    picture = read_image(encode_image(scene(), format=format))
    assert far(picture.pixels, scene()) <= (1 if format == "jpg" else 0)
    assert picture.clean == (format == "jpg")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_loading_resizes_and_crops_the_centre(format: str) -> None:
    data = save(Image.fromarray(scene(600, 800)), format, quality=95)
    loaded = load_image(data, resize=(60, 80), crop=(48, 64))
    assert loaded.shape == (48, 64, 3)
    reference = Image.fromarray(read_image(data).pixels).resize((80, 60), Image.Resampling.LANCZOS)
    assert far(loaded, np.asarray(reference)[6:54, 8:72]) < 1
    flipped = load_image(data, resize=(60, 80), crop=(48, 64), flip=True)
    assert (flipped == loaded[:, ::-1]).all()


def test_loading_at_the_stored_size_changes_nothing() -> None:
    data = save(Image.fromarray(scene()), "JPEG", quality=95)
    assert (load_image(data, resize=(HEIGHT, WIDTH), crop=(HEIGHT, WIDTH)) == read_image(data).pixels).all()


@pytest.mark.parametrize("odd", ["turned", "profile", "gray", "cmyk", "cut"])
def test_loading_gives_what_reading_gives_of_odd_jpegs(odd: str) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    profile = swapped_profile(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    options: dict[str, Any] = {"turned": {"exif": turned}, "profile": {"icc_profile": profile}}.get(odd, {})
    mode = {"gray": "L", "cmyk": "CMYK"}.get(odd, "RGB")
    data = save(Image.fromarray(scene()).convert(mode), "JPEG", quality=95, **options)
    if odd == "cut":
        with pytest.raises(Rejection, match="damaged"):
            load_image(data[:-100], resize=(HEIGHT, WIDTH), crop=(HEIGHT, WIDTH))
        return
    expected = read_image(data).pixels
    assert (load_image(memoryview(data), resize=expected.shape[:2], crop=expected.shape[:2]) == expected).all()


def test_loading_applies_what_reading_applies() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = save(Image.fromarray(scene(600, 800)), "JPEG", quality=95, exif=exif)
    upright = Image.fromarray(read_image(data).pixels).resize((60, 80), Image.Resampling.LANCZOS)
    assert far(load_image(data, resize=(80, 60), crop=(80, 60)), np.asarray(upright)) < 1
    with pytest.raises(Rejection):
        load_image(data[:-500], resize=(80, 60), crop=(80, 60))


@pytest.mark.parametrize("max_pixels", [256**2, 1024**2])
@pytest.mark.parametrize("corpus", ["photos", "hires"])
def test_loading_is_within_38_db_of_a_full_decode_and_pillows_resizing(shared: Path, corpus: str, max_pixels: int) -> None:
    """Images of every size, at sides that no power of two divides, whatever the decoder skips."""
    files = sorted((shared / "corpora" / corpus).glob("*.[jJ]*G" if corpus == "photos" else "*.jpg"))
    for file in files[:: len(files) // 4]:
        data = file.read_bytes()
        full = read_image(data).pixels
        height, width = full.shape[:2]
        scale = min(1.0, (max_pixels / (height * width)) ** 0.5)
        size = (int(height * scale), int(width * scale))
        reference = np.asarray(Image.fromarray(full).resize((size[1], size[0]), Image.Resampling.LANCZOS))
        loaded = load_image(data, resize=size, crop=size)
        assert loaded.shape == reference.shape
        error = (loaded.astype(float) - reference) ** 2
        assert 10 * np.log10(255**2 / max(float(error.mean()), 1e-9)) > 38, file.name  # dB


@pytest.mark.parametrize("shape", [(401, 603), (399, 605), (163, 229)])
@pytest.mark.parametrize("ratio", [1.3, 1.7, 2.1, 2.9, 4.2, 9.0])
def test_every_shrink_leaves_the_image_where_it_is(shape: tuple[int, int], ratio: float) -> None:
    """A ramp shows any shift: a pixel that the decoder rounds up must not stretch the image."""
    height, width = shape
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    data = save(Image.fromarray((np.stack([x, y, 1 - x], axis=-1) * 255).astype(np.uint8)), "JPEG", quality=98)
    size = (int(height / ratio), int(width / ratio))
    reference = np.asarray(Image.fromarray(read_image(data).pixels).resize((size[1], size[0]), Image.Resampling.LANCZOS))
    difference = load_image(data, resize=size, crop=size).astype(float) - reference
    assert np.abs(difference.mean(axis=(0, 1))).max() < 0.25
    assert np.abs(difference).mean() < 0.75
