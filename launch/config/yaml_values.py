"""YAML 1.2 core schema for configurations, read and written.

PyYAML implements YAML 1.1, in which `off`, `no` and `yes` are booleans, `010` is 8, `1:30` is 90, dates are not strings, and `1e-4` is not
a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
)
_RESOLVERS = (  # (type, pattern, first characters): the first match wins
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("merge", re.compile(r"<<"), "<"),
)
_BASES = {"0o": 8, "0x": 16}


class Loader(yaml.SafeLoader):
    """Safe loader with the YAML 1.2 core schema. Underscores between digits are allowed; mapping keys are always strings."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != f"{_TAG}merge":
                name.tag = f"{_TAG}str"
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that also quotes strings that YAML 1.2 reads as numbers, and escapes all line breaks except \\n."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(mark in data for mark in "\r\x85\u2028\u2029") else None
        return self.represent_scalar(f"{_TAG}str", data, style=style)


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, _BASES.get(text[:2], 10))


Loader.yaml_implicit_resolvers = {}  # remove those of YAML 1.1
for _name, _pattern, _first in _RESOLVERS:
    _full_match = re.compile(rf"(?:{_pattern.pattern})\Z")
    Loader.add_implicit_resolver(f"{_TAG}{_name}", _full_match, list(_first))
    if _name in ("int", "float"):
        _Dumper.add_implicit_resolver(f"{_TAG}{_name}", _full_match, list(_first))
Loader.add_constructor(f"{_TAG}int", _construct_int)
_Dumper.add_representer(str, _Dumper.represent_str)


def dump(values: Any) -> str:
    """Dump plain values as YAML, keeping their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def scalars(node: yaml.Node, key: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield (key, source text) of all plain scalars that are neither strings nor null."""
    if isinstance(node, yaml.ScalarNode):
        if node.style is None and node.tag not in (f"{_TAG}str", f"{_TAG}null"):
            yield key, node.value
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from scalars(value, (*key, name.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from scalars(item, (*key, index))
