"""The hostile folder: each file ends as its `expect` says, each broken tar as its README says; no run dies of one."""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dataprep.checks.verify import verify
from dataprep.index_tars import index
from dataprep.prepare import InputCounts, PrepareConfig, prepare
from dataprep.report.html import ReportConfig, report
from pipeline.images import read_image
from tests.dataprep.helpers import member, photo, row_of, table_rows, write_tar

TARS = ("traversal", "cut_mid_member", "orphan_members", "duplicate_keys", "zero_length", "not_a_tar")
TAR_INPUTS = 5 + 6 + 3 + 2 + 1 + 1
# Images of the folder that a tar has, too, as they were before somebody took their colours.
ALIKE = {"gray.jpg": "cut_mid_member.tar/000003.jpg", "cmyk.jpg": "traversal.tar/000002.jpg"}


@pytest.fixture(scope="module")
def hostile(shared: Path) -> Path:
    return shared / "corpora/hostile"


@pytest.fixture(scope="module", params=["mark", "drop"])
def corpus(
    request: pytest.FixtureRequest, hostile: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, InputCounts]:
    """One run over the hostile folder, 440 good images and all broken tars."""
    out = tmp_path_factory.mktemp("hostile") / "C"
    sources = [hostile, shared / "corpora/photos", shared / "corpora/sidecar", *(hostile / f"{tar}.tar" for tar in TARS)]
    config = PrepareConfig.model_validate({"dedup": {"near": request.param}, "shards": {"max_samples": 300}})
    return out, prepare([str(source) for source in sources], out=out, config=config, workers=2)


def rows_with_expectations(hostile: Path) -> list[dict[str, str]]:
    lines = (hostile / "metadata.jsonl").read_bytes().splitlines()
    return [json.loads(line) for line in lines[:-1]]


def test_every_row_ends_as_it_says(corpus: tuple[Path, InputCounts], hostile: Path) -> None:
    out, counts = corpus
    drops = json.loads((out / "manifest.json").read_text())["config"]["dedup"]["near"] == "drop"
    for stated in rows_with_expectations(hostile):
        row, expect = row_of(out, stated["file_name"]), stated["expect"]
        if stated["file_name"] in ALIKE:
            assert row["near_duplicate_of"] == row_of(out, ALIKE[stated["file_name"]])["key"]
            expect = "near-duplicate"
        if drops and expect == "near-duplicate":
            expect = "reject:near-duplicate"
        if expect.startswith("reject:"):
            reason = expect.removeprefix("reject:").replace("truncated", "damaged")  # its name when the folder was made
            assert (row["status"], row["reason"], row["key"]) == ("rejected", reason, None), stated["file_name"]
        else:
            assert (row["status"], row["reason"]) == ("success", ""), stated["file_name"]
        assert bool(row["near_duplicate_of"]) == expect.endswith("near-duplicate"), stated["file_name"]
    assert counts.inputs == counts.kept + sum(counts.rejected.values()) == len(table_rows(out)) == 30 + 400 + 40 + TAR_INPUTS
    assert counts.rejected == dict(sorted(Counter(row["reason"] for row in table_rows(out) if row["reason"]).items()))
    assert verify(out, workers=2).problems == []


def test_every_broken_tar_ends_as_its_readme_says(corpus: tuple[Path, InputCounts]) -> None:
    """What is kept when a tar stands alone may be the duplicate of another image here."""
    out, _ = corpus
    reasons = {"duplicate": "", "near-duplicate": ""}
    ends = {
        tar: Counter(reasons.get(row["reason"], row["reason"]) for row in table_rows(out) if row["path"].startswith(f"{tar}.tar"))
        for tar in TARS
    }
    assert ends == {
        "traversal": {"": 3, "bad-record": 2},
        "cut_mid_member": {"": 5, "damaged": 1},
        "orphan_members": {"": 1, "missing": 1, "no-caption": 1},
        "duplicate_keys": {"": 2},
        "zero_length": {"bad-record": 1},
        "not_a_tar": {"bad-record": 1},
    }
    keys = [row["key"] for row in table_rows(out) if row["key"]]
    assert len(set(keys)) == len(keys)
    assert {path.name for path in out.parent.iterdir()} == {"C"}  # a member's path never leads out of it
    assert all(path.is_file() for path in out.iterdir())


def test_the_cut_last_line_is_one_bad_record_with_its_number(corpus: tuple[Path, InputCounts]) -> None:
    [row] = [row for row in table_rows(corpus[0]) if row["reason"] == "bad-record" and row["source"] == "hostile"]
    assert row["path"] == "metadata.jsonl:30"


def test_tars_in_the_folder_are_told_of(corpus: tuple[Path, InputCounts]) -> None:
    assert any("6 tar file(s) inside the folder" in note for note in corpus[1].notes)


