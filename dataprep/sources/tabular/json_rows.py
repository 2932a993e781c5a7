"""Read JSON files: an array of objects, COCO's images and annotations, objects by path, or one object per line.

The text of a file is held in memory; the rows of an array are parsed one by one. Use JSON lines or Parquet for very large files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipeline.corpus.json_record import Record, as_record, json_problem, parse_record
from pipeline.corpus.text_decoding import find_undecodable, open_text

JsonRow = tuple[int, "Record | str"]

_NEXT = re.compile(r"\}\s*,\s*(?=\{)")
_SPACE = re.compile(r"\s*")
_LINE_END = re.compile(r"\r\n|\r|\n")


def read_json(stream: BinaryIO, *, encoding: str = "") -> Iterator[JsonRow]:
    """(number of the element, from 1; the record, or its problem with the line number)

    After a damaged element of an array, reading continues with the next object.
    """
    opened, codec = open_text(stream, encoding=encoding)
    text = opened.read()

    def undecodable(part: str, *, line: int) -> str:
        problem = find_undecodable(part, codec=codec, is_stated=bool(encoding))
        return f"{problem} (of the value in line {line})" if problem else ""

    start = _skip_space(text, 0)
    if text.startswith("[", start):
        for number, (part, line, record) in enumerate(_elements(text, start=start + 1), start=1):
            yield number, undecodable(part, line=line) or record
    elif start < len(text):
        lines = _LINE_END.split(text)
        first = next(line for line in lines if line.strip())
        if isinstance(parse_record(first, line=1), dict) and sum(1 for line in lines if line.strip()) > 1:  # JSON lines
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, undecodable(line, line=number) or parse_record(line, line=number)
            return
        whole = undecodable(text, line=1) or parse_record(text, line=1)
        yield from enumerate(_rows_of(whole) if isinstance(whole, dict) else [whole], start=1)


def _elements(text: str, *, start: int) -> Iterator[tuple[str, int, Record | str]]:
    """(text, first line, record or problem) of each element of the array that opens before `start`."""
    decoder = json.JSONDecoder()
    line, counted, at = 1, 0, start
    known: set[str] = set()  # keys of the objects so far
    while True:
        at = _skip_space(text, at)
        line, counted = line + len(_LINE_END.findall(text, counted, at)), at
        if text.startswith("]", at):
            behind = _skip_space(text, at + 1)
            if behind < len(text):
                yield "", line, f"not JSON: more text behind the end of the array (line {line})"
            return
        if at == len(text):
            yield "", line, f"not JSON: the array breaks off (line {line})"
            return
        try:
            value, end = decoder.raw_decode(text, at)
            following = _skip_space(text, end)
            if following < len(text) and text[following] not in ",]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, following)
        except json.JSONDecodeError as error:
            inside = line + len(_LINE_END.findall(text, at, error.pos))
            yield "", line, json_problem(error, line=inside)
        except (ValueError, RecursionError) as error:
            yield "", line, f"not JSON: {error} (line {line})"
        else:
            known |= value.keys() if isinstance(value, dict) else set()
            yield text[at:end], line, as_record(value)
            at = following + text.startswith(",", following)
            continue
        resumed = _next_object(text, at, decoder=decoder, known=known)
        if resumed is None:
            return
        at = resumed


def _next_object(text: str, at: int, *, decoder: json.JSONDecoder, known: set[str]) -> int | None:
    """Position of the next element after a damaged one. Objects without a known key are parts of an element."""
    for found in _NEXT.finditer(text, at):
        try:
            value, _ = decoder.raw_decode(text, found.end())
        except (ValueError, RecursionError):
            return found.end()
        if not known or not known.isdisjoint(value):
            return found.end()
    return None


def _rows_of(whole: Record) -> Iterator[Record | str]:
    """Rows of a file that is one object."""
    images, annotations = whole.get("images"), whole.get("annotations")
    if _is_table(images) and isinstance(annotations, list):
        yield from _rows_of_coco(images or [], annotations)
        return
    tables = [value for value in whole.values() if _is_table(value)]
    if len(tables) == 1:
        yield from (as_record(row) for row in tables[0])
    elif whole and all(isinstance(value, (dict, str)) or _is_texts(value) for value in whole.values()):
        for path, value in whole.items():
            yield {"file_name": path, **value} if isinstance(value, dict) else {"file_name": path, "caption": value}
    else:
        yield "neither an array of objects, nor COCO's images and annotations, nor objects by path"


def _rows_of_coco(images: list[Any], annotations: list[Any]) -> Iterator[Record | str]:
    """One row per image, with its captions in order; then a problem for each group of captions without an image."""
    captions: dict[str, list[str]] = {}
    for annotation in annotations:
        if isinstance(annotation, dict) and isinstance(annotation.get("caption"), str):
            captions.setdefault(str(annotation.get("image_id")), []).append(annotation["caption"])
    known: set[str] = set()
    for image in images:
        if not isinstance(image, dict):
            yield as_record(image)
            continue
        key = str(image.get("id"))
        known.add(key)
        yield {**image, "captions": captions.get(key, [])}
    for key in captions:
        if key not in known:
            yield f"{len(captions[key])} caption(s) of image_id {key}, which is not among the images"


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
