"""Prompts in files and on standard input."""

from __future__ import annotations

import codecs
import io
import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.sampling.prompts.prompt_files import read_prompts
from launch.sampling.prompts.rows import PromptRow

ROWS: list[dict[str, Any]] = [
    {"prompt": "a red fox", "size": "32x16", "seed": 5, "steps": 4, "guidance": 2.5, "negative": "a dog", "count": 2},
    {"prompt": 'a lake, with\n"trees"', "size": None, "seed": None, "steps": None, "guidance": None, "negative": None, "count": None},
    {"prompt": "", "size": "8x8", "seed": 2**63, "steps": 1, "guidance": 0.0, "negative": None, "count": None},
]
TEXTS = {name: pa.string() for name in ("prompt", "size", "negative")}
SCHEMA = pa.schema({**TEXTS, "seed": pa.uint64(), "steps": pa.int32(), "guidance": pa.float32(), "count": pa.int64()})


def read(source: object, *, stdin: bytes | None = None, known: tuple[str, ...] = ()) -> list[PromptRow]:
    remarks: list[str] = []
    rows = list(read_prompts(str(source), known=known, log=remarks.append, stdin=None if stdin is None else io.BytesIO(stdin)))
    assert not remarks, remarks
    return rows


def settings(row: PromptRow) -> dict[str, Any]:
    size = None if row.size is None else f"{row.size[1]}x{row.size[0]}"
    values = {name: getattr(row, name) for name in ("prompt", "seed", "steps", "guidance", "negative", "count")}
    return {**values, "size": size}


def file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(source: object, message: str, *, stdin: bytes | None = None) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(source, stdin=stdin)
    assert "\n" not in str(raised.value)
    assert "columns.encoding" not in str(raised.value)


def test_the_same_rows_from_every_table(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS, schema=SCHEMA), tmp_path / "a.parquet")
    file(tmp_path, "a.jsonl", lines)
    file(tmp_path, "a.json", json.dumps(ROWS))
    quoted = '"a lake, with\n""trees""",,,,,,'
    file(
        tmp_path,
        "a.csv",
        f"prompt,size,seed,steps,guidance,negative,count\na red fox,32x16,5,4,2.5,a dog,2\n{quoted}\n,8x8,{2**63},1.0,0,,\n",
    )
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        assert [settings(row) for row in read(tmp_path / name)] == ROWS, name
    assert [settings(row) for row in read("-", stdin=lines.encode())] == ROWS
    assert read(tmp_path / "a.jsonl")[1].place == f"{tmp_path / 'a.jsonl'}, line 2"


