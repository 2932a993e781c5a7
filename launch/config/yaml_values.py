"""YAML as configurations use it: the core schema of YAML 1.2, read and written.

PyYAML reads YAML 1.1, where `off`, `no` and `yes` are truth values, `010` is 8, `1:30` is 90, a date is no text, and `1e-4` is no number.
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
_RESOLVERS = (  # (type, pattern, first characters): the first that matches counts
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("merge", re.compile(r"<<"), "<"),
)
_BASES = {"0o": 8, "0x": 16}


class Loader(yaml.SafeLoader):
    """YAML's safe loader with the core schema of YAML 1.2. Underscores between digits are allowed; keys of mappings are always texts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.tag != f"{_TAG}merge":
                name.tag = f"{_TAG}str"
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, which also quotes texts that only YAML 1.2 takes for numbers, and escapes all line breaks but \\n."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(mark in data for mark in "\r\x85\u2028\u2029") else None
        return self.represent_scalar(f"{_TAG}str", data, style=style)


def _construct_int(loader: Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return int(text, _BASES.get(text[:2], 10))


Loader.yaml_implicit_resolvers = {}  # none of YAML 1.1's
for _name, _pattern, _first in _RESOLVERS:
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    Loader.add_implicit_resolver(f"{_TAG}{_name}", _whole, list(_first))
    if _name in ("int", "float"):
        _Dumper.add_implicit_resolver(f"{_TAG}{_name}", _whole, list(_first))
Loader.add_constructor(f"{_TAG}int", _construct_int)
_Dumper.add_representer(str, _Dumper.represent_str)


def dump(values: Any) -> str:
    """Plain values as YAML, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def scalars(node: yaml.Node, key: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(key, text as it was written) of all plain values that are neither text nor null already."""
    if isinstance(node, yaml.ScalarNode):
        if node.style is None and node.tag not in (f"{_TAG}str", f"{_TAG}null"):
            yield key, node.value
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from scalars(value, (*key, name.value))
    elif isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            yield from scalars(item, (*key, place))
