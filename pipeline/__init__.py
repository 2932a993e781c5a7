"""Shards to packed batches: what is in a training step.

`PackedDataset` gives the packs of a prepared corpus to any training loop, `PlanConfig` is its plan, `pack_stream` packs any webdataset
stream. They are imported on first use, because they import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.loading.dataset import PackedBatch, PackedDataset
    from pipeline.loading.streamed import StreamedPack, pack_stream
    from pipeline.planning.config import PlanConfig

__all__ = ["PackedBatch", "PackedDataset", "PlanConfig", "StreamedPack", "pack_stream"]

_MODULES = {
    "PackedBatch": "pipeline.loading.dataset",
    "PackedDataset": "pipeline.loading.dataset",
    "PlanConfig": "pipeline.planning.config",
    "StreamedPack": "pipeline.loading.streamed",
    "pack_stream": "pipeline.loading.streamed",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
