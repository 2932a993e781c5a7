"""Transition Models at native resolution: packs, network, objective, sampler (arXiv 2509.04394)."""

from tim import codecs, text, transports
from tim.generator import Generator
from tim.model_folder.folder import ModelSpec
from tim.network import TransitionTransformer
from tim.objective import TransitionObjective
from tim.packed import PackedText, PackedTokens, Segments
from tim.sampler import sample

__all__ = [
    "Generator", "ModelSpec", "PackedText", "PackedTokens", "Segments", "TransitionObjective", "TransitionTransformer",
    "codecs", "sample", "text", "transports",
]  # fmt: skip
