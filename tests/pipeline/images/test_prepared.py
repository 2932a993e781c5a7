"""What dataprep writes is what this room reads."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from PIL import Image

from dataprep.prepare import PrepareConfig, prepare
from pipeline.corpus.corpus import Corpus
from pipeline.loading.loader import Loader
from pipeline.planning.planner import PlanConfig, Planner
from tests.pipeline.conftest import image


def test_prepared_images_are_planned_and_read(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    records = []
    for i in range(12):
        Image.fromarray(image(24 + 5 * i, 90 - 4 * i, seed=i)).save(source / f"{i}.png")
        captions = [f"image {i}", f"number {i}"]
        records.append({"file_name": f"{i}.png", "text": captions[0], "captions": captions})
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    prepare([str(source)], out=tmp_path / "corpus", config=PrepareConfig())

    corpus = Corpus.open(tmp_path / "corpus")
    assert (corpus.name, corpus.count) == ("pictures", 12)
    plan = PlanConfig(stride=8, max_tokens=64, tokens_per_pack=256, packs_per_step=4)
    planner = Planner([corpus], plan=plan, seed=0, width=32, diffusion_share=0.5, consistency_share=0.1)
    assert planner.sample_counts["samples"] == 12
    loader = Loader(planner, seed=0, channels=3, factor=1, workers=0, max_bad_fraction=0)
    seen: set[str] = set()
    for step in islice(loader, 8):
        seen.update(caption for batch in step.batches for caption in batch.captions)
    assert seen == {caption for record in records for caption in record["captions"]}
    assert loader.samples_failed == 0
