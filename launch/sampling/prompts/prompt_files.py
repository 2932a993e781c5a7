"""Read prompts from files and standard input.

| source | prompts |
| --- | --- |
| FILE.txt | one on each line; blank lines are left out |
| FILE.jsonl, .json, .csv, .tsv, .parquet, .arrow (texts also .gz, .zst) | one in each row, with settings in further columns |
| `-` | standard input: like .jsonl if the first line is a JSON object, else like .txt |
| a folder | one in each FILE.txt, in the order of their names, which are their ids; as DPG-Bench has them |

Rows are read as they are needed, those of .json at once. A byte order mark is recognised; without one, texts are UTF-8.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import BinaryIO

from launch.sampling.prompts.rows import KEYS, PromptRow, prompt_row
from pipeline.corpus.json_record import parse_record
from pipeline.corpus.text_decoding import find_undecodable, open_text
from pipeline.storage.remote import is_remote

STANDARD_INPUT = "-"
MAX_LINE = 16 << 20  # characters
_ENCODING = "utf-8"  # stated, so that messages do not advise the options of `tim prepare`
_SUFFIXES = ".txt, .jsonl, .json, .csv, .tsv or .parquet"


def read_prompts(
    source: str, *, known: Collection[str] = (), log: Callable[[str], None], stdin: BinaryIO | None = None
) -> Iterator[PromptRow]:
    """Read the prompts of a file, a folder, a URL or `-`, one by one.

    Args:
        known: columns that are used besides `KEYS`; the other ones get a remark each.
        log: receives remarks.
        stdin: instead of standard input.

    Raises:
        ValueError: no such file, an unknown kind, no prompts, or a row that is damaged or not valid; names file, line and key.
    """
    unused: set[str] = set()
    is_empty = True
    for row in _rows(source, stdin=stdin):
        is_empty = False
        for key in row.record:
            if key not in KEYS and key not in known and key not in unused:
                unused.add(key)
                near = difflib.get_close_matches(str(key), KEYS, n=1)
                log(f"{row.place}: key {key!r} is not used{f' (did you mean {near[0]}?)' if near else ''}")
        yield row
    if is_empty:
        raise ValueError(f"{_name(source)}: has no prompts")


def _rows(source: str, *, stdin: BinaryIO | None) -> Iterator[PromptRow]:
    if source == STANDARD_INPUT:
        return _rows_of_text(stdin or sys.stdin.buffer, name=_name(source), may_be_json=True)
    if is_remote(source):
        return _rows_of_table(source)
    path = Path(source)
    if path.is_dir():
        return _rows_of_folder(path)
    if not path.exists():
        raise ValueError(f"{source}: no such file of prompts")
    return _rows_of_txt(path) if path.suffix.lower() == ".txt" else _rows_of_table(source)


def _rows_of_txt(path: Path) -> Iterator[PromptRow]:
    with open(path, "rb") as stream:
        yield from _rows_of_text(stream, name=str(path), may_be_json=False)


def _rows_of_text(stream: BinaryIO, *, name: str, may_be_json: bool) -> Iterator[PromptRow]:
    is_json: bool | None = None if may_be_json else False
    for number, line in _lines(stream, name=name):
        place = f"{name}, line {number}"
        if is_json is None:
            is_json = line.startswith("{") and isinstance(parse_record(line, line=number), dict)
        if not is_json:
            yield PromptRow(line, place)
            continue
        record = parse_record(line, line=number)
        if isinstance(record, str):
            raise ValueError(f"{name}: {record}" if "(line " in record else f"{place}: {record}")
        yield prompt_row(record, place=place)


def _lines(stream: BinaryIO, *, name: str) -> Iterator[tuple[int, str]]:
    """(number from 1, text without white space at its ends) of each line that is not blank."""
    text, codec = open_text(stream, encoding=_ENCODING)
    number = 0
    while line := text.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise ValueError(f"{name}, line {number}: has more than {MAX_LINE:,} characters")
        if problem := find_undecodable(line, codec=codec, is_stated=True):
            raise ValueError(f"{name}, line {number}: {problem}; save the file as UTF-8")
        if "\0" in line:
            raise ValueError(f"{name}, line {number}: has a NUL at character {line.index(chr(0))}; save the file as UTF-8 text")
        if line.strip():
            yield number, line.strip()


def _rows_of_table(source: str) -> Iterator[PromptRow]:
    from dataprep.sources.tabular.tables import COLUMNAR, Table, kind_of  # imports pyarrow

    kind = kind_of(source)
    if kind is None:
        raise ValueError(f"{source}: expected a file that ends with {_SUFFIXES}, a folder of .txt files, or - for standard input")
    unit = "row" if kind in COLUMNAR or kind == "json" else "line"
    table = Table(source, encoding=_ENCODING)
    if table.problem and kind in COLUMNAR:  # rows of texts come with the lines of their problems
        raise ValueError(f"{source}: {table.problem}")
    for number, record in table.rows():
        place = f"{source}, {unit} {number}"
        if isinstance(record, str):
            raise ValueError(f"{place}: {record}")
        yield prompt_row(record, place=place)


def _rows_of_folder(folder: Path) -> Iterator[PromptRow]:
    for path in sorted(folder.glob("*.txt")):
        with open(path, "rb") as stream:
            text = "\n".join(line for _, line in _lines(stream, name=str(path)))
        yield PromptRow(text, str(path), id=path.stem)


def _name(source: str) -> str:
    return "standard input" if source == STANDARD_INPUT else source
