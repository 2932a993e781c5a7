"""What stands in YAML reaches the model as it was written: choices, texts, and numbers of every spelling."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from dataprep.features.encoders import EncodeConfig
from dataprep.prepare import PrepareConfig
from launch.config.schema import Config
from launch.config.yaml_file import ConfigError, check, dump, read
from launch.config.yaml_values import Loader
from launch.config.yaml_values import dump as dump_yaml

ODD_TEXTS = [
    "off",
    "on",
    "no",
    "yes",
    "y",
    "n",
    "NO",
    "1e5",
    "1e-4",
    "010",
    "0o17",
    "0x1f",
    "1:30:00",
    "12_000",
    "2024-01-02",
    "2024",
    "3.10",
]
ODD_TEXTS += ["2024-01-02", "2024", "3.10", "true", "False", ".5", ".inf", "-1", "+1", "1.", "=", "1e", "_1"]


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = ""
    maybe: str | None = None
    path: Path | None = None
    one_or_more: str | tuple[str, ...] = ""
    many: tuple[str, ...] = ()
    by_name: dict[str, str] = {}
    choice: Literal["off", "no", "1e5", "2024", "true", "auto"] = "auto"
    flag: bool = False
    maybe_flag: bool | None = None
    number: float = 0.0
    count: int = 0


class Outer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    inner: Inner = Inner()


def loaded(key: str, text: str, *, file: Path) -> Iterator[Any]:
    """The value of a key from the command line, and from a file."""
    yield getattr(check(read(None, overrides=[f"inner.{key}={text}"]), Outer).inner, key)
    file.write_text(f"inner:\n  {key}: {text}\n")
    yield getattr(check(read(file), Outer).inner, key)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_texts_stay_as_they_were_written(text: str, tmp_path: Path) -> None:
    for key in ("text", "maybe", "one_or_more"):
        assert list(loaded(key, text, file=tmp_path / "c.yaml")) == [text, text], key
    assert list(loaded("path", text, file=tmp_path / "c.yaml")) == [Path(text)] * 2
    for key in ("many", "one_or_more"):
        assert list(loaded(key, f"[a, {text}]", file=tmp_path / "c.yaml")) == [("a", text)] * 2, key
    assert list(loaded("by_name", f"{{{text}: {text}}}", file=tmp_path / "c.yaml")) == [{text: text}] * 2
    config = Outer(inner=Inner(text=text, many=(text,)))
    (tmp_path / "dumped.yaml").write_text(dump(config))
    assert check(read(tmp_path / "dumped.yaml"), Outer) == config


@pytest.mark.parametrize("choice", ["off", "no", "1e5", "2024", "true", "auto"])
def test_choices_stay_as_they_were_written(choice: str, tmp_path: Path) -> None:
    assert list(loaded("choice", choice, file=tmp_path / "c.yaml")) == [choice, choice]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        *(("flag", text, text in ("yes", "on", "true", "True")) for text in ("yes", "no", "on", "off", "true", "false", "True")),
        ("maybe_flag", "off", False),
        ("maybe_flag", "null", None),
        ("maybe", "~", None),
        *(("number", text, float(text)) for text in ("1e-4", "1E5", ".5", "3", "-2.5e+3", "1_000.5")),
        *(("count", text, value) for text, value in (("010", 10), ("0x1f", 31), ("0o17", 15), ("12_000", 12_000), ("-3", -3))),
    ],
)
def test_numbers_and_truth_values(key: str, text: str, value: Any, tmp_path: Path) -> None:
    assert list(loaded(key, text, file=tmp_path / "c.yaml")) == [value, value]


def test_what_is_no_choice_is_still_refused(tmp_path: Path) -> None:
    for key, text in (("choice", "on"), ("choice", "3"), ("flag", "maybe"), ("count", "1:30"), ("number", "off"), ("text", "[1]")):
        with pytest.raises(ConfigError, match=rf"^command line: inner\.{key}: "):
            next(loaded(key, text, file=tmp_path / "c.yaml"))


def choices(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, choice) of every choice in a schema that can be reached by names."""

    def literals(annotation: Any) -> Iterator[Any]:
        if typing.get_origin(annotation) is Literal:
            yield from typing.get_args(annotation)
        elif typing.get_origin(annotation) is not dict:
            for part in typing.get_args(annotation):
                yield from literals(part)

    for name, field in model.model_fields.items():
        yield from ((f"{prefix}{name}", choice) for choice in literals(field.annotation))
        for part in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from choices(part, f"{prefix}{name}.")


@pytest.mark.parametrize("schema", [PrepareConfig, Config, EncodeConfig])
def test_every_choice_of_every_config_is_read_as_it_is(schema: type[BaseModel], tmp_path: Path) -> None:
    found = list(choices(schema))
    assert ("dedup.near", "off") in found or schema is not PrepareConfig
    for key, choice in found:
        *sections, last = key.split(".")
        lines = [*(f"{'  ' * depth}{name}:" for depth, name in enumerate(sections)), f"{'  ' * len(sections)}{last}: {choice}"]
        (tmp_path / "c.yaml").write_text("\n".join(lines))
        for written in (read(tmp_path / "c.yaml"), read(None, overrides=[f"{key}={choice}"])):
            value: Any = written.values
            for name in key.split("."):
                value = value[name]
            assert value == choice, key


@settings(max_examples=200)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists, max_leaves=5))
def test_what_is_dumped_is_read_back(value: Any) -> None:
    assert yaml.load(dump_yaml({"a": value}), Loader=Loader) == {"a": value}


def test_the_case_of_a_choice_that_yaml_takes_for_false(shared: Path) -> None:
    assert check(read(shared / "cases/users/off.yaml"), PrepareConfig).dedup.near == "off"
    assert check(read(None, overrides=["dedup.near=off", "captions.languages=[no,en]"]), PrepareConfig).captions.languages == ("no", "en")
