"""A small transformer over packs of images, and its flow-matching loss. The training examples share it; it needs nothing but PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

PATCH = 16  # pixels per token side: the plan's stride


class SmallTransformer(nn.Module):
    """Predicts the velocity of every patch. Images of a pack do not see each other."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.width = width
        self.patches = nn.Linear(3 * PATCH**2, width)
        self.times = nn.Linear(1, width)
        self.words = nn.EmbeddingBag(256, width)  # a caption is the mean of its bytes
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.velocity = nn.Linear(width, 3 * PATCH**2)

    def forward(self, tokens: Tensor, positions: Tensor, owner: Tensor, t: Tensor, captions: Sequence[str]) -> Tensor:
        """tokens (T, 3·p·p), positions (T, 2), owner (T,): the image of each token; t (B,); → (T, 3·p·p)."""
        texts = [torch.tensor(list(caption.encode() or b" "), device=tokens.device) for caption in captions]
        offsets = torch.tensor([0, *[len(text) for text in texts[:-1]]], device=tokens.device).cumsum(0)
        conditions = self.times(t[:, None]) + self.words(torch.cat(texts), offsets)
        frequencies = 100.0 ** -torch.linspace(0, 1, self.width // 4, device=tokens.device)
        angles = (positions[:, :, None] * frequencies).flatten(1)
        hidden = self.patches(tokens) + torch.cat([angles.sin(), angles.cos()], dim=1) + conditions[owner]
        others = owner[:, None] != owner[None]  # the block-diagonal mask of a pack; varlen attention does without it
        return self.velocity(self.layers(hidden[None], mask=others)[0])


def to_tokens(images: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Images (3, h, w) of any sizes → tokens (T, 3·p·p), positions (T, 2), owner (T,)."""
    grids = [image.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4) for image in images]
    tokens = torch.cat([grid.reshape(-1, 3 * PATCH**2) for grid in grids])
    positions = [torch.cartesian_prod(torch.arange(grid.shape[0]), torch.arange(grid.shape[1])) for grid in grids]
    owner = torch.arange(len(grids)).repeat_interleave(torch.tensor([grid.shape[0] * grid.shape[1] for grid in grids]))
    return tokens, torch.cat(positions).float().to(tokens.device), owner.to(tokens.device)


def loss_per_image(model: nn.Module, images: Sequence[Tensor], noise: Sequence[Tensor], t: Tensor, captions: Sequence[str]) -> Tensor:
    """(B,) mean squared error of the velocity noise − image at times t (B,)."""
    clean, positions, owner = to_tokens([image.float() / 127.5 - 1 for image in images])
    drawn = to_tokens(noise)[0]
    noisy = torch.lerp(clean, drawn, t[owner, None])
    errors = (model(noisy, positions, owner, t, captions) - (drawn - clean)).square().mean(1)
    return torch.zeros_like(t).index_add(0, owner, errors) / owner.bincount(minlength=len(t))
