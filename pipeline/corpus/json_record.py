"""The object that a JSON text holds, or what is wrong with the text and in which line."""

from __future__ import annotations

import json
from typing import Any

from pipeline.corpus.text_decoding import decode_text

Record = dict[str, Any]


def parse_json(payload: bytes | memoryview, *, encoding: str = "") -> Record | str:
    """The object in a JSON file, or what is wrong with it. Raises UndecodableText."""
    return parse_record(decode_text(payload, encoding=encoding), line=1)


def parse_record(text: str, *, line: int) -> Record | str:
    """The object that a text holds, or what is wrong with it. `line`: the line of the file that the text begins in."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return json_problem(error, line=line + error.lineno - 1)
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        return f"not JSON: {error} (line {line})"
    return as_record(value)


def as_record(value: Any) -> Record | str:
    """The value itself if it is an object, or what it is instead."""
    if isinstance(value, dict):
        return value
    kinds = {list: "an array", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return f"not a JSON object but {kinds.get(type(value), 'null')}"


def json_problem(error: json.JSONDecodeError, *, line: int) -> str:
    """What is wrong with a text. `line`: that of the file."""
    return f"not JSON: {error.msg} (line {line}, column {error.colno})"
