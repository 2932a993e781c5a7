"""Alignment teachers: features of a frozen vision transformer, one per token of the network (REPA, arXiv 2410.06940).

An image is resized (bicubic) to patch size × token grid, so that the teacher's patches coincide with the network's. Teachers are loaded
from local files; nothing is downloaded, and no code in a file runs:

- `radio`: RADIO weights (arXiv 2312.06709), a safetensors file or the published `.pth.tar`; the published TiM uses v2.5-b.
- `dinov2`: a folder that `transformers` reads (DINOv2, arXiv 2304.07193, with or without registers).
- `open_clip`: a folder with `open_clip_config.json` and weights; the image tower is used.

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
from tim.pretrained.weight_files import one_line

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RADIO_HEADS = {1152: 16, 1280: 16}  # heads by width, if the head width is not 64


@dataclass(frozen=True, slots=True)
class Tower:
    """A vision transformer. `encode` maps (B, 3, H, W) pixels, normalised by mean and std, to (B, N, D) tokens, row by row."""

    encode: Callable[[Tensor], Tensor]
    network: nn.Module
    width: int
    patch_size: int
    mean: Sequence[float]
    std: Sequence[float]


class AlignmentTeacher:
    """A frozen teacher, replicated on each rank outside of DeepSpeed. `width` must equal the network's `z_dim`."""

    def __init__(self, tower: Tower, *, device: torch.device | str = "cpu", precision: str = "fp32") -> None:
        tower.network.to(device).eval().requires_grad_(False)
        self.width = tower.width
        self.device = torch.device(device)
        self.precision = precision
        self._tower = tower
        self._mean, self._std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (tower.mean, tower.std))

    @torch.no_grad()
    def tokens(self, images: Sequence[Tensor], grids: Sequence[tuple[int, int]]) -> Tensor:
        """(T, D): the teacher's tokens, in the order of a pack's tokens.

        images: uint8 (3, H, W) each; grids: rows and columns of the network's tokens. Images with the same grid are batched.
        """
        p = self._tower.patch_size
        pixels = [
            F.interpolate(image[None].to(self.device).float() / 255, (rows * p, columns * p), mode="bicubic", align_corners=False)[0]
            for image, (rows, columns) in zip(images, grids, strict=True)
        ]
        tokens: dict[int, Tensor] = {}
        for grid in dict.fromkeys(grids):
            same_grid = [i for i, other in enumerate(grids) if other == grid]
            batch = (torch.stack([pixels[i] for i in same_grid]) - self._mean) / self._std
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                tokens.update(zip(same_grid, self._tower.encode(batch).float(), strict=True))
        return torch.cat([tokens[i] for i in range(len(images))])


def make(kind: str, path: str | Path, *, device: torch.device | str = "cpu", precision: str = "fp32") -> AlignmentTeacher:
    """Load a teacher from local weights. Raises ValueError for an unknown kind and for a path without such weights."""
    if kind not in TOWERS:
        raise ValueError(f"unknown alignment teacher {kind!r}: choose one of {', '.join(TOWERS)}")
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; give the local weights of the alignment teacher {kind}")
    return AlignmentTeacher(TOWERS[kind](path), device=device, precision=precision)


class Radio(nn.Module):
    """RADIO's vision transformer, with sizes inferred from its weights.

    Position embeddings form a large square grid. For h × w patches it is resized to max(h, w) and cropped at the top left.
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
        side = max(rows, columns)
        positions = F.interpolate(self.positions, (side, side), mode="bilinear", align_corners=True)[..., :rows, :columns]
        x = F.linear(patches, self.embedder) + positions.flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, len(self.prefix) :]


def _radio(path: Path) -> Tower:
    content = _read_tar(path) if path.suffix == ".tar" else read_weights(path / "model.safetensors" if path.is_dir() else path)
    embedder = "patch_generator.embedder.weight"
    prefix = next((name.removesuffix(embedder) for name in content if name.endswith(embedder)), None)
    if prefix is None:
        raise ValueError(f"{path}: not RADIO weights: no key ends with {embedder}")
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
    """The published checkpoint also contains its command line as an `argparse.Namespace`, which is safe to load."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path}: cannot read weights ({first_line(error)})") from error


def _dinov2(path: Path) -> Tower:
    try:
        from transformers import AutoModel  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError("the alignment teacher dinov2 needs transformers: pip install 'tim[latent]'") from None
    try:
        network = AutoModel.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a folder that transformers reads ({one_line(error)})") from error
    config = network.config
    if not config.model_type.startswith("dinov2"):
        raise ValueError(f"{path}: is a model of type {config.model_type}, not dinov2")
    prefix = 1 + getattr(config, "num_register_tokens", 0)

    def encode(pixels: Tensor) -> Tensor:
        return network(pixels).last_hidden_state[:, prefix:]

    return Tower(encode, network, width=config.hidden_size, patch_size=config.patch_size, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def _open_clip(path: Path) -> Tower:
    import open_clip
    from open_clip.transformer import VisionTransformer

    if not (path / "open_clip_config.json").is_file() or not list(path.glob("open_clip*model*")):
        raise ValueError(f"{path}: not an open_clip folder: it needs open_clip_config.json and weights")
    model: Any = open_clip.create_model(f"local-dir:{path}")
    if not isinstance(model.visual, VisionTransformer):
        tower_type = type(model.visual).__name__
        raise ValueError(f"{path}: its image tower is a {tower_type}; only open_clip's own vision transformers can be teachers")
    tower: Any = model.visual
    positions = tower.positional_embedding.detach().clone()
    size, patch = tower.grid_size, tower.patch_size[0]

    def encode(pixels: Tensor) -> Tensor:
        grid = pixels.shape[-2] // patch, pixels.shape[-1] // patch
        tower.positional_embedding.data = _resized_positions(positions.to(pixels.device), size, grid)
        return tower.forward_intermediates(pixels, 1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC")[
            "image_intermediates"
        ][0]

    return Tower(encode, tower, width=positions.shape[1], patch_size=patch, mean=tower.image_mean, std=tower.image_std)


def _resized_positions(positions: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Resize (1 + h·w, D) position embeddings, class token first, to another grid."""
    if grid == size:
        return positions
    grid_positions = positions[1:].float().view(1, *size, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(grid_positions, grid, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([positions[:1], resized.flatten(2)[0].T.to(positions.dtype)])


TOWERS: dict[str, Callable[[Path], Tower]] = {"radio": _radio, "dinov2": _dinov2, "open_clip": _open_clip}
