"""Parse a JSON object, or describe the problem and its line."""

from __future__ import annotations

import json
from typing import Any

from pipeline.corpus.text_decoding import decode_text

Record = dict[str, Any]


def parse_json(payload: bytes | memoryview, *, encoding: str = "") -> Record | str:
    """The object in a JSON file, or a description of the problem. Raises UndecodableText."""
    return parse_record(decode_text(payload, encoding=encoding), line=1)


def parse_record(text: str, *, line: int) -> Record | str:
    """The object in a JSON text, or a description of the problem. `line`: the text's first line in its file."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return json_problem(error, line=line + error.lineno - 1)
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, too deep nesting
        return f"not JSON: {error} (line {line})"
    return as_record(value)


def as_record(value: Any) -> Record | str:
    """The value if it is an object, or a description of its type."""
    if isinstance(value, dict):
        return value
    kinds = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return f"not a JSON object but {kinds.get(type(value), 'null')}"


def json_problem(error: json.JSONDecodeError, *, line: int) -> str:
    """Describe a JSON error. `line`: its line in the file."""
    return f"not JSON: {error.msg} (line {line}, column {error.colno})"
