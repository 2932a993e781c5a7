"""Transition Models at native resolution: packs, network, objective, sampler (arXiv 2509.04394).

What is exported here is imported at its first use, so that `tim.model_kinds` can be read without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tim import codecs, text, transports
    from tim.model_folder.folder import ModelSpec
    from tim.network import TransitionTransformer
    from tim.objective import TransitionObjective
    from tim.packed import PackedText, PackedTokens, Segments
    from tim.sampling.generator import Generator
    from tim.sampling.sampler import sample

_MODULES = {
    "Generator": "tim.sampling.generator",
    "ModelSpec": "tim.model_folder.folder",
    "PackedText": "tim.packed",
    "PackedTokens": "tim.packed",
    "Segments": "tim.packed",
    "TransitionObjective": "tim.objective",
    "TransitionTransformer": "tim.network",
    "sample": "tim.sampling.sampler",
}

__all__ = [
    "Generator", "ModelSpec", "PackedText", "PackedTokens", "Segments", "TransitionObjective", "TransitionTransformer",
    "codecs", "sample", "text", "transports",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name in __all__:
        return import_module(f"tim.{name}")
    raise AttributeError(f"module 'tim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