def test_missing_numbers_of_parquet_are_nan(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"], "seed": [1.0, float("nan")]}), tmp_path / "a.parquet")
    assert [row.seed for row in read(tmp_path / "a.parquet")] == [1, None]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_text_has_a_prompt_on_each_line(tmp_path: Path, mark: bytes) -> None:
    content = mark + '\r\na red fox, {"x"}\r\n\n  a lake 😀 \nprompt'.encode()
    for rows in (read(file(tmp_path, "a.txt", content)), read("-", stdin=content)):
        assert [(row.prompt, row.place.rpartition(" ")[2]) for row in rows] == [
            ('a red fox, {"x"}', "2"),
            ("a lake 😀", "4"),
            ("prompt", "5"),
        ]
    wide = "a fox\né".encode("utf-16")
    assert [row.prompt for row in read(file(tmp_path, "b.txt", wide))] == ["a fox", "é"]


def test_standard_input_is_json_only_if_its_first_line_is() -> None:
    assert [row.prompt for row in read("-", stdin=b"{a fox|a hen} on a hill\nnext")] == ["{a fox|a hen} on a hill", "next"]
    assert [row.prompt for row in read("-", stdin=b'\n{"prompt": "a"}\n{"class": 3}')] == ["a", 3]
    refused("-", "standard input, line 2: not JSON|standard input: not JSON", stdin=b'{"prompt": "a"}\nb')
    refused("-", "standard input: has no prompts", stdin=b" \n")


def test_sizes_of_rows(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "width": 100, "height": "50"},
        {"prompt": "b", "aspect": "21:9", "megapixels": 4},
        {"prompt": "c", "aspect": 2, "megapixels": "0.5"},
        {"prompt": "d", "size": "7×9"},
    ]
    path = file(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert [row.size for row in read(path)] == [(50, 100), (1341, 3128), (512, 1024), (9, 7)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"seed": 1}, "line 2: has no key prompt .*keys are 'seed'"),
        ({}, "line 2: has no key prompt .*keys are none"),
        ({"prompt": None}, "line 2: has no key prompt"),
        ({"prompt": 3}, "line 2: prompt is 3; expected a text"),
        ({"prompt": ["a"]}, "line 2: prompt is .*; expected a text"),
        ({"prompt": "a\ud800"}, "line 2: prompt: is not UTF-8 at character 1"),
        ({"prompt": "a", "class": 1}, "line 2: has the keys prompt and class"),
        ({"class": -1}, "line 2: class is -1"),
        ({"prompt": "a", "seed": -1}, "line 2: seed is -1; expected a whole number from 0 to"),
        ({"prompt": "a", "seed": 2**64}, "line 2: seed is"),
        ({"prompt": "a", "seed": "x"}, "line 2: seed is 'x'"),
        ({"prompt": "a", "seed": True}, "line 2: seed is True"),
        ({"prompt": "a", "steps": 0}, "line 2: steps is 0"),
        ({"prompt": "a", "steps": 1.5}, "line 2: steps is 1.5"),
        ({"prompt": "a", "steps": "1e3"}, "line 2: steps is '1e3'"),
        ({"prompt": "a", "count": 0}, "line 2: count is 0"),
        ({"prompt": "a", "guidance": "much"}, "line 2: guidance is 'much'"),
        ({"prompt": "a", "guidance": -1}, "line 2: guidance is -1"),
        ({"prompt": "a", "guidance": "inf"}, "line 2: guidance is 'inf'"),
        ({"prompt": "a", "guidance": 10**400}, "line 2: guidance is"),
        ({"prompt": "a", "negative": 1}, "line 2: negative is 1"),
        ({"prompt": "a", "size": "512"}, "line 2: size 512: '512' is not WIDTHxHEIGHT"),
        ({"prompt": "a", "size": "5000x5000"}, "line 2: size .* exceeds the maximum"),
        ({"prompt": "a", "size": "8x8,9x9"}, "line 2: size is .*expected one size"),
        ({"prompt": "a", "width": 8}, "line 2: has no key height; width and height go together"),
        ({"prompt": "a", "width": 0, "height": 8}, "line 2: width is 0"),
        ({"prompt": "a", "width": 10**6, "height": 10**6}, "line 2: width and height .* exceeds the maximum"),
        ({"prompt": "a", "width": 10**5, "height": 1}, "line 2: width and height 100000x1: width 100000: must be from 1 to 16384 pixels"),
        ({"prompt": "a", "size": "1x20000"}, "line 2: size 1x20000: height 20000: must be from 1 to 16384 pixels"),
        ({"prompt": "a", "aspect": "4096:1", "megapixels": 16}, "line 2: aspect 4096:1 with megapixels 16: width 262144: must be"),
        ({"prompt": "a", "aspect": "21:9"}, "line 2: has no key megapixels"),
        ({"prompt": "a", "aspect": "21;9", "megapixels": 1}, "line 2: aspect 21;9: expected WIDTH:HEIGHT"),
        ({"prompt": "a", "aspect": "21:9", "megapixels": 17}, "line 2: megapixels 17"),
        ({"prompt": "a", "size": "8x8", "width": 8}, "line 2: has the keys size and width; give one size"),
        ({"prompt": "a", "id": 1.5}, "line 2: id is 1.5"),
    ],
)
def test_a_bad_row_names_file_line_and_key(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = file(tmp_path, "a.jsonl", '{"prompt": "good"}\n' + json.dumps(row))
    refused(path, re.escape(f"{path}, ") + message)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "has no prompts"),
        ("a.txt", b" \n\n", "has no prompts"),
        ("a.csv", b"prompt,seed\n", "has no prompts"),
        ("a.jsonl", b"", "has no prompts"),
        ("a.json", b"[]", "has no prompts"),
        ("a.txt", b"fox\ncaf\xe9", "line 2: not UTF-8 at byte 3 .*save the file as UTF-8"),
        ("a.txt", b"fox\nn\0l", "line 2: has a NUL at character 1"),
        ("a.csv", b"prompt\nfox\ncaf\xe9", "line 3: not UTF-8 at byte 3"),
        ("a.csv", b"prompt\nfox\nn\0l", "line 3: a NUL at character 1"),
        ("a.csv", b"prompt,seed\nfox\n", "line 2: 1 columns where the header has 2"),
        ("a.csv", b"a fox\na lake\n", "line 2: has no key prompt .*keys are 'a fox'"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2: not JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n["b"]', "line 2: not a JSON object but an array"),
        ("a.jsonl", b'{"prompt": "caf\xe9"}', "line 1: not UTF-8"),
        ("a.json", b'[{"prompt": "a"}, 3]', "row 2: not a JSON object"),
        ("a.parquet", b"PAR1", "a.parquet"),
        ("a.md", b"a", r"expected a file that ends with \.txt"),
        ("a", b"a", r"expected a file that ends with \.txt"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = file(tmp_path, name, content)
    refused(path, re.escape(str(path)) + f".*{message}|{message}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.csv", "no such file of prompts")
    refused(tmp_path, "has no prompts")


def test_unused_columns_are_remarked_once(tmp_path: Path) -> None:
    remarks: list[str] = []
    path = file(tmp_path, "a.csv", "prompt,sedd,tag,colour\na,1,x,red\nb,2,y,blue\n")
    rows = list(read_prompts(str(path), known=["tag"], log=remarks.append))
    assert remarks == [
        f"{path}, line 2: key 'sedd' is not used (did you mean seed?)",
        f"{path}, line 2: key 'colour' is not used",
    ]
    assert rows[1].record["tag"] == "y"


def test_a_huge_file_is_read_as_it_is_needed() -> None:
    class Endless(io.RawIOBase):
        """Prompts without end."""

        def readable(self) -> bool:
            return True

        def read(self, size: int = -1) -> bytes:
            assert size > 0
            return (b"a fox\n" * (size // 6 + 1))[:size]

    rows = islice(read_prompts("-", log=print, stdin=Endless()), 1000)  # pyright: ignore[reportArgumentType]
    assert sum(1 for _ in rows) == 1000


def test_prompts_of_dpg_bench_are_files_of_a_folder(tmp_path: Path) -> None:
    file(tmp_path, "b.txt", "a lake\nwith trees\n")
    file(tmp_path, "a.txt", "a fox")
    file(tmp_path, "notes.md", "")
    assert [(row.id, row.prompt) for row in read(tmp_path)] == [("a", "a fox"), ("b", "a lake\nwith trees")]
