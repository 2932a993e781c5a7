"""`tim plan --export`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.launch.test_cli import Tim, config, corpus, pictures, refused, tim

__all__ = ["config", "corpus", "pictures", "tim"]


def test_a_plan_is_written_for_other_trainers(corpus: Path, config: Path, tmp_path: Path, tim: Tim) -> None:
    file = tmp_path / "plan.jsonl"
    done = tim("plan", config, f"corpus={corpus}", "--steps", 2, "--ranks", 2, "--export", file, "--json")
    packs = [json.loads(line) for line in file.read_text().splitlines()]
    images = sum(len(pack["samples"]) for pack in packs)
    assert done.data == {"export": str(file), "format": "steps", "steps": 2, "packs": 8, "images": images}
    assert [pack["rank"] for pack in packs] == [0, 0, 1, 1] * 2
    assert f"2 steps, 8 packs, {images} images" in tim("plan", config, f"corpus={corpus}", "--steps", 2, "--export", file).out.replace(
        "\n", " "
    )


def test_buckets_are_written_for_the_official_code(corpus: Path, config: Path, tmp_path: Path, tim: Tim) -> None:
    patch = ["network.params.patch_size=32", "plan.max_tokens=4"]
    done = tim("plan", config, f"corpus={corpus}", *patch, "--export", tmp_path / "b", "--export-as", "tim-buckets", "--json")
    assert (done.code, done.data["images"], done.data["format"]) == (0, 6, "tim-buckets")
    rows = [json.loads(line) for line in (tmp_path / "b" / "data_info.jsonl").read_text().splitlines()]
    assert sorted(row for batch in json.loads((tmp_path / "b" / "bucket_sampler.json").read_text()) for row in batch) == list(range(6))
    assert {row["bucket"] for row in rows} == {"native-32x32", "native-32x64", "native-64x32", "native-64x64", "native-32x96"}
    assert rows[0]["image_file"].startswith(f"{json.loads((corpus / 'manifest.json').read_text())['name']}/")


def test_formats_without_a_file_or_a_corpus_are_refused(corpus: Path, config: Path, tmp_path: Path, tim: Tim) -> None:
    refused(tim("plan", config, f"corpus={corpus}", "--export-as", "steps"), "--export-as steps: goes with --export FILE")
    sizes = ["--sizes", corpus / "index.parquet", "--export", tmp_path / "b"]
    refused(tim("plan", *sizes, "--export-as", "tim-buckets"), "goes with --export FILE and a CONFIG")
    refused(tim("plan", config, f"corpus={corpus}", "--export", tmp_path / "b", "--export-as", "tim-buckets"), r"plan\.stride 8")
    limits = ["--max-tokens", 4, "--tokens-per-pack", 16, "--packs-per-step", 2]
    assert tim("plan", *sizes, *limits, "--steps", 2, "--json").data["packs"] == 4
