"""Recipes: the configurations shipped with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import configs
from launch.config import yaml_file
from launch.config.yaml_file import ConfigConflict, ConfigError, RawConfig


def recipe_names() -> list[str]:
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Path of a recipe. Raises ConfigError naming the nearest one."""
    if name not in recipe_names():
        raise ConfigError(f"{name}: neither a file nor a recipe; {yaml_file.nearest_of(name, recipe_names())}")
    return _folder() / f"{name}.yaml"


def recipe_summary(name: str) -> str:
    """What a recipe is: the first sentence of its comment."""
    first = recipe_path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return first.partition(". ")[0].rstrip(".")


def config_path(source: str | Path | None) -> Path | None:
    """Resolve a path or a recipe's name to a configuration file. Raises ConfigError if neither exists."""
    if source is None:
        return None
    path = Path(source)
    if str(source) in recipe_names() and not path.is_file():
        return recipe_path(str(source))  # also if a folder has this name, e.g. one that `tim demo` creates
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a YAML file or a recipe: {', '.join(recipe_names())}")
    return path if path.exists() or path.suffix in (".yaml", ".yml") or path.name != str(source) else recipe_path(str(source))


def expand_network_recipe(raw: RawConfig) -> RawConfig:
    """Merge the parameters of `network.recipe` into `network.params`. Raises ConfigError for an unknown recipe."""
    network: Any = raw.values.get("network")
    if not isinstance(network, dict) or not isinstance(network.get("recipe"), str) or not isinstance(network.get("params", {}), dict):
        return raw  # the schema reports the error
    name = network["recipe"]
    if name not in recipe_names():
        problem = f"{name!r} is not a recipe; {yaml_file.nearest_of(name, recipe_names())}"
        raise yaml_file.conflict_error(raw, ConfigConflict("network.recipe", problem))
    params = yaml_file.read(recipe_path(name)).values["network"]["params"]
    network["params"] = {**params, **network.get("params", {})}
    return raw


def _folder() -> Path:
    return Path(configs.__path__[0])
