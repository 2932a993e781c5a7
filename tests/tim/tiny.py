"""Small networks whose every parameter matters."""

from __future__ import annotations

from typing import Any

import torch

from tim import TransitionTransformer

TINY = {"patch_size": 2, "in_channels": 3, "depth": 2, "hidden_size": 32, "cap_feat_dim": 16, "num_heads": 2, "lora_hidden_size": 8}
TINY_CLASSES = {**{name: value for name, value in TINY.items() if name != "cap_feat_dim"}, "num_classes": 3}


def tiny_network(params: dict[str, Any] = TINY) -> TransitionTransformer:
    """A network from seed 0 of which nothing is left at its zero initialisation."""
    torch.manual_seed(0)
    network = TransitionTransformer.from_official(params)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network
