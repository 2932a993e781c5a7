"""Scores against what open_clip itself says, of a tiny model with random weights that is saved to local files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dataprep.checks.verify import verify
from dataprep.prepare import PrepareConfig, prepare
from dataprep.report.html import ReportConfig, report
from dataprep.sidecars.score import ScoreConfig, score
from launch.cli import main
from launch.config.load import load_config
from launch.training.planning import make_planner
from pipeline.corpus.corpus import Corpus
from pipeline.streams.corpus_view import CorpusView
from tests import REPOSITORY
from tests.dataprep.helpers import digests, member, photo, photo_folder, row_of, table_rows, write_folder
from tests.tim import models

WIDTH = 32


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.clip(tmp_path_factory.mktemp("clip"), vision={"width": 64, "patch_size": 8}, text={"layers": 1})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images in two shards, two of them alike but for their compression, and a large one."""
    folder = photo_folder(tmp_path_factory.mktemp("source") / "set", count=10)
    files = {"again.jpg": photo(3, quality=60), "large.jpg": photo(77, height=300, width=420)}
    write_folder(folder, files)
    lines = "".join(json.dumps({"file_name": name, "text": f"image {name}"}) + "\n" for name in files)
    (folder / "metadata.jsonl").write_text((folder / "metadata.jsonl").read_text() + lines)
    out = tmp_path_factory.mktemp("prepared") / "C"
    prepare([str(folder)], out=out, config=PrepareConfig.model_validate({"shards": {"max_samples": 7}}))
    return out


@pytest.fixture
def corpus(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "C"))


def settings(clip: Path, **more: Any) -> ScoreConfig:
    return ScoreConfig.model_validate({"model": str(clip), "batch": 3, "device": "cpu", **more})


def read(corpus: Path, *columns: str) -> dict[str, dict[str, Any]]:
    """Rows by key."""
    opened = Corpus.open(corpus)
    return {row["key"]: row for shard in range(len(opened.shards)) for row in opened.read(shard, columns=("key", *columns)).to_pylist()}


def reference(clip: Path, corpus: Path, texts: list[str]) -> tuple[dict[str, np.ndarray], np.ndarray, float]:
    """Embeddings by key and of texts, by open_clip alone, and its scale."""
    import open_clip

    made: Any = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    model, transform = made[0].eval(), made[2]
    images = {}
    for row in table_rows(corpus):
        (corpus.parent / "one.jpg").write_bytes(member(corpus, row, "image"))
        with torch.inference_mode(), Image.open(corpus.parent / "one.jpg") as image:
            images[row["key"]] = model.encode_image(transform(image)[None], normalize=True)[0].numpy()
    with torch.inference_mode():
        read_texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{clip}")(texts), normalize=True).numpy()
    return images, read_texts, float(model.logit_scale.detach().exp())


def head_file(path: Path) -> tuple[Path, torch.nn.Sequential]:
    """As LAION publishes one: layers with gaps in their numbering where dropout was."""
    torch.manual_seed(1)
    layers = torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)).eval()
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, path)
    return path, layers


def test_scores_are_what_open_clip_says(clip: Path, corpus: Path, tmp_path: Path) -> None:
    before = digests(corpus)
    file, layers = head_file(tmp_path / "head.pth")
    labels = {"watermark": {"positive": ["a watermark", "a logo"], "negative": ["a clean photo"]}}
    seen: list[tuple[str, int, int | None]] = []
    done = score(
        corpus,
        config=settings(clip, aesthetic=str(file), labels=labels, embeddings=True),
        progress=lambda *told, note="": seen.append(told),
    )
    assert (done.samples, done.computed, done.unreadable, done.duplicates) == (12, 12, 0, None)
    assert seen[-1] == ("score", 12, 12)
    assert {name: digest for name, digest in digests(corpus).items() if name in before} == before

    rows = read(corpus, "caption", "similarity", "aesthetic", "watermark", "embedding")
    keys = list(rows)
    images, texts, scale = reference(clip, corpus, [*(rows[key]["caption"] for key in keys), "a watermark", "a logo", "a clean photo"])
    for place, key in enumerate(keys):
        picture = images[key]
        close = 2e-3 if row_of(corpus, "large.jpg")["key"] == key else 1e-4  # that one is decoded at a fraction of its size
        assert rows[key]["similarity"] == pytest.approx(float(picture @ texts[place]), abs=close)
        odds = np.exp(scale * picture @ texts[-3:].T)
        assert rows[key]["watermark"] == pytest.approx(float(odds[:2].sum() / odds.sum()), abs=20 * close)
        with torch.inference_mode():
            assert rows[key]["aesthetic"] == pytest.approx(float(layers(torch.from_numpy(picture))), abs=10 * close)
        assert np.array(rows[key]["embedding"]) == pytest.approx(picture, abs=10 * close + 1e-3)
    assert done.means["similarity"] == pytest.approx(np.mean([row["similarity"] for row in rows.values()]))
    median = float(np.median([row["similarity"] for row in rows.values()]))
    table, targets = CorpusView(Corpus.open(corpus), where=f"similarity > {median}").select(0, rule=_rule())
    assert 0 < (targets.left_out == 0).sum() < table.num_rows
    assert verify(corpus).problems == []


