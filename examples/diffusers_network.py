"""Train and sample a diffusers transformer as a transition model: `tim.TransitionObjective` and `tim.sample` on somebody else's network.

Shows the whole interface of objective and sampler: a callable (packed, t, r, condition) → packed, with `patch_size`. Here a small FLUX
transformer gets t as its timestep and t − r as its guidance, a second scalar that it embeds. It runs image by image, since diffusers
batches have one size. Pixels take the place of latents.

    tim prepare PHOTOS --out corpus
    python examples/diffusers_network.py corpus --steps 1000
"""

from __future__ import annotations

import argparse
from itertools import islice

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

import pipeline
import tim

PATCH, WIDTH = 16, 32


class FluxNetwork(nn.Module):
    patch_size = PATCH

    def __init__(self) -> None:
        super().__init__()
        self.flux = FluxTransformer2DModel(
            in_channels=3 * PATCH**2, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip

    def forward(self, packed: tim.PackedTokens, t: Tensor, r: Tensor, condition: tim.PackedText) -> tim.PackedTokens:
        lengths, texts = packed.segments.lengths, condition.features.split(condition.segments.lengths)
        images = zip(packed.tokens.split(lengths), packed.positions.split(lengths), texts, t, t - r, strict=True)
        return packed._replace(tokens=torch.cat([self.one(*image) for image in images]))

    def one(self, tokens: Tensor, positions: Tensor, text: Tensor, t: Tensor, interval: Tensor) -> Tensor:
        return self.flux(
            hidden_states=tokens[None], encoder_hidden_states=text[None], pooled_projections=text.mean(0, keepdim=True),
            timestep=t[None], guidance=interval[None],
            img_ids=F.pad(positions.to(tokens.dtype), (1, 0)), txt_ids=text.new_zeros(len(text), 3),
        ).sample[0]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="a corpus of `tim prepare` or `tim index`")
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()

    torch.manual_seed(0)
    network, encoder, transport = FluxNetwork(), tim.text.make("lookup", width=WIDTH), tim.transports.make("ot_fm")
    objective = tim.TransitionObjective(transport, patch_size=PATCH, shift=None)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    plan = pipeline.PlanConfig(stride=PATCH, max_tokens=16, tokens_per_pack=32, packs_per_step=1)
    packs = pipeline.PackedDataset(given.corpus, plan=plan, diffusion_share=0.5, consistency_share=0.1, caption_dropout=0.1)
    for batch in islice(packs, given.steps):
        latents = [image.float() / 127.5 - 1 for image in batch.images]
        condition = tim.PackedText.from_features(encoder.encode(batch.captions))
        draws = {name: getattr(batch, name) for name in ("noise", "kinds", "uniforms", "weights")}
        loss = objective(network, latents, condition, **draws).loss / batch.step_images
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {batch.step}: loss {loss.item():.4f}, {batch.step_images} images")

    noise = [torch.randn(3, 64, 64), torch.randn(3, 32, 96)]
    prompts = tim.PackedText.from_features(encoder.encode(["a red circle on blue", "a green cross on white"]))
    drawn = tim.sample(network, noise, prompts, transport=transport, steps=[1, 4])
    for latent, evaluations in zip(drawn.latents, drawn.evaluations, strict=True):
        print(f"sampled {latent.shape[2]}x{latent.shape[1]} in {evaluations} evaluations")


if __name__ == "__main__":
    main()
