"""YAML files and `key.sub=value` overrides, checked against a pydantic schema.

Every problem is a `ConfigError` of one line that says where (file and line, or the command line), which key, what is wrong
with it, and the nearest valid key. Validation is strict: a text is not taken for a number. Where a text is wanted, a value counts as it was
written, whatever YAML makes of it: `name: 1e5`, `run_dir=2024`.
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
    """A configuration that cannot be used; the message is one line for people."""


class ConfigConflict(ValueError):
    """A combination of values that a schema refuses: `key` is the dotted key to blame, the message says why."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


@dataclass(slots=True)
class Written:
    """A configuration as somebody wrote it: plain values, where each key stands (`file:line` or `command line`), and the source text of
    values that are not text."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    texts: dict[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """Where a key stands, or else the nearest section around it that was written down."""
        return next((self.places[key[:end]] for end in range(len(key), 0, -1) if key[:end] in self.places), self.name)


def read(path: Path | None, *, overrides: Sequence[str] = ()) -> Written:
    """Read a YAML file (or nothing) and lay `key.sub=value` overrides over it.

    Raises:
        ConfigError: the file is missing or is not a mapping in YAML, a key is given twice, an override has no `=`.
    """
    written = Written(name=str(path) if path else COMMAND_LINE)
    if path is not None:
        _read_file(path, written)
    for override in overrides:
        _lay_over(override, written)
    return written


def check(written: Written, schema: type[Schema]) -> Schema:
    """Validate against the schema; the first problem, in the order of the file, becomes a one-line `ConfigError`."""
    try:
        try:
            return _validate(written.values, schema)
        except ValidationError as problems:
            if not _take_as_written(written, problems):
                raise
            return _validate(written.values, schema)
    except ValidationError as problems:
        first, *others = sorted(problems.errors(), key=lambda problem: _order(written, problem))
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(_explain(written, schema, first) + more) from None


def conflict_error(written: Written, conflict: ConfigConflict) -> ConfigError:
    """The same one line for values that turned out not to fit together after validation."""
    return ConfigError(f"{written.place(tuple(conflict.key.split('.')))}: {conflict.key}: {conflict}")


def dump(config: BaseModel) -> str:
    """The whole configuration as YAML, defaults filled in."""
    return dump_yaml(config.model_dump(mode="json"))


def _validate(values: dict[str, Any], schema: type[Schema]) -> Schema:
    return schema.model_validate_json(json.dumps(values), strict=True)


def _read_file(path: Path, written: Written) -> None:
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
        for key, place in _walk(node, path):
            if key in written.places:
                raise ConfigError(f"{place}: {_dotted(key)}: given twice; first at {written.places[key]}")
            written.places[key] = place
        written.texts.update(scalars(node))
        written.values = loader.construct_document(node)
        json.dumps(written.values)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except TypeError as error:
        raise ConfigError(f"{path}: only texts, numbers, lists and mappings can stand in a configuration: {error}") from None
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


def _lay_over(override: str, written: Written) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted.strip():
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not of the form key=value (sections with dots: train.steps=100)")
    key = tuple(dotted.strip().split("."))
    try:
        value = yaml.load(text, Loader=Loader)
        json.dumps(value)
        node = yaml.compose(text, Loader=Loader)
    except (yaml.YAMLError, TypeError):
        raise ConfigError(f"{COMMAND_LINE}: {dotted}: {text!r} is not a value in YAML; quote a text that holds : or other marks") from None
    section = written.values
    for depth, name in enumerate(key[:-1], start=1):
        inner = section.get(name)
        if inner is None:
            inner = section[name] = {}
        if not isinstance(inner, dict):
            outer = ".".join(key[:depth])
            raise ConfigError(f"{COMMAND_LINE}: {dotted}: {outer} is not a section here ({written.place(key[:depth])})")
        section = inner
    section[key[-1]] = value
    for known in [known for known in written.places if known[: len(key)] == key]:
        del written.places[known]
    for known in [known for known in written.texts if known[: len(key)] == key]:
        del written.texts[known]
    written.places[key] = COMMAND_LINE
    if node is not None:
        written.texts.update(scalars(node, key))


def _take_as_written(written: Written, problems: ValidationError) -> bool:
    """Where a text was wanted, put values back as they were written; where a truth value was wanted, read yes, no, on and off."""
    is_changed = False
    for problem in problems.errors():
        key = _plain(problem["loc"])
        key = next((key[:end] for end in range(len(key), 0, -1) if key[:end] in written.texts), key)
        text = written.texts.get(key, "")
        is_choice = problem["type"] == "literal_error" and repr(text) in problem.get("ctx", {}).get("expected", "")
        if problem["type"] == "bool_type" and isinstance(problem["input"], str) and problem["input"].lower() in _TRUTHS:
            _put(written.values, key, _TRUTHS[problem["input"].lower()])
        elif text and (problem["type"] in STRINGS or is_choice):
            _put(written.values, key, text)
        else:
            continue
        is_changed = True
    return is_changed


def _put(values: dict[str, Any], key: Key, value: Any) -> None:
    section: Any = values
    for name in key[:-1]:
        section = section[name]
    section[key[-1]] = value


def _plain(location: tuple[int | str, ...]) -> Key:
    """A problem's location without the type names that pydantic adds for unions."""
    return tuple(part for part in location if not (isinstance(part, str) and re.search(r"[\[\]() ]", part)))


def _order(written: Written, problem: ErrorDetails) -> tuple[int, int]:
    """Unknown keys first (a typo also makes the right key missing), then in the order of the file."""
    place = written.place(_blamed(problem, written))
    line = int(place.rpartition(":")[2]) if place != COMMAND_LINE and place.rpartition(":")[2].isdigit() else 0
    return (0 if problem["type"] == "extra_forbidden" else 1, line)


def _blamed(problem: ErrorDetails, written: Written) -> Key:
    """The key to blame: a schema's own rule may name one, or mention it in its message."""
    key = _plain(problem["loc"])
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, ConfigConflict):
        return (*key, *cause.key.split("."))
    if isinstance(cause, ValueError):
        mentioned = [name for name in re.findall(r"[a-z_]+", str(cause)) if (*key, name) in written.places]
        return (*key, *mentioned[:1])
    return key


def _explain(written: Written, schema: type[BaseModel], problem: ErrorDetails) -> str:
    key = _blamed(problem, written)
    where = written.place(key)
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
    """Name the valid key that is nearest to an unknown one: in its section, else anywhere, else list the section's keys."""
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
    """The nearest of the known names as a question, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(known) or 'none'}"


def _keys_at(schema: type[BaseModel], section: Key) -> list[str]:
    model: type[BaseModel] | None = schema
    is_name = False  # of the user's own choice, as the keys of a mapping are
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
