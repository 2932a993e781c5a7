"""Alignment teachers: a frozen vision transformer's view of an image, one token for each token of the network (REPA, arXiv 2410.06940).

An image is resized so that the teacher's patches lie on the network's: bicubic, to patch × grid, whatever the grid. Teachers come from
local files; nothing is fetched, and no code in a file runs:

- `radio`: the weights of RADIO (arXiv 2312.06709), a safetensors file or the published `.pth.tar`; the published TiM's teacher is v2.5-b.
- `dinov2`: a folder that `transformers` reads (DINOv2, arXiv 2304.07193, with or without registers).
- `open_clip`: a folder with `open_clip_config.json` and its weights, of which the image tower is used.

Legend: B images of one size, N tokens of an image, T tokens of a pack, D teacher's width.
"""

from __future__ import annotations

import argparse
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tim.pretrained.official import first_line, read_weights
from tim.pretrained.weight_files import in_words

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RADIO_HEADS = {1152: 16, 1280: 16}  # by width, where a head is not 64 wide


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision transformer: `see` takes (B, 3, H, W) pixels, normalised by mean and std, to (B, N, D) tokens, row by row."""

    see: Callable[[Tensor], Tensor]
    network: nn.Module
    width: int
    patch_size: int
    mean: Sequence[float]
    std: Sequence[float]


class AlignmentTeacher:
    """Frozen, without gradient; whole on each rank, outside of DeepSpeed. `width` is the network's `z_dim`."""

    def __init__(self, tower: Tower, *, device: torch.device | str = "cpu", precision: str = "fp32") -> None:
        tower.network.to(device).eval().requires_grad_(False)
        self.width = tower.width
        self.device = torch.device(device)
        self.precision = precision
        self._tower = tower
        self._mean, self._std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (tower.mean, tower.std))

    @torch.no_grad()
    def tokens(self, images: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Tensor:
        """(T, D): what the teacher sees in every image, in the order of a pack's tokens.

        images: uint8 (3, H, W) each; grids: rows and columns of the network's tokens. Images of one grid are seen together.
        """
        p = self._tower.patch_size
        pixels = [
            F.interpolate(image[None].to(self.device).float() / 255, (rows * p, columns * p), mode="bicubic", align_corners=False)[0]
            for image, (rows, columns) in zip(images, grids, strict=True)
        ]
        seen: dict[int, Tensor] = {}
        for grid in dict.fromkeys(grids):
            alike = [i for i, other in enumerate(grids) if other == grid]
            batch = (torch.stack([pixels[i] for i in alike]) - self._mean) / self._std
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                seen.update(zip(alike, self._tower.see(batch).float(), strict=True))
        return torch.cat([seen[i] for i in range(len(images))])


def make(kind: str, path: str | Path, *, device: torch.device | str = "cpu", precision: str = "fp32") -> AlignmentTeacher:
    """A teacher from local weights. Raises ValueError for an unknown kind, and naming the path that holds no such weights."""
    if kind not in TOWERS:
        raise ValueError(f"unknown alignment teacher {kind!r}: choose one of {', '.join(TOWERS)}")
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; give the local weights of the alignment teacher {kind}")
    return AlignmentTeacher(TOWERS[kind](path), device=device, precision=precision)


class Radio(nn.Module):
    """RADIO's vision transformer, as its weights describe it.

    Its position embeddings lie on a large square grid: for h × w patches the square is resized to max(h, w) and cropped at the top left.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        embedder, positions, prefix = (weights[f"patch_generator.{name}"] for name in ("embedder.weight", "pos_embed", "cls_token.token"))
        self.width = len(embedder)
        self.patch_size = math.isqrt(embedder.shape[1] // 3)
        self.embedder, self.prefix = nn.Parameter(embedder.float()), nn.Parameter(prefix.float())
        side = math.isqrt(positions.shape[1])
        self.positions = nn.Parameter(positions.float().view(1, side, side, self.width).permute(0, 3, 1, 2))
        inner = {
            name.replace("grandma", "gamma"): value.float() for name, value in weights.items() if name.startswith(("blocks.", "norm."))
        }
        depth = 1 + max(int(name.split(".")[1]) for name in inner if name.startswith("blocks."))
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        make_block = partial(
            Block,
            self.width,
            num_heads=RADIO_HEADS.get(self.width, self.width // 64),
            mlp_ratio=len(inner["blocks.0.mlp.fc1.weight"]) / self.width,
            qkv_bias="blocks.0.attn.qkv.bias" in inner,
            init_values=1.0 if "blocks.0.ls1.gamma" in inner else None,
            norm_layer=norm,
        )
        self.blocks = nn.ModuleList(make_block() for _ in range(depth))
        self.norm = norm(self.width) if "norm.weight" in inner else nn.Identity()
        self.load_state_dict({**inner, "embedder": self.embedder, "prefix": self.prefix, "positions": self.positions})

    def forward(self, pixels: Tensor) -> Tensor:
        rows, columns = (side // self.patch_size for side in pixels.shape[-2:])
        patches = F.unfold(pixels, self.patch_size, stride=self.patch_size).transpose(1, 2)
        longest = max(rows, columns)
        positions = F.interpolate(self.positions, (longest, longest), mode="bilinear", align_corners=True)[..., :rows, :columns]
        x = F.linear(patches, self.embedder) + positions.flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, len(self.prefix) :]


def _radio(path: Path) -> Tower:
    content = _read_tar(path) if path.suffix == ".tar" else read_weights(path / "model.safetensors" if path.is_dir() else path)
    mark = "patch_generator.embedder.weight"
    prefix = next((name.removesuffix(mark) for name in content if name.endswith(mark)), None)
    if prefix is None:
        raise ValueError(f"{path}: not RADIO's weights: none is named …{mark}")
    network = Radio({name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)})
    mean, std = (next((v for k, v in content.items() if k.endswith(f"input_conditioner.norm_{name}")), None) for name in ("mean", "std"))
    return Tower(
        network,
        network,
        width=network.width,
        patch_size=network.patch_size,
        mean=CLIP_MEAN if mean is None else mean.flatten().tolist(),
        std=CLIP_STD if std is None else std.flatten().tolist(),
    )


def _read_tar(path: Path) -> dict[str, Tensor]:
    """The published checkpoint holds its command line beside the weights, in a class that holds values only."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: no weights can be read from it ({first_line(error)})") from error


