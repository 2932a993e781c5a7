"""Train an autoencoder whose latents are small images: a model of pixels then draws images that are many times as large.

Shows that a codec is any autoencoder of diffusers: here an `AutoencoderTiny` whose cells are mean colours of 64 × 64 pixels. The network of
`tim demo` draws such cells, and the decoder learns to make sharp figures of them, at 4096 × 4096 pixels:

    tim demo
    python examples/upscaling_codec.py codec
    tim sample demo/run "a white cross on red" --size 4096x4096 --codec tiny=codec --steps 4 --out large
"""

import argparse
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from dataprep.synthetic import draw, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--factor", type=int, default=64, help="pixels per cell and side, a power of two")
    parser.add_argument("--steps", type=int, default=500)
    given = parser.parse_args()
    torch.manual_seed(0)
    network: Any = mean_colours(stages=given.factor.bit_length(), width=12)
    optimizer = torch.optim.AdamW(network.decoder.parameters(), lr=1e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=given.steps)
    rng = np.random.default_rng(0)
    for step in range(given.steps):
        images = random_parts(rng, count=2, side=6 * given.factor)
        cells = nn.functional.avg_pool2d(images, given.factor)
        noisy = cells + 0.1 * torch.randn_like(cells)  # sampled cells are not exact, either
        loss = nn.functional.l1_loss(network.decode(noisy).sample, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    network.save_pretrained(given.out)


def mean_colours(*, stages: int, width: int) -> AutoencoderTiny:
    """An autoencoder whose latents are mean colours. Its decoder starts with a blurred enlargement of them."""
    sizes: dict[str, Any] = {f"{part}_block_out_channels": (width,) * stages for part in ("encoder", "decoder")}
    sizes |= {f"num_{part}_blocks": (1,) * stages for part in ("encoder", "decoder")}
    model: Any = AutoencoderTiny(latent_channels=3, **sizes)
    mean, blur = nn.functional.pad(torch.full((2, 2), 0.25), (1, 0, 1, 0)), torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1])) / 16
    rgb = torch.eye(width, 3)
    signed = rgb - rgb.roll(3, 0)  # a ReLU keeps a colour and its negative in two channels
    for part, first, kernel, last, bias in ((model.encoder, rgb, mean, 2 * rgb, -1.0), (model.decoder, signed, blur, signed / 2, 0.5)):
        for layer in part.layers:
            if hasattr(layer, "conv"):
                nn.init.zeros_(layer.conv[-1].weight)
                nn.init.zeros_(layer.conv[-1].bias)
            elif isinstance(layer, nn.Conv2d):
                layer.weight.data = torch.eye(*layer.weight.shape[:2])[..., None, None] * kernel
        for layer, weight, constant in ((part.layers[0], first, 0.0), (part.layers[-1], last.T, bias)):
            layer.weight.data = nn.functional.pad(weight[..., None, None], (1, 1, 1, 1)).contiguous()
            nn.init.constant_(layer.bias, constant)
    return model


def random_parts(rng: np.random.Generator, *, count: int, side: int) -> Tensor:
    """Parts of large figures, (count, 3, side, side) in [-1, 1]: most show an edge of the figure."""
    parts = []
    for figure in rng.choice(np.array(figures(), dtype=object), count):
        radius = side * rng.uniform(0.5, 2.5)
        angle, distance = rng.uniform(0, 2 * np.pi), radius * rng.uniform(0.3, 1.3)
        centre = side / 2 + distance * np.sin(angle), side / 2 + distance * np.cos(angle)
        parts.append(np.array(draw(figure, height=side, width=side, centre=centre, radius=radius)))
    return torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).float() / 127.5 - 1


if __name__ == "__main__":
    main()