def test_kept_images_look_as_they_should(corpus: tuple[Path, InputCounts], hostile: Path) -> None:
    out, _ = corpus

    def stored(name: str) -> np.ndarray:
        image = read_image(member(out, row_of(out, name), "image"))
        assert image.clean
        return image.pixels.astype(int)

    def seen(name: str, convert: str = "RGB") -> np.ndarray:
        return np.asarray(ImageOps.exif_transpose(Image.open(hostile / name)).convert(convert)).astype(int)

    alike = [name for name in ALIKE if row_of(out, name)["key"]]  # those that were marked, not dropped
    for name in ("webp.webp", "wrong_ext.jpg", "rotated.jpg", "animated.gif", *alike):
        assert np.abs(stored(name) - seen(name)).mean() < 3, name
    for name in ("progressive.jpg", "icc.jpg", "duplicate_a.jpg"):
        assert member(out, row_of(out, name), "image") == (hostile / name).read_bytes()
    rgba = seen("alpha.png", "RGBA")
    alpha = rgba[..., 3:] / 255
    assert np.abs(stored("alpha.png") - (rgba[..., :3] * alpha + 255 * (1 - alpha))).mean() < 3
    assert (stored("alpha.png")[0, 0] > 250).all()
    sixteen = np.asarray(Image.open(hostile / "sixteen_bit.png")).astype(float) / 257
    assert np.abs(stored("sixteen_bit.png")[..., 0] - sixteen).mean() < 1
    assert {row_of(out, "rotated.jpg")[side] for side in ("original_width", "height")} == {375}


def test_captions_are_clean(corpus: tuple[Path, InputCounts]) -> None:
    out, _ = corpus
    assert len(row_of(out, "long_caption.jpg")["caption"]) in range(4090, 4097)
    assert "caption-cut" in row_of(out, "long_caption.jpg")["detail"]
    assert row_of(out, "caption_nul.jpg")["caption"] == "nul inside"
    assert row_of(out, "unicode_caption.jpg")["caption"] == "一张照片 — café ☕ é"
    assert member(out, row_of(out, "unicode_caption.jpg"), "text").decode() == "一张照片 — café ☕ é"


@pytest.mark.parametrize(
    ("tar", "kept", "rejected"),
    [
        ("traversal", 3, {"bad-record": 2}),
        ("cut_mid_member", 5, {"damaged": 1}),
        ("orphan_members", 1, {"missing": 1, "no-caption": 1}),
        ("duplicate_keys", 2, {}),
        ("zero_length", 0, {"bad-record": 1}),
        ("not_a_tar", 0, {"bad-record": 1}),
    ],
)
def test_broken_tars_beside_good_sources(hostile: Path, tmp_path: Path, tar: str, kept: int, rejected: dict[str, int]) -> None:
    good = tmp_path / "good"
    good.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    (good / "a.jpg").write_bytes(buffer.getvalue())
    (good / "a.txt").write_text("noise")
    source = hostile / f"{tar}.tar"
    counts = prepare([str(good), str(source)], out=tmp_path / "C", config=PrepareConfig())
    assert (counts.kept, counts.rejected) == (kept + 1, rejected)
    assert all(tar in row["path"] for row in table_rows(tmp_path / "C") if row["reason"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["C", "good"]
    assert verify(tmp_path / "C").problems == []
    if not kept:
        with pytest.raises(RuntimeError, match="no usable image"):
            prepare([str(source)], out=tmp_path / "D", config=PrepareConfig())
        assert not (tmp_path / "D").exists()


@pytest.mark.parametrize("read", ["prepare", "index"])
def test_nothing_in_a_shard_is_run(tmp_path: Path, read: str) -> None:
    """Pickles, modules and archives of them stay bytes, under every name that a reader might take for a reason to load them."""
    marker = tmp_path / "it-ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {marker}",)

    code = f"open({str(marker)!r}, 'w')".encode()
    evil = {**dict.fromkeys(("pyd", "pickle", "pkl", "pth", "pt", "ten", "npy", "json", "cls", "txt"), pickle.dumps(Payload())), "py": code}
    members = [("a.jpg", photo(1)), ("a.txt", b"fine"), ("__init__.py", code), ("sitecustomize.py", code)]
    for extension, data in evil.items():
        members += [(f"{extension}.jpg", photo(len(members))), (f"{extension}.{extension}", data)]
    tar = write_tar(tmp_path / "t.tar", members)
    out = tmp_path / "C"
    if read == "prepare":
        prepare([str(tar)], out=out, config=PrepareConfig())
    else:
        index([str(tar)], out=out)
    verify(out)
    report([out], out=tmp_path / "report.html", config=ReportConfig())
    assert not marker.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["C", "report.html", "t.tar"]