def _dinov2(path: Path) -> Tower:
    try:
        from transformers import AutoModel  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError("the alignment teacher dinov2 needs transformers: pip install 'tim[latent]'") from None
    try:
        network = AutoModel.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a folder that transformers reads ({in_words(error)})") from error
    facts = network.config
    if not facts.model_type.startswith("dinov2"):
        raise ValueError(f"{path}: holds a model of type {facts.model_type}, not dinov2")
    prefix = 1 + getattr(facts, "num_register_tokens", 0)

    def see(pixels: Tensor) -> Tensor:
        return network(pixels).last_hidden_state[:, prefix:]

    return Tower(see, network, width=facts.hidden_size, patch_size=facts.patch_size, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _open_clip(path: Path) -> Tower:
    import open_clip
    from open_clip.transformer import VisionTransformer

    if not (path / "open_clip_config.json").is_file() or not list(path.glob("open_clip*model*")):
        raise ValueError(f"{path}: not a folder of open_clip: it needs open_clip_config.json and the weights beside it")
    model: Any = open_clip.create_model(f"local-dir:{path}")
    if not isinstance(model.visual, VisionTransformer):
        found = type(model.visual).__name__
        raise ValueError(f"{path}: its image tower is a {found}; only open_clip's own vision transformers can be teachers")
    tower: Any = model.visual
    learnt = tower.positional_embedding.detach().clone()
    size, patch = tower.grid_size, tower.patch_size[0]

    def see(pixels: Tensor) -> Tensor:
        grid = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        tower.positional_embedding.data = _resized_positions(learnt.to(pixels.device), size, grid)
        return tower.forward_intermediates(pixels, 1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC")[
            "image_intermediates"
        ][0]

    return Tower(see, tower, width=learnt.shape[1], patch_size=patch, mean=tower.image_mean, std=tower.image_std)


def _resized_positions(positions: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """(1 + h·w, D) position embeddings of the class token and a grid, resized to another grid."""
    if grid == size:
        return positions
    whole = positions[1:].float().view(1, *size, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(whole, grid, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([positions[:1], resized.flatten(2)[0].T.to(positions.dtype)])


TOWERS: dict[str, Callable[[Path], Tower]] = {"radio": _radio, "dinov2": _dinov2, "open_clip": _open_clip}
