"""Write docs/configuration.md: every setting, from the schemas and the docstrings under their fields.

python docs/make_configuration.py            # from the repository's root
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dataprep.features.encoders import EncodeConfig
from dataprep.job import PrepareConfig
from dataprep.sidecars.score import ScoreConfig
from launch.config.recipes import recipe_names, recipe_summary
from launch.config.schema import Config

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
# Configuration

<!-- Written by `python docs/make_configuration.py` from the schemas. Do not edit: change the docstrings, then run it again. -->

A configuration is one YAML file (YAML 1.2). Any value can be replaced on the command line: `key.sub=value`, where the value is YAML, too
(`plan.max_tokens=256`; with brackets or spaces in quotation marks for the shell: `"text.caption_weights=[2,1]"`). Later values replace
earlier ones.

A misspelt key or an impossible value is an error with exit code 2. It names the key, the file, the line and the nearest valid key.

Sections below: [training](#training), [preparation](#preparation), [scores](#scores), [encoding](#encoding).
"""
PARTS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("Training", "For `tim plan CONFIG`, `tim train CONFIG` and `tim launch CONFIG`; `tim encode --for CONFIG` reads it, too.", Config),
    ("Preparation", "For `tim prepare`: `--config FILE`, or `key=value` after the sources.", PrepareConfig),
    ("Scores", "For `tim score CORPUS`: `--config FILE`, or `key=value` after the corpus.", ScoreConfig),
    ("Encoding", "For `tim encode CORPUS`: `key=value` after the corpus. `--for CONFIG` takes them from a training config.", EncodeConfig),
)
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
HUGE = 2**63  # the bound of a 64-bit number says nothing to a reader
PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", NoneType: "null"}


def page() -> str:
    """The text of docs/configuration.md."""
    return "\n".join([INTRODUCTION, *(line for part in PARTS for line in _part(*part))]).rstrip("\n") + "\n"


def field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """The docstrings under the fields of a model, by field; pydantic reads them with `use_attribute_docstrings`."""
    return {name: field.description for name, field in model.model_fields.items() if field.description}


def _part(title: str, use: str, model: type[BaseModel]) -> Iterator[str]:
    yield from (f"## {title}", "", use, "")
    if model is Config:
        yield from ("A recipe's name stands for its file (`tim recipes`):", "", "| recipe | what it is |", "| --- | --- |")
        for name in recipe_names():
            yield f"| [`{name}`](../configs/{name}.yaml) | {_cell(recipe_summary(name))} |"
        yield ""
    yield from _section(model, prefix="", shown={})


def _section(model: type[BaseModel], *, prefix: str, shown: dict[type[BaseModel], str]) -> Iterator[str]:
    """The settings of a model as a table, then those of the sections in it. `shown`: models that have a table already, and where."""
    if prefix:
        yield from (f"### `{prefix}`", "")
    if model in shown:
        yield from (f"The same settings as in `{shown[model]}`.", "")
        return
    shown[model] = prefix
    if "__doc__" in vars(model) and model.__doc__ and not model.__doc__.startswith("!!!"):
        yield from (inspect.cleandoc(model.__doc__), "")
    texts = field_docstrings(model)
    heads = ("key", "value", "default", "meaning")[: 4 if texts else 3]
    yield from ("| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |")
    for name, field in model.model_fields.items():
        cells = (f"`{name}`", _type(field.annotation, limits=_limits(field.metadata)), _default(field), texts.get(name, ""))
        yield "| " + " | ".join(map(_cell, cells[: len(heads)])) + " |"
    yield ""
    for name, field in model.model_fields.items():
        for inner, repeated in _sections_in(field.annotation):
            yield from _section(inner, prefix=f"{prefix}{'.' * bool(prefix)}{name}{repeated}", shown=shown)


def _sections_in(annotation: Any, repeated: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """The models in a type; with "[]" where there is a list of them, ".NAME" where they are named."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, repeated
        return
    origin = get_origin(annotation)
    mark = {tuple: "[]", list: "[]", dict: ".NAME"}.get(origin, "") if isinstance(origin, type) else ""
    for inner in get_args(annotation):
        yield from _sections_in(inner, repeated + mark)


def _type(annotation: Any, *, limits: str = "") -> str:
    """A type in words. `limits`: of the value, if it is not null."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in PLAIN:
        return PLAIN[annotation] + limits * (annotation is not NoneType)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    if origin is Annotated:
        return _type(inner[0], limits=_limits([each for field in inner[1:] for each in getattr(field, "metadata", [field])]))
    if origin is Literal:
        return ", ".join(f"`{json.dumps(value).strip(chr(34))}`" for value in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type(each, limits=limits) for each in inner)
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"list of {len(inner)}: {' and '.join(dict.fromkeys(map(_type, inner)))}"
    if origin in (tuple, list):
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return "mapping" if inner[1] is Any else f"names, each with: {_type(inner[1])}"
    raise TypeError(f"no words for the type {annotation}")


def _limits(metadata: list[Any]) -> str:
    found = {name: getattr(limit, name) for limit in metadata for name in SIGNS if getattr(limit, name, None) is not None}
    if {"ge", "le"} <= found.keys():
        return f" from {found['ge']:g} to {found['le']:,}"
    return "".join(f" {SIGNS[name]} {limit:,}" for name, limit in found.items() if limit < HUGE)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value, default=str, ensure_ascii=False)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
