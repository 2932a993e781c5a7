"""A Hugging Face accelerate training loop on packs of a corpus, with any number of processes.

Shows how ranks share a plan: every process reads its own packs (`rank`, `world_size`), all have equally many at nearly equal cost, and the
loss is divided by the planned images of all ranks. `accelerator.prepare` gets the model and the optimizer only, because the data set is
split by the plan already. Checkpoints hold the position in the data: run it again, and it resumes.

    tim prepare PHOTOS --out corpus
    accelerate launch --num_processes 2 examples/accelerate_loop.py corpus --steps 1000 --checkpoint run
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from small_transformer import PATCH, SmallTransformer, loss_per_image
from torchdata.stateful_dataloader import StatefulDataLoader

import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="a corpus of `tim prepare` or `tim index`")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--checkpoint", type=Path, default=Path("accelerate_loop"))
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()

    accelerator = Accelerator(cpu=given.cpu)
    ranks = accelerator.num_processes
    plan = pipeline.PlanConfig(stride=PATCH, max_tokens=64, tokens_per_pack=128, packs_per_step=4)
    dataset = pipeline.PackedDataset(given.corpus, plan=plan, rank=accelerator.process_index, world_size=ranks, lockstep=True)
    loader = StatefulDataLoader(dataset, batch_size=None, num_workers=given.workers)

    set_seed(0)
    model = SmallTransformer()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    accelerator.register_for_checkpointing(loader)
    if given.checkpoint.exists():
        accelerator.load_state(str(given.checkpoint))
        accelerator.print(f"resumed from {given.checkpoint}")

    total = torch.zeros((), device=accelerator.device)
    for batch in loader:
        images, noise = ([tensor.to(accelerator.device) for tensor in tensors] for tensors in (batch.images, batch.noise))
        t = batch.uniforms[:, 0].float().to(accelerator.device)
        with accelerator.autocast():
            losses = loss_per_image(model, images, noise, t, batch.captions)
        # DistributedDataParallel averages gradients over ranks; the plan's loss is a sum over all of them.
        loss = (losses * batch.weights.to(accelerator.device)).sum() * ranks / batch.step_images
        accelerator.backward(loss)
        total += loss.detach() / ranks
        if batch.is_last:
            optimizer.step()
            optimizer.zero_grad()
            summed = accelerator.reduce(total, reduction="sum").item()
            accelerator.print(f"step {batch.step}: loss {summed:.4f}, {batch.step_images} images on {ranks} ranks")
            total.zero_()
            if batch.step >= given.steps - 1:
                break
    accelerator.save_state(str(given.checkpoint))
    accelerator.print(f"saved {given.checkpoint}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
