"""Every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dataprep.checks.verify import verify
from dataprep.prepare import PrepareConfig, prepare
from tests.dataprep.helpers import photo_folder, table_rows


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    photo_folder(folder / "set", count=12)
    prepare([str(folder / "set")], out=folder / "C", config=PrepareConfig.model_validate({"shards": {"max_samples": 5}}))
    return folder / "C"


@pytest.fixture
def corpus(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "C")
    return tmp_path / "C"


def test_a_sound_corpus_has_no_problems(sound: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    report = verify(sound, workers=2, progress=lambda *step, note="": seen.append(step))
    assert (report.problems, report.shards, report.samples) == ([], 3, 12)
    assert seen[-1] == ("verify", 12, 12)


def test_a_flipped_byte_in_a_member_is_found_and_placed(corpus: Path) -> None:
    rows = {row["key"]: row for row in table_rows(corpus)}
    data = bytearray((corpus / "000001.tar").read_bytes())
    flipped = {"image": "0000010000", "text": "0000010002", "json": "0000010003"}
    for what, key in flipped.items():
        data[rows[key][f"{what}_offset"] + 1] ^= 0xFF
    (corpus / "000001.tar").write_bytes(data)
    problems = verify(corpus).problems
    assert any("000001.tar: its digest" in problem for problem in problems)
    assert all(any(f"000001.tar: {key}:" in problem for problem in problems) for key in flipped.values())
    assert not any("0000010001" in problem for problem in problems)
    assert all("\n" not in problem for problem in problems)


@pytest.mark.parametrize("place", [0.0, 0.5, 0.99])
def test_a_flipped_byte_in_any_file_is_found(corpus: Path, place: float) -> None:
    names = ("000000.parquet", "index.parquet", "000002.tar")
    for name in names:
        data = bytearray((corpus / name).read_bytes())
        data[int(place * (len(data) - 1))] ^= 0x10
        (corpus / name).write_bytes(data)
    problems = verify(corpus).problems
    assert all(any(problem.startswith(f"{name}:") for problem in problems) for name in names)


def test_missing_files_are_found(corpus: Path) -> None:
    names = ["000000.tar", "000001.parquet", "000002_stats.json", "index.parquet", "index.json", "README.md", "report.html"]
    for name in names:
        (corpus / name).unlink()
    assert sorted(verify(corpus).problems) == sorted(f"{name}: is missing" for name in names)


def test_a_cut_shard_and_a_stray_one_are_found(corpus: Path) -> None:
    data = (corpus / "000000.tar").read_bytes()
    (corpus / "000000.tar").write_bytes(data[: len(data) // 2])
    shutil.copy(corpus / "000001.tar", corpus / "000009.tar")
    problems = verify(corpus).problems
    assert "000009.tar: not in the manifest" in problems
    assert sum(problem.startswith("000000.tar:") for problem in problems) > 2


def test_an_account_that_does_not_add_up_is_found(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["totals"]["inputs"] += 1
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    assert any("input counts do not add up" in problem for problem in verify(corpus).problems)


def test_what_is_no_corpus_is_a_one_line_error(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*not a corpus[^\n]*$"):
        verify(tmp_path)
    for content, message in (("{", "not JSON"), ("[]", "format None"), ('{"format": 2}', "format 2")):
        (corpus / "manifest.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            verify(corpus)
