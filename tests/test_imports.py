"""How the code is laid out (docs/architecture.md): who imports whom, and how large files, functions and folders are.

Read from the source, so that an import inside a function counts too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
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
FLOORS = set(MAY_IMPORT)
MAX_LINES, MAX_FUNCTION_LINES, MAX_FILES = 400, 60, 12
Function = ast.FunctionDef | ast.AsyncFunctionDef
FILES = [path for floor in sorted(FLOORS) for path in sorted((REPOSITORY / floor).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[str, str | None]]:
    """Every module that a file imports, wherever in it, with the name taken from it if there is one."""
    package = path.relative_to(REPOSITORY).with_suffix("").parts[:-1]
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"import_module", "importlib.import_module", "__import__"}:
            yield from ((given.value, None) for given in node.args if isinstance(given, ast.Constant) and isinstance(given.value, str))


def imported(path: Path) -> set[str]:
    return {module for module, _ in imports(path)}


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def module_graph() -> dict[str, set[str]]:
    """Which of our modules each of them imports. A package's `__init__` stands for the names taken from the package itself."""
    names = {module_name(path) for path in FILES}
    graph: dict[str, set[str]] = {}
    for path in FILES:
        found = {f"{module}.{name}" if f"{module}.{name}" in names else module for module, name in imports(path)}
        graph[module_name(path)] = (found & names) - {module_name(path)}
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The circles of a graph, one for each node that another reached twice on its way."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(node: str, way: list[str]) -> None:
        if node in way:
            found.append([*way[way.index(node) :], node])
            return
        if node not in done:
            for other in sorted(graph.get(node, ())):
                visit(other, [*way, node])
            done.add(node)

    for node in sorted(graph):
        visit(node, [])
    return found


def test_the_walk_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    module = tmp_path / "tim" / "inner" / "a.py"
    module.parent.mkdir(parents=True)
    lines = ["import os.path", "def f():", "    from launch.cli import main", "    from . import b", "    from ..c import d"]
    module.write_text("\n".join([*lines, "    import_module('pipeline.index')"]))
    assert imported(module) == {"os.path", "launch.cli", "tim.inner", "tim.c", "pipeline.index"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c", "b"]]


def test_floors_import_only_whom_they_may() -> None:
    def forbidden(path: Path) -> set[str]:
        return FLOORS - MAY_IMPORT[path.relative_to(REPOSITORY).parts[0]]

    assert not [f"{path}: {name}" for path in FILES for name in imported(path) if name.split(".")[0] in forbidden(path)]


def test_no_module_imports_itself_through_others() -> None:
    assert not circles(module_graph())


def test_no_room_imports_itself_through_others() -> None:
    """A room is a sub-package of a floor with all below it; a module at the top of a floor is one of its own."""

    def room(module: str) -> str:
        path = REPOSITORY.joinpath(*module.split("."))
        return ".".join(module.split(".")[:2]) if path.is_dir() or module.count(".") > 1 else module

    graph: dict[str, set[str]] = {}
    for module, others in module_graph().items():
        graph.setdefault(room(module), set()).update(room(other) for other in others if room(other) != room(module))
    floors = {floor: set() for floor in FLOORS}  # entrances take from their rooms what they offer
    assert not circles({**graph, **floors})


def test_private_names_stay_in_their_file() -> None:
    ours = [(path, module, name) for path in FILES for module, name in imports(path) if module.split(".")[0] in FLOORS]
    assert not [f"{path}: {module}.{name}" for path, module, name in ours if name and name.startswith("_") and not name.startswith("__")]


def function_lines(node: Function) -> int:
    """Lines of a function without its docstring."""
    said = node.body[0] if ast.get_docstring(node, clean=False) is not None else None
    return node.end_lineno - node.lineno + 1 - (said.end_lineno - said.lineno + 1 if said else 0)  # pyright: ignore


def test_files_and_functions_are_short() -> None:
    assert not [path for path in FILES if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES]
    functions = [(path, node) for path in FILES for node in ast.walk(_parse(path)) if isinstance(node, Function)]
    assert len(functions) > 1000
    assert not [f"{path}: {node.name}" for path, node in functions if function_lines(node) > MAX_FUNCTION_LINES]


def test_folders_are_small() -> None:
    folders = Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert not {folder: count for folder, count in folders.items() if count > MAX_FILES}


def test_only_the_engine_imports_deepspeed() -> None:
    importing = [module_name(path) for path in FILES if any(name.split(".")[0] == "deepspeed" for name in imported(path))]
    assert importing == ["launch.engine.deepspeed_internals"]


def test_models_and_preparation_work_without_deepspeed() -> None:
    """What samples and what prepares runs on machines where deepspeed cannot be installed."""
    forbid = "import sys; sys.modules['deepspeed'] = None; "
    modules = "import tim, dataprep.prepare, launch.checkpoints.export, launch.sampling.image_grid, launch.cli"
    subprocess.run([sys.executable, "-c", forbid + modules], cwd=REPOSITORY, check=True, timeout=120)


def test_the_command_line_and_the_schema_work_without_torch() -> None:
    """It takes seconds and memory to import, and `--help`, `recipes`, a schema's check and every worker of `prepare` do without it."""
    modules = "launch.cli, launch.config.schema, dataprep.prepare, dataprep.index_tars, dataprep.features.encoders"
    network = {"params": {"depth": 1, "hidden_size": 8, "num_heads": 1}}
    config = {"network": network, "train": {"steps": 1}, "codec": {"kind": "kl", "path": "nowhere"}, "objective": {"transport": "ve"}}
    validate = f"launch.config.schema.Config.model_validate({config})"
    check = f"import sys, {modules}; {validate}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, check=True, timeout=120)


def test_models_work_without_the_compiler_of_torch() -> None:
    """Its import takes three seconds."""
    check = "import sys, tim, launch.training.train; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, check=True, timeout=120)
