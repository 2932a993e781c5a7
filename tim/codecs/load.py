"""Load codecs, and read their geometry from a config without loading them."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch

from tim.codecs.autoencoder import Autoencoder
from tim.codecs.base import Codec, Geometry
from tim.codecs.dc_ae import DCAE
from tim.codecs.kl import KL
from tim.codecs.pixel import PixelCodec
from tim.codecs.tiny import Tiny
from tim.model_kinds import CodecKind
from tim.pretrained import weight_files
from tim.pretrained.weight_files import Location, read_config

AUTOENCODERS: dict[str, str] = {"sd-vae": "AutoencoderKL", "kl": "AutoencoderKL", "dc-ae": "AutoencoderDC", "tiny": "AutoencoderTiny"}
CLASSES: dict[str, type[Autoencoder]] = {"AutoencoderKL": KL, "AutoencoderDC": DCAE, "AutoencoderTiny": Tiny}
CODECS = get_args(CodecKind)
PARTS = ("vae",)  # sub-folders of a diffusers pipeline with a codec
GEOMETRIES = {"pixel": Geometry(1, 3), "sd-vae": Geometry(8, 4), "dc-ae": Geometry(32, 32)}  # known without reading the weights


def geometry(kind: str, path: str | Path | None = None) -> Geometry:
    """The geometry of a codec. Raises ValueError for an unknown kind, and if it needs weights that are missing or do not match."""
    if kind in GEOMETRIES:
        return GEOMETRIES[kind]
    return _config_geometry(weights_folder(kind, path), kind=kind)


def is_stochastic(kind: str) -> bool:
    """Whether a codec of this kind samples its latents."""
    return kind in AUTOENCODERS and CLASSES[AUTOENCODERS[kind]].is_stochastic


def make(kind: str, path: str | Path | None = None, *, device: torch.device | str = "cpu") -> Codec:
    """A codec by name, with the weights at `path` (see `tim.pretrained.weight_files`). Raises ValueError if it cannot be loaded."""
    if kind == "pixel":
        return PixelCodec()
    source = location(kind, path)
    folder = source.folder
    actual = _config_geometry(folder, kind=kind)
    expected = GEOMETRIES.get(kind, actual)
    if actual != expected:
        has, needs = (f"{each.factor} pixels per cell and {each.channels} channels" for each in (actual, expected))
        raise ValueError(f"{folder}: has {has}, codec {kind} has {needs}: use codec kl for other autoencoders of that class")
    try:
        import diffusers  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(f"codec {kind} needs diffusers: pip install 'tim[latent]'") from None
    try:
        with weight_files.loadable(source, stem="diffusion_pytorch_model", pickle_stem="diffusion_pytorch_model") as (weights, arguments):
            options = {**arguments, "torch_dtype": torch.float32, "output_loading_info": True}
            network, info = getattr(diffusers, AUTOENCODERS[kind]).from_pretrained(weights, **options)
    except weight_files.FAILURES as error:
        raise weight_files.failure(source, error, library="diffusers") from error
    if info["missing_keys"]:
        raise ValueError(f"{folder}: its weights lack {min(info['missing_keys'])}: weights and config are of different models")
    return CLASSES[AUTOENCODERS[kind]](network, actual, device=device)


def weights_folder(kind: str, path: str | Path | None) -> Path:
    """The folder of a codec's weights. Raises ValueError for an unknown kind, a missing path and a missing folder."""
    return location(kind, path).folder


def digest(path: str | Path) -> str:
    """Digest of the weights at `path` (see `tim.pretrained.weight_files.digest`). Raises ValueError if there are none."""
    return weight_files.digest(path, parts=PARTS)


def location(kind: str, path: str | Path | None) -> Location:
    """Location of a codec's weights. Raises ValueError like `weights_folder`."""
    if kind not in CODECS:
        raise ValueError(f"unknown codec {kind!r}: choose one of {', '.join(CODECS)}")
    if path is None:
        raise ValueError(f"codec {kind} needs its weights: give its path, a folder that diffusers reads or hf://OWNER/NAME")
    return weight_files.locate(path, parts=PARTS)


def _config_geometry(folder: Path, *, kind: str) -> Geometry:
    """The geometry in the config of the weights."""
    config = read_config(folder)
    if config.get("_class_name") != AUTOENCODERS[kind]:
        raise ValueError(f"{folder}: has {config.get('_class_name')}, codec {kind} is {AUTOENCODERS[kind]}")
    blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels") or ()
    return Geometry(2 ** (len(blocks) - 1), int(config["latent_channels"]))
