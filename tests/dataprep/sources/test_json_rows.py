"""JSON files as lists: arrays, COCO, objects by path, and what is wrong with broken ones."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataprep.sources.open import open_sources
from dataprep.sources.tabular.json_rows import read_json
from dataprep.sources.tabular.tables import read_jsonl

ROWS = [{"image": f"{number}.jpg", "caption": f"c{number}", "nested": [{"a": 1}, {"b": 2}]} for number in range(4)]


def records(text: str | bytes, **told: Any) -> list[Any]:
    return [record for _, record in read_json(io.BytesIO(text.encode() if isinstance(text, str) else text), **told)]


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.lists(st.text())), max_size=5), st.integers(0, 3))
def test_arrays_are_read_element_by_element(rows: list[dict[str, Any]], indent: int) -> None:
    assert records(json.dumps(rows, indent=indent or None)) == rows


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "cp1252"])
def test_encodings(codec: str) -> None:
    text = json.dumps([{"image": "a.jpg", "caption": "café"}], ensure_ascii=False)
    assert records(text.encode(codec), encoding="cp1252")[0]["caption"] == "café"
    if codec == "cp1252":
        [problem] = records(text.encode(codec))
        assert problem.startswith("not UTF-8 at byte")


def test_a_broken_element_costs_itself_and_its_line_is_named() -> None:
    lines = [json.dumps(row) for row in ROWS]
    lines[1] = lines[1].replace(":", "", 1)
    found = records("[\n" + ",\n".join(lines) + "\n]\n")
    assert found[0] == ROWS[0]
    assert found[2:] == ROWS[2:]
    assert found[1].startswith("not JSON: Expecting ':' delimiter (line 3, column ")
    cut = records("[\n" + ",\n".join(json.dumps(row) for row in ROWS[:2]))
    assert cut[:2] == ROWS[:2]
    assert cut[2] == "not JSON: the array breaks off (line 3)"
    assert records('["a", {"image": "b.jpg"}, 3]') == [
        "not a JSON object but a string",
        {"image": "b.jpg"},
        "not a JSON object but a number",
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_ends_in_anything_but_rows(data: st.DataObject) -> None:
    text = bytearray(json.dumps(ROWS, indent=1).encode())
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] = data.draw(st.integers(0, 255))
    found = records(bytes(text))
    assert found
    assert all(isinstance(record, (dict, str)) for record in found)


def test_json_lines_name_their_line() -> None:
    rows = [record for _, record in read_jsonl(io.BytesIO(b'{"a": 1}\r\n\r{"a" 2}\n[1]\n{"a": "\xff"}'))]
    assert rows[0] == {"a": 1}
    assert str(rows[1]).endswith("(line 3, column 6)")
    assert rows[2] == "not a JSON object but an array"
    assert str(rows[3]).startswith("not UTF-8 at byte 7")
    assert records('{"a": 1}\n{"a": 2}\n') == [{"a": 1}, {"a": 2}]  # JSON lines by another name
    marked = [record for _, record in read_jsonl(io.BytesIO('{"a": "é"}\n{"a": 2}'.encode("utf-16")))]
    assert marked == [{"a": "é"}, {"a": 2}]


def test_coco() -> None:
    whole = {
        "info": {},
        "images": [{"id": 7, "file_name": "7.jpg", "height": 4}, {"id": 8, "file_name": "8.jpg"}],
        "annotations": [{"image_id": 7, "caption": "one"}, {"image_id": 9, "caption": "lost"}, {"image_id": 7, "caption": "two"}],
    }
    first, second, lost = records(json.dumps(whole))
    assert (first["file_name"], first["captions"], second["captions"]) == ("7.jpg", ["one", "two"], [])
    assert lost == "1 caption(s) of image_id 9, which is not among the images"


def test_objects_by_path(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("0.jpg", "1.png"):
        (tmp_path / "set" / name).write_bytes(b"1")
    said = {"set/0.jpg": {"caption": "zero", "tags": "a, b"}, "set/1": {"caption": "one"}, "gone.jpg": {"caption": "two"}}
    (tmp_path / "set/meta_cap.json").write_text(json.dumps(said))
    [source] = open_sources([str(tmp_path / "set/meta_cap.json")])
    assert [(sample.file.removeprefix(f"{tmp_path}/"), sample.captions) for sample in source.samples()] == [
        ("set/0.jpg", ("zero",)),
        ("set/1.png", ("one",)),
        ("set/gone.jpg", ("two",)),
    ]
    assert records('{"a.jpg": "text"}') == [{"file_name": "a.jpg", "caption": "text"}]
    assert records('{"data": [{"a": 1}]}') == [{"a": 1}]
    assert records('{"a": 1}') == ["neither an array of objects, nor COCO's images and annotations, nor objects by path"]
