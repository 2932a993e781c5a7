"""Images and their settings in PNG, JPEG, WebP and AVIF."""

from __future__ import annotations

import json
import re
import resource
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from launch.sampling.files.a1111 import as_asked, from_a1111, parameters_of, to_a1111
from launch.sampling.files.exif import comment_of
from launch.sampling.files.formats import image_format
from launch.sampling.files.image_files import NoSettings, is_complete, read_settings, write_image
from launch.sampling.files.settings import Settings
from tests.launch.sampling.files.test_settings import FULL

SUFFIXES = ("png", "jpg", "webp", "avif")
PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LONG = "😀" * 20_000
TEXT = "a red fox\nNegative prompt: a dog\nSteps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 965400086, Size: 512x512, Model: sd, v1"


def picture(width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(0).integers(0, 256, (height, width, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8)
    return Image.fromarray(levels.squeeze(), mode=None if mode != "LA" else "LA")


def written(path: Path, given: Settings, *, metadata: bool = True) -> Path:
    write_image(path, picture(), given, form=image_format(path=path), metadata=metadata)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(NoSettings, match=message) as raised:
        read_settings(path)
    assert str(path) in str(raised.value)
    assert "give an image" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
@PROPERTY
@given(prompt=st.text(max_size=300), negative=st.none() | st.text(max_size=300), name=st.none() | st.text(max_size=30))
@example("", None, None)
@example("a red\nfox\r\n\t\0\x1b 😀 <&>\"' Steps: 3, x: y, z: 1", "Negative prompt: no", "a, b: c\nd")
@example(LONG, LONG, LONG)
@example("x" * 20_000, "&" * 20_000, None)
def test_settings_survive_every_format(tmp_path: Path, suffix: str, prompt: str, negative: str | None, name: str | None) -> None:
    asked = replace(FULL, prompt=prompt, negative=negative, model=name)
    path = written(tmp_path / f"a.{suffix}", asked)
    assert read_settings(path) == asked
    assert is_complete(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_metadata_is_what_other_programs_read(tmp_path: Path, suffix: str) -> None:
    with Image.open(written(tmp_path / f"a.{suffix}", replace(FULL, prompt="ein Bär"))) as image:
        text = image.info["parameters"] if suffix == "png" else comment_of(image.getexif().get_ifd(0x8769)[0x9286])
        packet = image.info["xmp"]
        packet = packet if isinstance(packet, bytes) else packet.encode()
        assert "prompt" not in image.info  # ComfyUI expects its own JSON there
    lines = text.split("\n")
    assert lines[:2] == ["ein Bär", "Negative prompt: a dog"]
    assert lines[2].startswith(
        f"Steps: 2, Sampler: TiM, CFG scale: 2.5, Seed: {2**64 - 1}, Size: 512x128, Model hash: ababababab, Model: photos"
    )
    assert b"<Iptc4xmpExt:DigitalSourceType>http://cv.iptc.org/newscodes/digitalsourcetype/composite" in packet  # FULL has a mask


def test_an_image_without_mask_is_generated_media(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        path = written(tmp_path / f"a.{suffix}", Settings(prompt="a", width=24, height=16))
        assert b"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia" in path.read_bytes()


def test_the_comment_is_undefined_bytes_in_utf_16_of_big_endian(tmp_path: Path) -> None:
    """As piexif writes it for A1111: piexif reads no other type."""
    content = written(tmp_path / "a.jpg", Settings(prompt="ä", width=24, height=16)).read_bytes()
    entry = content.index(struct.pack(">HH", 0x9286, 7))
    count, offset = struct.unpack(">II", content[entry + 4 : entry + 12])
    start = content.index(b"MM\0*") + offset
    assert content[start : start + 8] == b"UNICODE\0"
    assert content[start + 8 : start + count].decode("utf-16-be") == "ä\nSampler: TiM, Size: 24x16"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_without_metadata_nothing_is_written(tmp_path: Path, suffix: str) -> None:
    image = picture()
    image.info.update(parameters="a secret", comment=b"a secret", xmp=b"a secret", exif=b"Exif\0\0a secret")
    path = tmp_path / f"a.{suffix}"
    write_image(path, image, replace(FULL, prompt="a secret"), form=image_format(path=path), metadata=False)
    assert not re.search(rb"secret|tim:|iptc|Steps|UNICODE", path.read_bytes())
    assert image.info["comment"] == b"a secret"
    refused(path, "has no settings")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_lossless_formats_keep_every_level(tmp_path: Path, suffix: str, mode: str) -> None:
    image = picture(33, 17, mode)
    path = tmp_path / f"a.{suffix}"
    write_image(path, image, FULL, form=image_format(path=path, lossless=True))
    colours = "RGBA" if "A" in mode else "RGB"
    with Image.open(path) as found:
        assert np.array_equal(np.asarray(found.convert(colours)), np.asarray(image.convert(colours)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "F"])
def test_images_of_every_mode_can_be_written(tmp_path: Path, mode: str) -> None:
    for suffix in SUFFIXES:
        if suffix != "jpg" or mode not in ("LA", "RGBA"):
            write_image(tmp_path / f"a.{suffix}", Image.new(mode, (24, 16)), FULL, form=image_format(suffix))
            assert read_settings(tmp_path / f"a.{suffix}") == FULL


def test_quality_changes_the_file(tmp_path: Path) -> None:
    for suffix in ("jpg", "webp", "avif"):
        sizes = []
        for quality in (20, 95):
            path = tmp_path / f"{quality}.{suffix}"
            write_image(path, picture(64, 64), FULL, form=image_format(path=path, quality=quality))
            sizes.append(path.stat().st_size)
        assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "gif"}, "--format gif: expected png, jpeg, webp or avif"),
        ({"name": "jpeg", "lossless": True}, "--lossless: jpeg"),
        ({"name": "avif", "lossless": True}, "--lossless: avif"),
        ({"name": "png", "quality": 90}, "png loses nothing"),
        ({"name": "webp", "quality": 90, "lossless": True}, "--lossless loses nothing"),
        ({"name": "webp", "quality": 0}, "--quality 0"),
        ({"path": Path("a.bmp")}, r"a\.bmp: expected"),
        ({"name": "png", "path": Path("a.jpg")}, r"a\.jpg ends with \.jpg"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_format(**options)


def test_a_format_that_pillow_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.features.check", lambda name: name != "avif")
    assert image_format("webp").name == "webp"
    with pytest.raises(ValueError, match="--format avif: this build of Pillow cannot write it"):
        image_format("avif")


def test_formats_by_name_and_suffix() -> None:
    assert [image_format(name).suffix for name in ("PNG", "jpg", "jpeg", ".webp", "avif")] == [".png", ".jpg", ".jpg", ".webp", ".avif"]
    assert image_format(path=Path("a.JPEG")).name == "jpeg"
    assert image_format().lossless


def test_what_a_format_cannot_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--format webp: webp stores at most 16,383 pixels a side, not 16384x1; use --format png"):
        write_image(tmp_path / "a.webp", Image.new("RGB", (16_384, 1)), FULL, form=image_format("webp"))
    with pytest.raises(ValueError, match=r"a\.jpg: jpeg has no transparency"):
        write_image(tmp_path / "a.jpg", Image.new("RGBA", (4, 4)), FULL, form=image_format("jpeg"))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    path = tmp_path / "new" / "a.png"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=re.escape(str(path))):
            written(path, FULL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(path.parent.iterdir())


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OSError, match="out"):
        written(tmp_path / "out" / "a.png", FULL)


def test_a_file_of_a1111_gives_what_it_has(tmp_path: Path) -> None:
    chunks = PngInfo()
    chunks.add_text("parameters", TEXT)
    picture().save(tmp_path / "a.png", pnginfo=chunks)
    expected = Settings(prompt="a red fox", negative="a dog", width=24, height=16, steps=20, guidance=7.5, seed=965400086, model="sd")
    assert read_settings(tmp_path / "a.png") == expected

    exif = Image.Exif()
    for number, comment in enumerate(
        [
            b"UNICODE\0" + TEXT.encode("utf-16-be"),
            b"UNICODE\0" + TEXT.encode("utf-16-le"),
            b"UNICODE\0" + TEXT.encode(),
            b"ASCII\0\0\0" + TEXT.encode() + b"\0",
            bytes(8) + TEXT.encode(),
        ]
    ):
        exif.get_ifd(0x8769)[0x9286] = comment
        path = tmp_path / f"{number}.jpg"
        picture().save(path, exif=exif.tobytes())
        assert read_settings(path) == expected, comment[:20]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Steps: 20, CFG scale: 7, Seed: 1", Settings(prompt="", width=1, height=1, steps=20, guidance=7, seed=1)),
        ("a\n\nb\nSteps: many, CFG scale: nan, Seed: -1", Settings(prompt="a\n\nb", width=1, height=1)),
        ("Negative prompt: x\ny\nSteps: 3, Sampler: a, Seed: 1", Settings(prompt="", negative="x\ny", width=1, height=1, steps=3, seed=1)),
        ('p\nSteps: 3, Model: "a, b: c", Seed: 1', Settings(prompt="p", width=1, height=1, steps=3, seed=1, model="a, b: c")),
        ("a red fox", None),
        ("", None),
        ("Canon: x, y: z, Seed: 1", None),
        ("a" * 16_000, None),
        ("a" + " " * 16_000 + "b", None),
        ("Steps: 1, Seed: 1, a: b, " * 1000, None),
    ],
)
def test_the_text_of_a1111(text: str, found: Settings | None) -> None:
    assert from_a1111(text, width=1, height=1) == found