def _rule() -> Any:
    from pipeline.size_rule import SizeRule

    return SizeRule(stride=8, max_tokens=64)


def test_batches_and_threads_do_not_matter_and_finished_shards_are_kept(clip: Path, corpus: Path) -> None:
    score(corpus, config=settings(clip))
    first = read(corpus, "similarity")
    times = {path: path.stat().st_mtime_ns for path in corpus.glob("*.scores.parquet")}
    assert score(corpus, config=settings(clip, batch=64)).computed == 0
    (corpus / "000001.scores.parquet").unlink()
    assert score(corpus, config=settings(clip, batch=64), workers=3).computed == 5
    assert (corpus / "000000.scores.parquet").stat().st_mtime_ns == times[corpus / "000000.scores.parquet"]
    again = read(corpus, "similarity")
    assert {key: row["similarity"] for key, row in again.items()} == pytest.approx(
        {key: row["similarity"] for key, row in first.items()}, abs=1e-5
    )
    other = score(corpus, config=settings(clip, similarity=False, embeddings=True))
    assert other.computed == 12  # another config is another table
    assert "similarity" not in Corpus.open(corpus).schema.names


def test_what_cannot_be_read_has_no_score(clip: Path, corpus: Path) -> None:
    row = row_of(corpus, "00004.jpg")
    with open(corpus / f"{row['key'][:6]}.tar", "r+b") as tar:
        tar.seek(row["image_offset"] + 20)
        tar.write(b"\0" * (row["image_length"] - 20))
    done = score(corpus, config=settings(clip, embeddings=True))
    assert done.unreadable == 1
    assert [key for key, scored in read(corpus, "similarity").items() if scored["similarity"] is None] == [row["key"]]


def test_semantic_duplicates_name_the_better_image(clip: Path, corpus: Path, tmp_path: Path) -> None:
    done = score(corpus, config=settings(clip, duplicates=0.9999, embeddings=True))
    rows = read(corpus, "embedding", "semantic_duplicate_of", "width", "height", "image_length")
    order = sorted(rows, key=lambda key: (-rows[key]["width"] * rows[key]["height"], -rows[key]["image_length"], key))
    unit = {key: np.array(row["embedding"]) / np.linalg.norm(row["embedding"]) for key, row in rows.items()}
    kept: list[str] = []
    for key in order:
        cosines = {other: float(unit[key] @ unit[other]) for other in kept}
        nearest = max(cosines, key=lambda other: cosines[other], default="")
        is_duplicate = bool(nearest) and cosines[nearest] >= 0.9999
        assert rows[key]["semantic_duplicate_of"] == (nearest if is_duplicate else "")
        kept += [] if is_duplicate else [key]
    assert 0 < len(order) - len(kept) == done.duplicates
    pair = {row_of(corpus, name)["key"] for name in ("00003.jpg", "again.jpg")}
    assert any(rows[key]["semantic_duplicate_of"] in pair for key in pair)

    other = tmp_path / "D"
    prepare([str(photo_folder(tmp_path / "other", count=3, first=2))], out=other, config=PrepareConfig())
    with pytest.raises(ValueError, match="has no embeddings"):
        score(corpus, config=settings(clip, duplicates=0.9999), against=[other])
    score(other, config=settings(clip, embeddings=True))
    before = digests(other)
    against = score(corpus, config=settings(clip, duplicates=0.9999), against=[other])
    found = read(corpus, "semantic_duplicate_of")
    assert {found[row_of(corpus, f"0000{number}.jpg")["key"]]["semantic_duplicate_of"].split("/")[0] for number in (2, 3, 4)} == {"other"}
    assert against.duplicates is not None
    assert digests(other) == before
    assert verify(corpus).problems == []


