"""A tiny recipe whose parts are on the hub, and the options that give them as files."""

from __future__ import annotations

import re
from pathlib import Path

PARAMS = {"patch_size": 1, "in_channels": 32, "depth": 1, "hidden_size": 32, "num_heads": 2, "cap_feat_dim": 32}
RECIPE = """\
plan: {max_tokens: 16, tokens_per_pack: 16, packs_per_step: 1}
codec: {kind: dc-ae, path: hf://authors/dc-ae}
text: {kind: hf, path: hf://maker/gemma, max_tokens: 16, caption_dropout: 0.1}
network:
  params: {patch_size: 1, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 32, z_dim: 8, encoder_depth: 1, projector_dim: 16}
objective: {alignment: {kind: radio}}
train: {steps: 2}
"""
NETWORK = "hf://authors/tim/t2i_model.bin"


def parts_of(root: Path) -> list[str]:
    """Options that give all parts as local files."""
    network = root / "authors" / "tim" / "t2i_model.bin"
    return ["--network", str(network), "--codec", str(root / "authors" / "dc-ae"), "--text", str(root / "maker" / "gemma")]


def refused_last(done: object, pattern: str) -> None:
    """Exit code 2, and an error as the last line, after what was done before."""
    assert getattr(done, "code", None) == 2, done
    assert re.search(pattern, getattr(done, "err", "").splitlines()[-1]), done
