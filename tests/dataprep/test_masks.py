"""Loss masks from the folder of a user to the batch of a step: prepared, appended, repaired, prepared again, indexed, loaded."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dataprep.append import AppendMode
from dataprep.checks.repair import repair
from dataprep.checks.verify import verify
from dataprep.features.encode import EncodeConfig, encode
from dataprep.index_tars import index
from dataprep.prepare import PrepareConfig, prepare
from dataprep.sources.column_mapping import ColumnConfig
from pipeline.corpus.corpus import Corpus
from pipeline.images.masks import read_mask
from pipeline.loading.loader import Batch, Loader
from pipeline.planning.config import PlanConfig
from pipeline.planning.planner import Planner
from tests.isolation import isolated_process
from tests.pipeline.images.test_masks import png, scene

COLUMNS = ("key", "path", "mask_path", "mask_offset", "mask_length", "width", "height")


def save(path: Path, pixels: np.ndarray, *, orientation: int = 1) -> None:
    """A grey picture as JPEG or PNG in colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(path, quality=95, exif=exif)
    path.with_suffix(".txt").write_text(f"picture {path.stem}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose masks are themselves, in all layouts; one without a mask; and masks that cannot be used."""
    folder = tmp_path_factory.mktemp("user") / "pictures"
    for seed, name in enumerate(("own", "onetrainer", "plain", "broken", "shape", "black")):
        save(folder / f"{name}.jpg", scene(48, 64, seed=seed))
    (folder / "own.mask.png").write_bytes(png(scene(48, 64, seed=0)))
    half = Image.fromarray(scene(48, 64, seed=1)).resize((32, 24), Image.Resampling.BOX)
    half.save(folder / "onetrainer-masklabel.png")
    (folder / "broken.mask.png").write_bytes(png(scene(48, 64, seed=3))[:-60])
    (folder / "shape.mask.png").write_bytes(png(scene(64, 64, seed=4)))
    (folder / "black-masklabel.png").write_bytes(png(np.zeros((48, 64), np.uint8)))
    (folder / "nobody.mask.png").write_bytes(png(scene(48, 64, seed=0)))
    save(folder / "inner" / "turned.jpg", scene(40, 72, seed=7), orientation=6)
    (folder / "inner" / "masks").mkdir()
    Image.fromarray(scene(40, 72, seed=7)).save(folder / "inner" / "masks" / "turned.webp", lossless=True)
    return folder


@pytest.fixture(scope="module")
def corpus(folder: Path) -> Path:
    corpus = folder.parent / "corpus"
    counts = prepare([str(folder)], out=corpus, config=PrepareConfig())
    assert (counts.inputs, counts.kept, counts.rejected) == (7, 4, {"bad-record": 3})
    assert [note for note in counts.notes if "mask" in note] == [
        "pictures: 1 mask(s) without an image of the same name were left out: nobody.mask.png",
        "3 of 4 images have a loss mask",
    ]
    return corpus


def rows(corpus: Path) -> dict[str, dict[str, Any]]:
    """Rows of a corpus by the name of the picture."""
    opened = Corpus.open(corpus)
    found = [row for shard in range(len(opened.shards)) for row in opened.read(shard, columns=COLUMNS).to_pylist()]
    return {Path(row["path"]).stem: row for row in found}


def masks(corpus: Path) -> dict[str, np.ndarray]:
    """Masks in the shards, by the name of the picture, found by the offsets in the tables."""
    found = {}
    opened = Corpus.open(corpus)
    for shard in range(len(opened.shards)):
        data = Path(opened.shards[shard].path).read_bytes()
        for row in opened.read(shard, columns=COLUMNS).to_pylist():
            if row["mask_offset"] is not None:
                found[Path(row["path"]).stem] = read_mask(data[row["mask_offset"] :][: row["mask_length"]])
    return found


def batches(corpus: Path, *, steps: int = 2, features: Path | None = None, channels: int = 4, factor: int = 4) -> list[Batch]:
    plan = PlanConfig(stride=8, max_tokens=40, tokens_per_pack=120, packs_per_step=1, flip=0.5)
    planner = Planner([Corpus.open(corpus, features=features)], plan=plan, seed=1, width=32, diffusion_share=1, consistency_share=0)
    loader = Loader(planner, seed=1, channels=channels, factor=factor, workers=0, max_bad_fraction=1)
    return [batch for step in islice(iter(loader), steps) for batch in step.batches]


def check_aligned(found: list[Batch], names: Mapping[str, str], *, unmasked: str) -> None:
    """A picture and its mask show the same, in every size and mirrored or not."""
    seen = set()
    for batch in found:
        assert batch.masks is not None
        for id, image, mask, noise in zip(batch.ids, batch.images, batch.masks, batch.noise, strict=True):
            name = names[id.partition("/")[2]]
            seen.add(name)
            assert mask.shape == (1, *noise.shape[1:])
            if name == unmasked:
                assert (mask == 1).all()
                continue
            grey = image[0].float() / 255
            cells = grey.reshape(grey.shape[0] // 4, 4, -1, 4).mean((1, 3))
            assert (cells - mask[0]).abs().max() < 0.12
    assert seen == set(names.values())


def test_masks_are_prepared_like_their_images(corpus: Path) -> None:
    found = rows(corpus)
    assert {name: row["mask_path"] for name, row in found.items()} == {
        "own": "own.mask.png", "onetrainer": "onetrainer-masklabel.png", "plain": "", "turned": "inner/masks/turned.webp",
    }  # fmt: skip
    of = masks(corpus)
    assert {name: mask.shape for name, mask in of.items()} == {name: (row["height"], row["width"]) for name, row in found.items()}
    assert np.array_equal(of["own"], scene(48, 64, seed=0))
    assert np.array_equal(of["turned"], np.rot90(scene(40, 72, seed=7), -1))
    assert np.abs(of["onetrainer"].astype(int) - scene(48, 64, seed=1)).max() < 25
    assert (of["plain"] == 255).all()
    with tarfile.open(corpus / "000000.tar") as tar:
        names = tar.getnames()
    keys = sorted(row["key"] for row in found.values())
    assert names == [f"{key}.{extension}" for key in keys for extension in ("jpg", "txt", "json", "mask.png")]
    rejected = pq.read_table(corpus / "000000.parquet").filter(pq.read_table(corpus / "000000.parquet").column("key").is_null()).to_pylist()
    details = {row["path"]: row["detail"] for row in rejected}
    assert details["broken.jpg"].startswith("its mask broken.mask.png cannot be used: damaged")
    assert details["shape.jpg"] == "its mask shape.mask.png is 64x64 pixels, its image 64x48: they need the same aspect ratio"
    assert details["black.jpg"] == "its mask black-masklabel.png is black everywhere: nothing of the image would be trained"
    assert verify(corpus).problems == []
    assert "`KEY.mask.png` is its loss mask" in (corpus / "README.md").read_text()


def test_a_batch_has_them_where_the_image_is(corpus: Path) -> None:
    names = {row["key"]: name for name, row in rows(corpus).items()}
    check_aligned(batches(corpus, steps=6), names, unmasked="plain")


def test_cached_features_come_with_the_masks_of_the_corpus(corpus: Path, tmp_path: Path) -> None:
    config = EncodeConfig.model_validate({"codec": {"kind": "pixel"}, "patch_size": 8, "max_tokens": 40, "flip": True})
    with isolated_process():
        encode(corpus, out=tmp_path / "features", config=config)
    cached = batches(corpus, features=tmp_path / "features", channels=3, factor=1)
    read = batches(corpus, channels=3, factor=1)
    for one, other in zip(cached, read, strict=True):
        assert (one.ids, one.images) == (other.ids, [])
        assert one.latents is not None
        assert one.masks is not None
        assert other.masks is not None
        assert all(map(torch.equal, one.masks, other.masks))
        assert [mask.shape[1:] for mask in one.masks] == [latent.shape[1:] for latent in one.latents]


def test_a_corpus_prepared_again_and_an_appended_one_keep_them(corpus: Path, folder: Path, tmp_path: Path) -> None:
    counts = prepare([str(corpus)], out=tmp_path / "again", config=PrepareConfig())
    assert counts.kept == 4
    keys = {row["key"]: name for name, row in rows(corpus).items()}
    again = {keys[name]: mask for name, mask in masks(tmp_path / "again").items()}  # paths are the old keys
    assert all(np.array_equal(again[name], mask) for name, mask in masks(corpus).items())
    assert rows(tmp_path / "again")[next(key for key, name in keys.items() if name == "plain")]["mask_path"] == ""

    for number in range(2):
        save(tmp_path / "first" / f"{number}.jpg", scene(40, 40, seed=20 + number))
    prepare([str(tmp_path / "first")], out=tmp_path / "grown", config=PrepareConfig())
    assert "mask_path" not in pq.read_schema(tmp_path / "grown" / "000000.parquet").names
    prepare([str(folder)], out=tmp_path / "grown", config=PrepareConfig(), append_mode=AppendMode(append=True, retry=False))
    assert verify(tmp_path / "grown").problems == []
    assert set(masks(tmp_path / "grown")) == set(masks(corpus))
    assert [row["mask_offset"] for name, row in rows(tmp_path / "grown").items() if name in "01"] == [None, None]
    found = batches(tmp_path / "grown", steps=4)
    assert {id for batch in found for id in batch.ids} == {f"first/{row['key']}" for row in rows(tmp_path / "grown").values()}


def test_damage_is_found_and_a_lost_table_repaired(corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "corpus"
    copy.mkdir()
    for file in corpus.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    before = rows(copy)
    (copy / "000000.parquet").unlink()
    (copy / "index.parquet").unlink()
    assert repair(copy).done[0] == "000000.parquet: rebuilt from 000000.tar"
    assert rows(copy) == before
    assert verify(copy).problems == []

    place = before["own"]
    with open(copy / "000000.tar", "r+b") as tar:
        tar.seek(place["mask_offset"] + 60)
        tar.write(bytes(30))
    assert any(f"{place['key']}: its mask cannot be read: damaged" in problem for problem in verify(copy).problems)


def tar_of(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_tars_of_others_are_indexed_and_prepared_with_their_masks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members: dict[str, bytes] = {}
    for number in range(5):
        members |= {f"{number}.jpg": jpeg(scene(48, 64, seed=number)), f"{number}.txt": f"picture {number}".encode()}
    members["0.mask.png"] = png(scene(24, 32, seed=0))
    members["2.mask.png"] = png(scene(64, 64, seed=2))  # another shape
    members["3.mask.png"] = b"not an image"
    damaged = bytearray(png(scene(48, 64, seed=4)))
    damaged[70:90] = bytes(20)
    members["4.mask.png"] = bytes(damaged)  # behind an intact header
    tar_of(tmp_path / "theirs.tar", members)

    counts = index([str(tmp_path / "theirs.tar")], out=tmp_path / "index")
    assert (counts.kept, counts.rejected) == (3, {"bad-record": 2})
    details = {
        row["path"]: row["detail"] for row in Corpus.open(tmp_path / "index").read_rejected(0, columns=("path", "detail")).to_pylist()
    }
    assert details["2.jpg"] == "its mask 2.mask.png is 64x64 pixels, its image 64x48: they need the same aspect ratio"
    assert details["3.jpg"].startswith("its mask 3.mask.png not-an-image")
    assert any("4: its mask cannot be read: damaged" in problem for problem in verify(tmp_path / "index").problems)
    found = batches(tmp_path / "index", steps=3)
    lost = {id for batch in found for id, weight in zip(batch.ids, batch.weights.tolist(), strict=True) if weight == 0}
    assert lost == {"theirs/4"}
    assert "skipped sample theirs/4" in caplog.text
    assert "its mask 4.mask.png damaged" in caplog.text
    good = [batch for batch in found if not set(batch.ids) & lost]
    for batch in good:
        check_aligned([batch], {id.partition("/")[2]: id.partition("/")[2] for id in batch.ids}, unmasked="1")

    save(tmp_path / "mine" / "deep" / "a.jpg", scene(48, 64, seed=11))
    (tmp_path / "kohya" / "deep").mkdir(parents=True)
    for name in ("a", "spare"):
        Image.fromarray(scene(48, 64, seed=11)).save(tmp_path / "kohya" / "deep" / f"{name}.png")
    elsewhere = {"columns": ColumnConfig(masks=str(tmp_path / "kohya"))}
    config = PrepareConfig.model_validate({"sources": {"mine": {"path": str(tmp_path / "mine"), **elsewhere}}})
    counts = prepare([str(tmp_path / "theirs.tar")], out=tmp_path / "both", config=config)
    assert (counts.kept, counts.rejected) == (3, {"bad-record": 3})
    assert "mine: 1 mask(s) without an image of the same name were left out: kohya/deep/spare.png" in counts.notes
    assert {name: row["mask_path"] for name, row in rows(tmp_path / "both").items()} == {
        "0": "0.mask.png", "1": "", "a": str(tmp_path / "kohya" / "deep" / "a.png"),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"theirs\.tar: columns\.masks=x is for image folders"):
        prepare([str(tmp_path / "theirs.tar")], out=tmp_path / "no", config=PrepareConfig(columns=ColumnConfig(masks="x")))
    with pytest.raises(ValueError, match=r"columns\.masks=.*nowhere: .*No such file or directory"):
        prepare([str(tmp_path / "mine")], out=tmp_path / "no", config=PrepareConfig(columns=ColumnConfig(masks=str(tmp_path / "nowhere"))))
    manifest = json.loads((tmp_path / "both" / "manifest.json").read_text())
    assert manifest["has_masks"] is True
