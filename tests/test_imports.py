"""Who may import whom (DESIGN §2): read from the source, so that an import inside a function counts too."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import REPOSITORY

MAY_IMPORT = {
    "launch": {"launch", "dataprep", "pipeline", "tim", "configs"},
    "dataprep": {"dataprep", "pipeline", "tim"},
    "pipeline": {"pipeline"},
    "tim": {"tim"},
    "configs": set(),
}
ROOMS = set(MAY_IMPORT)
MODULES = [path for room in sorted(ROOMS) for path in sorted((REPOSITORY / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """The absolute names of all modules that a file imports, wherever in it."""
    package = path.relative_to(REPOSITORY).with_suffix("").parts[:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            names.add(".".join((*above, *([node.module] if node.module else []))))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"import_module", "importlib.import_module", "__import__"}:
            names.update(argument.value for argument in node.args if isinstance(argument, ast.Constant) and isinstance(argument.value, str))
    return names


def test_the_walk_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    module = tmp_path / "tim" / "inner" / "a.py"
    module.parent.mkdir(parents=True)
    lines = ["import os.path", "def f():", "    from launch.cli import main", "    from . import b", "    from ..c import d"]
    module.write_text("\n".join([*lines, "    import_module('pipeline.corpus.corpus')"]))
    assert imported(module) == {"os.path", "launch.cli", "tim.inner", "tim.c", "pipeline.corpus.corpus"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_rooms_import_only_whom_they_may(path: Path) -> None:
    room = path.relative_to(REPOSITORY).parts[0]
    against = {name for name in imported(path) if name.split(".")[0] in ROOMS - MAY_IMPORT[room]}
    assert not against, f"{path} must not import {sorted(against)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_only_the_engine_imports_deepspeed(path: Path) -> None:
    if path == REPOSITORY / "launch" / "engine.py":
        return
    assert not {name for name in imported(path) if name.split(".")[0] == "deepspeed"}


def test_models_and_preparation_work_without_deepspeed() -> None:
    """What samples and what prepares runs on machines where deepspeed cannot be installed."""
    forbid = "import sys; sys.modules['deepspeed'] = None; "
    modules = "import tim, dataprep.prepare, launch.export, launch.preview, launch.cli"
    subprocess.run([sys.executable, "-c", forbid + modules], cwd=REPOSITORY, check=True, timeout=120)


def test_the_command_line_and_the_schema_load_without_torch() -> None:
    """It takes seconds and memory to import, and `--help`, `recipes` and every worker of `prepare` do without it."""
    check = "import sys, launch.cli, launch.config, dataprep.prepare, dataprep.index_tars; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, check=True, timeout=120)