@pytest.mark.parametrize(
    ("more", "size", "strength", "left_out"),
    [
        ("Size: 512x768", (512, 768), None, ["Sampler: Euler a"]),
        ("Size: 512x768, Denoising strength: 0.6, Version: v1, Model hash: ab", (512, 768), 0.6, ["Sampler: Euler a"]),
        (
            "Size: 512x768, Denoising strength: 0.6, Hires upscale: 2",
            (1, 1),
            None,
            ["Sampler: Euler a", "Size: 512x768", "Denoising strength: 0.6", "Hires upscale: 2"],
        ),
        ("Size: 0x9, Seed: -1", (1, 1), None, ["Sampler: Euler a", "Size: 0x9", "Seed: -1"]),
    ],
)
def test_what_a1111_was_asked_for(more: str, size: tuple[int, int], strength: float | None, left_out: list[str]) -> None:
    text = f"p\nSteps: 3, Sampler: Euler a, {more}"
    drawn = from_a1111(text, width=1, height=1)
    assert drawn is not None
    asked, rest = as_asked(drawn, parameters_of(text))
    assert ((asked.width, asked.height), asked.strength, rest) == (size, strength, left_out)


def test_values_of_a1111_survive_its_own_parser() -> None:
    """Its expression and its way to unquote, from modules/infotext_utils.py."""
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    pairs = dict(pattern.findall(to_a1111(replace(FULL, model='a, "b": c')).split("\n")[-1]))
    assert json.loads(pairs["Model"]) == 'a, "b": c'
    assert pairs["Denoising strength"] == "0.7"
    assert json.loads(pairs["Times"]) == "1,0.6,0"
    assert json.loads(pairs["Lora hashes"]) == "style: cdcdcdcdcd"


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.png", "no such file")
    for name, content in {"text.png": b"a text", "empty.png": b"", "half.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "not an image that can be read")
    refused(tmp_path, "not an image that can be read")
    picture().save(tmp_path / "photo.jpg")
    refused(tmp_path / "photo.jpg", "has no settings")
    chunks = PngInfo()
    chunks.add_text("tim", '{"prompt": "a", "width": 1}')
    picture().save(tmp_path / "ours.png", pnginfo=chunks)
    refused(tmp_path / "ours.png", "key 'height' of the settings: field required")


@pytest.mark.parametrize("suffix", SUFFIXES)
@PROPERTY
@given(st.data())
def test_flipped_bytes_give_settings_or_one_sentence(tmp_path: Path, suffix: str, data: st.DataObject) -> None:
    path = tmp_path / f"whole.{suffix}"
    if not path.exists():
        written(path, FULL)
    content = bytearray(path.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    damaged = tmp_path / f"damaged.{suffix}"
    damaged.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        read_settings(damaged)
    except NoSettings as error:
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("change", ["flip", "cut"])
def test_settings_of_which_a_part_is_lost_are_not_replaced_by_a_cut_prompt(tmp_path: Path, change: str) -> None:
    path = written(tmp_path / "a.jpg", replace(FULL, prompt="x" * 100_000))
    content = bytearray(path.read_bytes())
    place = content.index(b"http://ns.adobe.com/xmp/extension/")
    if change == "flip":
        content[place + 30_000] ^= 1
    else:
        content[place - 4 : place + 65_000 + len(b"http://ns.adobe.com/xmp/extension/") + 1 + 40] = b""
    path.write_bytes(content)
    refused(path, "has lost a part of its settings")


def test_entities_in_a_foreign_packet_are_not_expanded(tmp_path: Path) -> None:
    packet = b'<!DOCTYPE a [<!ENTITY b "c">]><x xmlns:tim="urn:tim:xmp/1.0/"><tim:settings>&b;</tim:settings></x>'
    picture().save(tmp_path / "a.webp", xmp=packet)
    refused(tmp_path / "a.webp", "has no settings")


def test_settings_are_found_where_other_programs_move_them(tmp_path: Path) -> None:
    """exiftool may write a property of XMP as an attribute."""
    text = Settings(prompt="a", width=1, height=1).to_json().replace('"', "&quot;")
    picture().save(tmp_path / "a.jpg", xmp=f'<r><d xmlns:q="urn:tim:xmp/1.0/" q:settings="{text}"/></r>'.encode())
    assert read_settings(tmp_path / "a.jpg").prompt == "a"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_lacks_its_end_is_not_complete(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"a.{suffix}", FULL)
    content = path.read_bytes()
    for missing in (1, 7, len(content) // 2, len(content)):
        path.write_bytes(content[:-missing])
        assert not is_complete(path)
    assert not is_complete(tmp_path / "nowhere")
    assert not is_complete(tmp_path)
