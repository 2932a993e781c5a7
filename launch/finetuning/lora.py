"""Adapters of low rank (LoRA, arXiv 2106.09685) in a network, by PEFT. Their dropout is our own, because it is drawn from the seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from launch.config.model_sections import LoraConfig
from launch.config.schema import ConfigError
from pipeline.randomness import generator
from tim.network import PROJECTOR

ADAPTER = "default"  # PEFT's name of a network's adapter, a part of parameter names
PARTS = {"a": f".lora_A.{ADAPTER}.weight", "b": f".lora_B.{ADAPTER}.weight"}  # ends of parameter names, after the layer's


class ChannelDropout(nn.Module):
    """Leave out channels of an adapter's input, the same ones for all rows, and scale up the others (arXiv 2404.09610).

    In training only, after the first `draw`. Forward passes of one step see the same channels, also those of the derivative and of
    recomputed activations.
    """

    def __init__(self, share: float, *, channels: int, layer: str) -> None:
        super().__init__()
        self.share = share
        self.layer = layer
        self.register_buffer("kept", torch.ones(channels), persistent=False)
        self.kept: Tensor

    def draw(self, seed: int, *, step: int) -> None:
        """Choose the channels of a step."""
        kept = generator(seed, "adapter-dropout", step, self.layer).random(len(self.kept)) >= self.share
        self.kept.copy_(torch.from_numpy(kept / (1 - self.share)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.kept.to(x.dtype) if self.training else x


def check_peft() -> None:
    """Raise ConfigError if PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ConfigError("train.lora needs peft: pip install 'tim[lora]'") from None


def linear_targets(network: nn.Module, section: LoraConfig) -> list[str]:
    """Names of the linear layers that get an adapter. Raises ConfigError if a pattern matches none."""
    layers = [name for name, module in network.named_modules() if type(module) is nn.Linear]
    for pattern in section.targets:
        if not any(is_target(name, [pattern]) for name in layers):
            example = next((name for name in layers if name.startswith("blocks.")), layers[0])
            raise ConfigError(f"train.lora.targets: {pattern!r} matches no linear layer; names look like {example!r}")
    return [name for name in layers if is_target(name, section.targets)]


def is_target(layer: str, targets: Sequence[str]) -> bool:
    """Whether a linear layer gets an adapter: a pattern fits its name, or the end of it from a dot on.

    Never the projection for an alignment teacher, which is no part of the sampled network, and is trained as a whole.
    """
    return not layer.startswith(PROJECTOR) and any(fnmatchcase(layer, pattern) or fnmatchcase(layer, f"*.{pattern}") for pattern in targets)


def add_adapters(network: nn.Module, targets: Sequence[str], section: LoraConfig) -> None:
    """Put adapters into linear layers, in place, and freeze all other parameters. Their B is zero: the output stays the same."""
    check_peft()
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    strength: float = section.strength
    settings = PeftConfig(r=section.rank, lora_alpha=strength, target_modules=list(targets))  # pyright: ignore[reportArgumentType]
    inject_adapter_in_model(settings, network, adapter_name=ADAPTER)
    if section.dropout:
        for name in targets:
            layer = network.get_submodule(name)
            base, dropouts = layer.get_submodule("base_layer"), layer.get_submodule("lora_dropout")
            assert isinstance(base, nn.Linear)
            assert isinstance(dropouts, nn.ModuleDict)
            dropouts[ADAPTER] = ChannelDropout(section.dropout, channels=base.in_features, layer=name)


def draw_dropout(network: nn.Module, *, seed: int, step: int) -> None:
    """Choose the channels that the adapters leave out in a step."""
    for module in network.modules():
        if isinstance(module, ChannelDropout):
            module.draw(seed, step=step)


def adapted_layers(names: Sequence[str]) -> Iterator[str]:
    """Layers with an adapter, given the names of the trained parameters."""
    for name in names:
        if name.endswith(PARTS["a"]):
            yield name.removesuffix(PARTS["a"])