def test_a_run_leaves_semantic_duplicates_out_and_the_report_shows_them(clip: Path, corpus: Path, tmp_path: Path) -> None:
    done = score(corpus, config=settings(clip, duplicates=0.9999))
    (tmp_path / "run.yaml").write_text(f"""\
corpus: {{path: {corpus}, where: "semantic_duplicate_of == ''"}}
run_dir: {tmp_path / "run"}
plan: {{max_tokens: 16, tokens_per_pack: 64, packs_per_step: 2}}
network: {{params: {{patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}}}
train: {{steps: 2}}
""")
    counts = make_planner(load_config(tmp_path / "run.yaml")).sample_counts
    assert (counts["samples"], counts["left_out"]) == (12 - (done.duplicates or 0), {"where": done.duplicates})

    report([corpus], config=ReportConfig())
    page = (corpus / "report.html").read_text("utf-8")
    assert "<figcaption>similarity</figcaption>" in page
    assert f"{done.duplicates} of the kept images are marked as semantic duplicates" in page
    shown = page.partition("Semantic duplicates, beside what they look like")[2]
    assert shown.count('<div class="pair">') == min(done.duplicates or 0, 8)
    assert shown.count("<img ") == 2 * min(done.duplicates or 0, 8)


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"model": "ViT-B-32"}, "needs weights: give weights=FILE, or a tag"),
        ({"model": "ViT-B-32", "weights": "nothing"}, "there is no such file, and the tags of ViT-B-32 are"),
        ({"model": "VGG"}, "is neither a folder, hf-hub:ORG/NAME nor an open_clip architecture"),
        ({"model": "FOLDER"}, "is not an open_clip folder: it needs open_clip_config.json"),
        ({"aesthetic": "missing.pth"}, "aesthetic: missing.pth cannot be read"),
        ({"aesthetic": "NARROW"}, "is for embeddings of 8 numbers, the model gives 32"),
    ],
)
def test_models_that_cannot_be_used_are_named(clip: Path, corpus: Path, tmp_path: Path, more: dict[str, str], wrong: str) -> None:
    (tmp_path / "empty").mkdir()
    save_file({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, tmp_path / "narrow.safetensors")
    places = {"FOLDER": str(tmp_path / "empty"), "NARROW": str(tmp_path / "narrow.safetensors")}
    with pytest.raises(ValueError, match=rf"^[^\n]*{wrong}[^\n]*$"):
        score(corpus, config=settings(clip, **{key: places.get(value, value) for key, value in more.items()}))
    assert not list(corpus.glob("*.scores.parquet"))


def test_offline_it_says_which_file_to_bring(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "launch.cli", "score", str(corpus), "model=ViT-B-32", "weights=laion2b_s34b_b79k", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    told = json.loads(done.stdout)["error"]
    assert "bring open_clip_model.safetensors of https://huggingface.co/laion/CLIP-ViT-B-32" in told
    assert "\n" not in told

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        RuntimeError, match=r"bring open_clip_config\.json, open_clip_model\.safetensors .* of https://huggingface\.co/a/clip"
    ):
        score(corpus, config=ScoreConfig(model="hf-hub:a/clip"))


def test_the_commands(clip: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert main(["score", str(corpus), f"model={clip}", "device=cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 12
    pq.write_table(pa.table({"key": [row_of(corpus, "00001.jpg")["key"]], "note": ["fine"]}), tmp_path / "notes.parquet")
    assert main(["annotate", str(corpus), "--table", str(tmp_path / "notes.parquet"), "--on", "key", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["matched"], told["columns"], told["sidecar"]) == (1, ["note"], "notes")
    table = ["--table", str(tmp_path / "notes.parquet")]
    for wrong in (
        [*table, "--on", "name"],
        [*table, "--on", "key", "--captions", "some"],
        table,
        ["--remove", "no"],
        ["--remove", "notes", *table],
    ):
        with pytest.raises(SystemExit) as left:
            main(["annotate", str(corpus), *wrong])
        assert left.value.code == 2
    assert "note" in Corpus.open(corpus).schema.names
    assert main(["annotate", str(corpus), "--remove", "notes"]) == 0
    assert "note" not in Corpus.open(corpus).schema.names
    assert not list(corpus.glob("*.notes.parquet"))


def test_a_corpus_at_a_url_gets_the_same_tables(
    clip: Path, corpus: Path, tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import s3fs

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files, url = s3fs.S3FileSystem(), f"{bucket}/sets/C"
    files.put(f"{corpus}/", f"{url}/", recursive=True)
    keys = [row["key"] for row in table_rows(corpus)]
    pq.write_table(pa.table({"key": keys[:3], "caption": ["new ☕", "newer", "newest"]}), tmp_path / "recaption.parquet")
    pq.write_table(pa.table({"key": keys[3:5]}), tmp_path / "requests.parquet")
    for place in (url, str(corpus)):
        assert main(["annotate", place, "--table", str(tmp_path / "recaption.parquet"), "--on", "key"]) == 0
        assert main(["annotate", place, "--table", str(tmp_path / "requests.parquet"), "--on", "key", "--mark", "takedown"]) == 0
        assert main(["score", place, f"model={clip}", "device=cpu", "duplicates=0.9999"]) == 0
    files.invalidate_cache()
    files.get(f"{url}/", f"{tmp_path / 'D'}/", recursive=True)
    assert digests(tmp_path / "D") == digests(corpus)
    assert not list((tmp_path / "cache" / "tim" / "prepare").iterdir())

    chosen = CorpusView(Corpus.open(url), where="similarity > -1")
    left_out = [chosen.select(shard, rule=_rule())[1].left_out for shard in range(2)]
    assert sum((each == 0).sum() for each in left_out) == 10
    assert score(url, config=settings(clip, duplicates=0.9999)).computed == 0
    assert main(["annotate", url, "--remove", "recaption"]) == 0
    files.invalidate_cache()
    assert not files.glob(f"{url}/*.recaption.*")
    assert [sidecar.name for sidecar in Corpus.open(url).sidecars] == ["requests", "scores", "scores-duplicates"]
