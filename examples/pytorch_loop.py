"""A plain PyTorch training loop on packs of a corpus at native resolution, with exact resume.

Shows `pipeline.PackedDataset` under torchdata's `StatefulDataLoader`: images of all sizes share a pack without padding, the loss is divided
by the planned images of a step, and a checkpoint continues with the very next pack. Run it twice: the second run resumes.

    tim prepare PHOTOS --out corpus
    python examples/pytorch_loop.py corpus --steps 1000 --checkpoint run.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from small_transformer import PATCH, SmallTransformer, loss_per_image
from torchdata.stateful_dataloader import StatefulDataLoader

import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="a corpus of `tim prepare` or `tim index`")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=Path("pytorch_loop.pt"))
    given = parser.parse_args()

    plan = pipeline.PlanConfig(stride=PATCH, max_tokens=64, tokens_per_pack=128, packs_per_step=2)
    dataset = pipeline.PackedDataset(given.corpus, plan=plan, seed=0, caption_dropout=0.1)
    loader = StatefulDataLoader(dataset, batch_size=None, num_workers=given.workers)

    torch.manual_seed(0)
    model = SmallTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if given.checkpoint.exists():
        saved = torch.load(given.checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["data"])
        print(f"resumed from {given.checkpoint}")

    total = 0.0
    for batch in loader:
        losses = loss_per_image(model, batch.images, batch.noise, batch.uniforms[:, 0].float(), batch.captions)
        loss = (losses * batch.weights).sum() / batch.step_images
        loss.backward()
        total += loss.item()
        if batch.is_last:
            optimizer.step()
            optimizer.zero_grad()
            sizes = ", ".join(f"{image.shape[2]}x{image.shape[1]}" for image in batch.images[:4])
            print(f"step {batch.step}: loss {total:.4f}, {batch.step_images} images, last pack {sizes} …")
            total = 0.0
            if batch.step >= given.steps - 1:
                break
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "data": loader.state_dict()}, given.checkpoint)
    print(f"saved {given.checkpoint}")


if __name__ == "__main__":
    main()
