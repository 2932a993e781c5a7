"""Every file appears whole or not at all: what writes to a path of its own does so under a temporary name, or appends to a log.

Read from the source. A target is fine if its first name is that of a stream or of a temporary path: the functions that open those
(`pipeline.storage.atomic.publish`, `tim.model_folder.replacing.replaced_folder`, …) rename when all is written.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tests import REPOSITORY

FLOORS = ("dataprep", "launch", "pipeline", "tim")
TEMPORARY = {"stream", "buffer", "content", "copy", "partial", "part", "temporary"}
METHODS = {"write_text", "write_bytes", "touch"}  # whose path is before the dot
SAVERS = {  # position of the target among the arguments
    "torch.save": 1,
    "save_file": 1,
    "json.dump": 1,
    "yaml.dump": 1,
    "pickle.dump": 1,
    "np.save": 0,
    "np.savez": 0,
    "pq.write_table": 1,
    "pq.ParquetWriter": 0,
    "shutil.copyfile": 1,
    "shutil.copy": 1,
    "shutil.copy2": 1,
    "shutil.copytree": 1,
    "shutil.move": 1,
    "tarfile.open": 0,
}
ALLOWED = {
    "pipeline/storage/atomic.py:locked_work_folder": "a lock file, which is empty",
    "launch/checkpoints/run_folder.py:exclusive_lock": "the lock of a run: who holds it",
    "launch/clusters/requeue.py:_ask_job_script": "an empty file whose presence is a signal",
    "launch/distributed/heartbeat.py:_stacks_on_signal": "written by a signal handler in C, which cannot rename",
    "launch/distributed/stacks.py:_collect_nccl": "moves a whole file",
    "launch/evaluating/evaluations.py:_evaluate": "the log of a process",
    "launch/hardware/peak_memory.py:restart_peak": "a file of the kernel",
    "launch/training/metrics.py:__init__": "a log; its last row is written again",
    "dataprep/features/encode.py:add": "a counter for the progress bar, in the work folder",
    "dataprep/shards/manifest.py:write_corpus_files": "within `publish`",
    "dataprep/sidecars/annotation_table.py:_convert": "a temporary file of the caller",
    "dataprep/synthetic.py:write_corpus": "metadata.jsonl comes last",
    "tim/model_folder/paths.py:copy": "into a folder that is renamed",
    "tim/pretrained/safetensors_files.py:write_file": "into a folder that is renamed",
    "tim/pretrained/safetensors_files.py:write_shards": "into a folder that is renamed",
}


def first_name(target: ast.expr | None) -> str:
    while isinstance(target, (ast.Attribute, ast.BinOp, ast.Call, ast.Subscript)):
        if isinstance(target, ast.BinOp):
            target = target.left
        elif isinstance(target, ast.Call):
            target = target.func
        else:
            target = target.value
    return target.id if isinstance(target, ast.Name) else ""


def is_new(mode: str) -> bool:
    """Whether a mode writes elsewhere than at the end of a file."""
    return bool(set(mode) & set("wx+")) and "a" not in mode


def mode_of(call: ast.Call, *, position: int) -> str:
    given = [word.value for word in call.keywords if word.arg == "mode"] + call.args[position : position + 1]
    return next((str(each.value) for each in given if isinstance(each, ast.Constant)), "r")


def target_of(call: ast.Call) -> ast.expr | None:
    """The path or stream that a call writes anew, if it does."""
    name = ast.unparse(call.func)
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    before = call.func.value if isinstance(call.func, ast.Attribute) else None
    if name == "open":
        return call.args[0] if is_new(mode_of(call, position=1)) else None
    if name in SAVERS:
        writes = name != "tarfile.open" or "w" in mode_of(call, position=1)
        return call.args[SAVERS[name]] if writes and len(call.args) > SAVERS[name] else None
    if method == "open" and name not in ("os.open", "Image.open"):
        return before if is_new(mode_of(call, position=0)) else None
    if method in METHODS:
        return before
    if method in ("save", "savefig") and (method == "savefig" or any(word.arg == "format" for word in call.keywords) or is_path(call)):
        return call.args[0] if call.args else None
    return None


def is_path(call: ast.Call) -> bool:
    """Whether the target of an image's `save` is a path that is put together in the call."""
    return bool(call.args) and isinstance(call.args[0], (ast.BinOp, ast.Subscript))


def writes(path: Path) -> Iterator[tuple[str, int]]:
    """FILE:FUNCTION and line of every call that writes a path under its own name."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, int]]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Call) and (target := target_of(node)) is not None and first_name(target) not in TEMPORARY:
            yield f"{path.relative_to(REPOSITORY)}:{function}", node.lineno
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), "")


def test_files_are_written_under_temporary_names() -> None:
    found: dict[str, list[int]] = {}
    for floor in FLOORS:
        for path in sorted((REPOSITORY / floor).rglob("*.py")):
            if path.is_relative_to(REPOSITORY / "launch" / "benchmarks"):  # they write into temporary folders
                continue
            for place, line in writes(path):
                found.setdefault(place, []).append(line)
    assert {place: lines for place, lines in found.items() if place not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found), "an exception that nothing needs any more"


def test_the_walk_sees_every_form(tmp_path: Path) -> None:
    lines = [
        "open(path, 'w')",
        "open(path, mode='r+b')",
        "path.open('wb')",
        "(folder / 'x').write_text('')",
        "json.dump(1, path)",
        "image.save(folder / 'x.png')",
        "figure.savefig(path)",
        "shutil.copyfile(a, folder / 'x')",
    ]
    fine = ["open(path)", "open(path, 'a')", "open(temporary, 'w')", "(partial / 'x').write_text('')", "image.save(stream, format='PNG')"]
    calls = [node for node in ast.walk(ast.parse("\n".join([*lines, *fine]))) if isinstance(node, ast.Call)]
    bad = {call.lineno for call in calls if (target := target_of(call)) is not None and first_name(target) not in TEMPORARY}
    assert bad == set(range(1, len(lines) + 1))
