"""open_clip's byte-pair tokenizer, without importing the rest of open_clip."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


@cache
def simple_tokenizer() -> Any:
    """CLIP's `SimpleTokenizer`, loaded from its file: the package imports transformers, torchvision and timm, six seconds per process.

    Raises ModuleNotFoundError if open_clip is not installed.
    """
    package = find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'open_clip'", name="open_clip")
    spec = spec_from_file_location("tim._open_clip_tokenizer", Path(package.submodule_search_locations[0]) / "tokenizer.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    made = vars(module).get("_tokenizer")  # it makes one itself, in a quarter of a second
    return module.SimpleTokenizer() if made is None else made
