"""The cases of public reports about tables, lists and encodings, as `cases/users` has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dataprep.prepare import PrepareConfig, prepare
from dataprep.report.rejections import NothingKept
from dataprep.sources.column_mapping import ColumnConfig
from tests.dataprep.helpers import table_rows

CASES = [
    ("04-lone-quote-in-table/list.tsv", {}, 30, {}),
    ("04-lone-quote-in-table/list.csv", {}, 29, {"bad-record": 1}),
    ("04-lone-quote-in-table/m", {}, 29, {"bad-record": 1}),
    ("05-captions-not-utf8/images", {}, 2, {"bad-record": 4}),
    ("05-captions-not-utf8/images", {"encoding": "cp1252"}, 4, {"bad-record": 1, "duplicate": 1}),
    ("05-captions-not-utf8/cp1252.csv", {"encoding": "cp1252"}, 4, {}),
    ("05-captions-not-utf8/cp1252.csv", {}, 0, {"bad-record": 4}),
    ("05-captions-not-utf8/x92.tar", {"encoding": "cp1252"}, 1, {}),
    ("05-captions-not-utf8/x92.tar", {}, 0, {"bad-record": 1}),
    ("11-files-unseen/flick/captions.txt", {}, 3, {}),
    ("11-files-unseen/jl/train.json", {}, 3, {}),
    ("11-files-unseen/meta_sd/meta_cap.json", {}, 3, {}),
    ("13-wrong-reasons/b64.parquet", {}, 3, {}),
    ("13-wrong-reasons/datauri.parquet", {}, 3, {}),
    ("13-wrong-reasons/conv.parquet", {"caption": "conversations"}, 0, {"no-caption": 3}),
    ("13-wrong-reasons/conv.parquet", {"caption": "conversations.1.value"}, 3, {}),
    ("13-wrong-reasons/lab", {}, 4, {}),
    ("13-wrong-reasons/lab/metadata.csv", {}, 4, {}),
    ("13-wrong-reasons/jsonstr.parquet", {}, 3, {}),
]


@pytest.mark.parametrize(("case", "columns", "kept", "rejected"), CASES)
def test_cases(shared: Path, tmp_path: Path, case: str, columns: dict[str, Any], kept: int, rejected: dict[str, int]) -> None:
    path = shared / "cases/users" / case
    if not path.exists():
        pytest.skip(f"no case at {path}")
    config = PrepareConfig(columns=ColumnConfig(**columns))
    if not kept:
        with pytest.raises(NothingKept) as failure:
            prepare([str(path)], out=tmp_path / "C", config=config)
        assert failure.value.counts.rejected == rejected
        assert all(example["detail"] for shown in failure.value.data["examples"].values() for example in shown)
        assert not (tmp_path / "C").exists()
        return
    counts = prepare([str(path)], out=tmp_path / "C", config=config)
    assert (counts.kept, counts.rejected) == (kept, rejected)
    for row in table_rows(tmp_path / "C"):
        assert "\ufffd" not in "".join(row["captions"])
        assert row["key"] or row["detail"]
        assert not row["key"] or any(row["captions"]) or row["label"] is not None
