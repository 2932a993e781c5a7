"""Run by test_previews.py on any number of ranks: previews of one average under several ZeRO stages, and what they leave behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.config.load import load_config
from launch.config.schema import Config
from launch.distributed.ranks import Ranks, process_group
from launch.engine.ema import ShardedEMA
from launch.engine.engine import Engine
from launch.previews.drawing import Previews
from pipeline.storage.atomic import publish_text
from tim import TransitionTransformer
from tim.codecs import PixelCodec

SETTINGS = """\
network: {params: {patch_size: 4, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
train: {steps: 10}
preview:
  every: 4
  prompts: [a red circle, "", "7"]
  sizes: [16x16, 48x8]
  steps: [1, 3]
  guidance: 2
"""


class BrokenCodec(PixelCodec):
    def decode(self, latents: Sequence[Tensor]) -> list[Tensor]:
        raise MemoryError("no room to decode")


def config_of(folder: Path, *overrides: str) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    publish_text(folder / "run.yaml", SETTINGS)  # every rank writes it
    return load_config(folder / "run.yaml", overrides=[f"run_dir={folder}", *overrides])


def make_previews(config: Config, ranks: Ranks) -> Previews:
    """Previews of an average that differs from the weights, with all layers in use."""
    torch.manual_seed(0)
    network = TransitionTransformer.from_official(config.network.params.model_dump(exclude_none=True))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    engine = Engine(network, ranks=ranks, stage=config.train.zero)
    ema = ShardedEMA(engine.fragments(), decay=0.9)
    for fragment in ema.average.values():
        fragment.values.mul_(1.5)
    previews = Previews(config, engine, ema, ranks, codec=None, encode=None)
    previews.prepare()
    return previews


def state(previews: Previews) -> list[Tensor]:
    """Copies of all that training uses on this rank."""
    engine, average = previews.engine, previews.ema.average
    held = [fragment.values for fragments in (engine.fragments(), average) for fragment in fragments.values()]
    shares = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]  # of ZeRO 3
    return [values.detach().clone() for values in [*held, *shares, torch.random.get_rng_state()]]


def draw(config: Config, ranks: Ranks, *, steps: Sequence[int] = (3, 4), broken: bool = False) -> dict[str, Any]:
    """broken: the last rank cannot decode."""
    previews, lines = make_previews(config, ranks), []
    if broken and ranks.rank == ranks.size - 1:
        previews.codec = BrokenCodec()
    previews.log = lines.append
    before, pointers = state(previews), [parameter.data_ptr() for parameter in previews.engine.module.parameters()]
    passed = [previews.draw_if_due(step, stopping=lambda: False) for step in steps]
    unchanged = all(map(torch.equal, before, state(previews)))
    in_place = pointers == [parameter.data_ptr() for parameter in previews.engine.module.parameters()]
    training = previews.engine.module.training
    previews.engine.close()
    return {"passed": passed, "unchanged": unchanged, "in_place": in_place or config.train.zero == 3, "training": training, "lines": lines}


def main() -> None:
    folder = Path(sys.argv[1])
    with process_group() as ranks:
        for stage in sys.argv[2:]:
            out = folder / f"{ranks.size}-{stage}"
            number, _, broken = stage.partition("-")
            report = draw(config_of(out, f"train.zero={number}"), ranks, broken=bool(broken))
            (out / f"{ranks.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
