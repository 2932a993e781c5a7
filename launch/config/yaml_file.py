"""Read YAML files and `key.sub=value` overrides, and validate them against a pydantic schema.

Every problem is a one-line `ConfigError` with the location (file and line, or the command line), the key, the problem, and the nearest
valid key. Validation is strict: strings are not converted to numbers. Where a string is expected, the source text is used unchanged,
even if YAML would read a number: `name: 1e5`, `run_dir=2024`.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from launch.config.yaml_values import Loader, scalars
from launch.config.yaml_values import dump as dump_yaml

Key = tuple[str | int, ...]
Schema = TypeVar("Schema", bound=BaseModel)

COMMAND_LINE = "command line"
STRINGS = ("string_type", "path_type")
_TRUTHS = {"yes": True, "on": True, "no": False, "off": False}


class ConfigError(ValueError):
    """An invalid configuration. The message is one line."""


class ConfigConflict(ValueError):
    """An invalid combination of values. `key` is the dotted key that is reported, the message gives the reason."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(slots=True)
class RawConfig:
    """A configuration before validation: plain values, the location of each key (`file:line` or `command line`), and the source text of
    values that are not strings."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[Key, str] = field(default_factory=dict)
    source_texts: dict[Key, str] = field(default_factory=dict)

    def location(self, key: Key) -> str:
        """Location of a key, or of its nearest enclosing section that has one."""
        return next((self.locations[key[:end]] for end in range(len(key), 0, -1) if key[:end] in self.locations), self.name)


def read(path: Path | None, *, overrides: Sequence[str] = ()) -> RawConfig:
    """Read a YAML file, if there is one, and apply `key.sub=value` overrides.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, a key is given twice, or an override has no `=`.
    """
    raw = RawConfig(name=str(path) if path else COMMAND_LINE)
    if path is not None:
        _read_file(path, raw)
    for override in overrides:
        _apply_override(override, raw)
    return raw


def check(raw: RawConfig, schema: type[Schema]) -> Schema:
    """Validate against the schema. Raises a one-line `ConfigError` for the first problem in file order."""
    try:
        try:
            return _validate(raw.values, schema)
        except ValidationError as problems:
            if not _restore_source_texts(raw, problems):
                raise
            return _validate(raw.values, schema)
    except ValidationError as problems:
        first, *others = sorted(problems.errors(), key=lambda problem: _problem_order(raw, problem))
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(_explain(raw, schema, first) + more) from None


def conflict_error(raw: RawConfig, conflict: ConfigConflict) -> ConfigError:
    """One-line error for a conflict that is found after validation."""
    return ConfigError(f"{raw.location(tuple(conflict.key.split('.')))}: {conflict.key}: {conflict}")


def dump(config: BaseModel) -> str:
    """Dump a configuration as YAML, including defaults."""
    return dump_yaml(config.model_dump(mode="json"))


def _validate(values: dict[str, Any], schema: type[Schema]) -> Schema:
    return schema.model_validate_json(json.dumps(values), strict=True)


def _read_file(path: Path, raw: RawConfig) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {error}") from None
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:{node.start_mark.line + 1}: a configuration is a mapping of `key: value`")
        for key, location in _walk(node, path):
            if key in raw.locations:
                raise ConfigError(f"{location}: {_dotted(key)}: given twice; first at {raw.locations[key]}")
            raw.locations[key] = location
        raw.source_texts.update(scalars(node))
        raw.values = loader.construct_document(node)
        json.dumps(raw.values)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except TypeError as error:
        raise ConfigError(f"{path}: a configuration holds only strings, numbers, lists and mappings: {error}") from None
    finally:
        loader.dispose()


def _walk(node: yaml.Node, path: Path, key: Key = ()) -> Iterator[tuple[Key, str]]:
    if isinstance(node, yaml.MappingNode):
        children: list[tuple[str | int, yaml.Node, yaml.Node]] = [(name.value, name, value) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, item, item) for index, item in enumerate(node.value)]
    else:
        return
    for name, marked, value in children:
        yield (*key, name), f"{path}:{marked.start_mark.line + 1}"
        yield from _walk(value, path, (*key, name))


def _apply_override(override: str, raw: RawConfig) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not of the form key=value (sections with dots: train.steps=100)")
    key = tuple(dotted.strip().split("."))
    try:
        value = yaml.load(text, Loader=Loader)
        json.dumps(value)
        node = yaml.compose(text, Loader=Loader)
    except (yaml.YAMLError, TypeError):
        raise ConfigError(
            f"{COMMAND_LINE}: {dotted}: {text!r} is not a YAML value; quote strings that contain : or other special characters"
        ) from None
    section = raw.values
    for depth, name in enumerate(key[:-1], start=1):
        inner = section.get(name)
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, dict):
            outer = ".".join(key[:depth])
            raise ConfigError(f"{COMMAND_LINE}: {dotted}: {outer} is not a section here ({raw.location(key[:depth])})")
        section = inner
    section[key[-1]] = value
    for known in [known for known in raw.locations if known[: len(key)] == key]:
        del raw.locations[known]
    for known in [known for known in raw.source_texts if known[: len(key)] == key]:
        del raw.source_texts[known]
    raw.locations[key] = COMMAND_LINE
    if node is not None:
        raw.source_texts.update(scalars(node, key))


def _restore_source_texts(raw: RawConfig, problems: ValidationError) -> bool:
    """Restore source texts where the schema expects strings, and read yes, no, on and off where it expects booleans.

    Returns whether a value changed.
    """
    is_changed = False
    for problem in problems.errors():
        key = _without_union_types(problem["loc"])
        key = next((key[:end] for end in range(len(key), 0, -1) if key[:end] in raw.source_texts), key)
        text = raw.source_texts.get(key, "")
        is_choice = problem["type"] == "literal_error" and repr(text) in problem.get("ctx", {}).get("expected", "")
        if problem["type"] == "bool_type" and isinstance(problem["input"], str) and problem["input"].lower() in _TRUTHS:
            _put(raw.values, key, _TRUTHS[problem["input"].lower()])
        elif text and (problem["type"] in STRINGS or is_choice):
            _put(raw.values, key, text)
        else:
            continue
        is_changed = True
    return is_changed


def _put(values: dict[str, Any], key: Key, value: Any) -> None:
    section: Any = values
    for name in key[:-1]:
        section = section[name]
    section[key[-1]] = value


def _without_union_types(location: tuple[int | str, ...]) -> Key:
    """Location of a problem without the type names that pydantic adds for unions."""
    return tuple(part for part in location if not (isinstance(part, str) and re.search(r"[\[\]() ]", part)))


def _problem_order(raw: RawConfig, problem: ErrorDetails) -> tuple[int, int]:
    """Sort key: unknown keys first (a typo also makes the right key missing), then file order."""
    location = raw.location(_problem_key(problem, raw))
    line = int(location.rpartition(":")[2]) if location != COMMAND_LINE and location.rpartition(":")[2].isdigit() else 0
    return (0 if problem["type"] == "extra_forbidden" else 1, line)


def _problem_key(problem: ErrorDetails, raw: RawConfig) -> Key:
    """The key to report: a validator may name one, or mention one in its message."""
    key = _without_union_types(problem["loc"])
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigConflict):
        return (*key, *cause.key.split("."))
    if isinstance(cause, ValueError):
        mentioned = [name for name in re.findall(r"[a-z_]+", str(cause)) if (*key, name) in raw.locations]
        return (*key, *mentioned[:1])
    return key


def _explain(raw: RawConfig, schema: type[BaseModel], problem: ErrorDetails) -> str:
    key = _problem_key(problem, raw)
    where = raw.location(key)
    if problem["type"] == "extra_forbidden":
        return f"{where}: {_dotted(key)}: unknown key; {_nearest(schema, key)}"
    if problem["type"] == "missing":
        return f"{where}: {_dotted(key)}: missing; give it in the file, or as {_dotted(key)}=VALUE on the command line"
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ValueError):
        return f"{where}: {_dotted(key) or 'configuration'}: {cause}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where}: {_dotted(key)}: {message}, got {_shorten(problem['input'])}"


def _nearest(schema: type[BaseModel], key: Key) -> str:
    """Suggest the valid key nearest to an unknown one: in its section, else anywhere; otherwise list the section's keys."""
    name, section = str(key[-1]), key[:-1]
    siblings = _keys_at(schema, section)
    close = difflib.get_close_matches(name, siblings, n=1)
    if close:
        return f"did you mean {_dotted((*section, close[0]))}?"
    everywhere = list(_all_keys(schema))
    close = difflib.get_close_matches(name, [str(path[-1]) for path in everywhere], n=1, cutoff=0.8)
    if close:
        return f"did you mean {' or '.join(_dotted(path) for path in everywhere if path[-1] == close[0])}?"
    return f"valid keys here: {', '.join(siblings)}"


def nearest_of(name: str, known: Sequence[str]) -> str:
    """Suggest the nearest known name, or list all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"available: {', '.join(known) or 'none'}"


def _keys_at(schema: type[BaseModel], section: Key) -> list[str]:
    model: type[BaseModel] | None = schema
    is_name = False  # part is a user-chosen name: the key of a mapping
    for part in section:
        if isinstance(part, int) or model is None or is_name:
            is_name = False
            continue
        field_info = model.model_fields.get(part)
        model = _model_in(field_info.annotation) if field_info else None
        is_name = field_info is not None and typing.get_origin(field_info.annotation) is dict
    return list(model.model_fields) if model else []


def _all_keys(schema: type[BaseModel], prefix: Key = ()) -> Iterator[Key]:
    for name, field_info in schema.model_fields.items():
        yield (*prefix, name)
        inner = _model_in(field_info.annotation)
        if inner:
            yield from _all_keys(inner, (*prefix, name))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model inside an annotation such as `Section | None` or `tuple[Section, ...]`."""
    if typing.get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in typing.get_args(annotation) if (model := _model_in(part))), None)


def _dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
