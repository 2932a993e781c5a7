"""The page at /docs: the OpenAPI schema as one HTML document, without scripts and without a request to another server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
}


class Field(NamedTuple):
    """A parameter of a path or query, or a key of an object."""

    name: str
    kind: str
    is_required: bool
    default: Any
    description: str


class Operation(NamedTuple):
    """A method of a path. body: name of the schema of its body; answer: of its answer."""

    method: str
    path: str
    description: str
    parameters: tuple[Field, ...]
    body: str
    answer: str


def reference_page(schema: Mapping[str, Any], *, base: str) -> str:
    """The page of an OpenAPI 3.1 schema. base: URL of the server, for the example."""
    loader = PackageLoader("launch.serving", package_path="")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    known = schema.get("components", {}).get("schemas", {})
    objects = {name: (each.get("description", ""), list(_keys(each))) for name, each in known.items() if "properties" in each}
    template = environment.get_template("reference.html.jinja")
    return template.render(base=base, info=schema["info"], operations=list(_operations(schema)), objects=objects)


def _operations(schema: Mapping[str, Any]) -> Iterator[Operation]:
    for path, methods in schema["paths"].items():
        for method, each in methods.items():
            parameters = tuple(_parameter(one) for one in each.get("parameters", ()))
            body = _content(each.get("requestBody", {}))
            yield Operation(method.upper(), path, each.get("description", ""), parameters, body, _content(each["responses"]["200"]))


def _parameter(one: Mapping[str, Any]) -> Field:
    schema = one["schema"]
    return Field(one["name"], _kind(schema), one.get("required", False), schema.get("default"), one.get("description", ""))


def _content(described: Mapping[str, Any]) -> str:
    for media, each in described.get("content", {}).items():
        return _kind(each["schema"]) if each.get("schema") and media == "application/json" else media
    return ""


def _keys(schema: Mapping[str, Any]) -> Iterator[Field]:
    required = schema.get("required", ())
    for name, each in schema["properties"].items():
        yield Field(name, _kind(each), name in required, each.get("default"), each.get("description", ""))


def _kind(schema: Mapping[str, Any]) -> str:
    """A type in words: "integer ≥ 1, or array of integer ≥ 1"."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "anyOf" in schema:
        return ", or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    bounds = [text.format(f"{schema[name]:,}") for name, text in _BOUNDS.items() if name in schema]
    items = f" of {_kind(schema['items'])}" if "items" in schema else ""
    return " ".join([schema.get("type", "any") + items, *bounds])
