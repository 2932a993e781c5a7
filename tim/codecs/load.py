"""Load codecs, and read their geometry from a config without loading them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch

from tim.codecs import single_file
from tim.codecs.autoencoder import Autoencoder
from tim.codecs.base import Codec, Geometry
from tim.codecs.dc_ae import DCAE
from tim.codecs.kl import KL
from tim.codecs.kl_flux2 import Flux2
from tim.codecs.pixel import PixelCodec
from tim.codecs.tiny import Tiny
from tim.model_kinds import CodecKind
from tim.pretrained import weight_files
from tim.pretrained.headers import read_header
from tim.pretrained.weight_files import Location, read_config

AUTOENCODERS: dict[str, str] = {
    "sd-vae": "AutoencoderKL",
    "sd3-vae": "AutoencoderKL",
    "flux-vae": "AutoencoderKL",
    "flux2-vae": "AutoencoderKLFlux2",
    "kl": "AutoencoderKL",
    "dc-ae": "AutoencoderDC",
    "tiny": "AutoencoderTiny",
}
CLASSES: dict[str, type[Autoencoder]] = {
    "AutoencoderKL": KL,
    "AutoencoderKLFlux2": Flux2,
    "AutoencoderDC": DCAE,
    "AutoencoderTiny": Tiny,
}
CODECS = get_args(CodecKind)
PARTS = ("vae",)  # sub-folders of a diffusers pipeline with a codec
STEM = "diffusion_pytorch_model"  # of weights in a folder
GEOMETRIES = {  # known without reading the weights
    "pixel": Geometry(1, 3),
    "sd-vae": Geometry(8, 4),
    "sd3-vae": Geometry(8, 16),
    "flux-vae": Geometry(8, 16),
    "flux2-vae": Geometry(16, 128),
    "dc-ae": Geometry(32, 32),
}
KL_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
PUBLISHED: dict[str, dict[str, Any]] = {  # architectures, by class; what is left out is diffusers' default
    "AutoencoderKL": KL_CONFIG,
    "AutoencoderKLFlux2": KL_CONFIG,
    "AutoencoderDC": {"encoder_block_types": DC_BLOCKS, "decoder_block_types": DC_BLOCKS},
    "AutoencoderTiny": {},
}


def geometry(kind: str, path: str | Path | None = None, *, channels: int | None = None) -> Geometry:
    """The geometry of a codec. channels: of pixel.

    Of a codec on the hub, its config.json is downloaded if it has one. Raises ValueError for an unknown kind, and if it needs weights that
    are missing or do not match.
    """
    if kind == "pixel" and channels is not None:
        return Geometry(1, channels)
    if kind in GEOMETRIES:
        return GEOMETRIES[kind]
    source = location(kind, path, only_config=True)
    return _config_geometry(_config(source, kind=kind), source, kind=kind)


def is_stochastic(kind: str) -> bool:
    """Whether a codec of this kind samples its latents."""
    return kind in AUTOENCODERS and CLASSES[AUTOENCODERS[kind]].is_stochastic


def make(
    kind: str,
    path: str | Path | None = None,
    *,
    channels: int | None = None,
    device: torch.device | str = "cpu",
    memory_gb: float | None = None,
) -> Codec:
    """A codec by name, with the weights at `path` (see `tim.pretrained.weight_files`). Raises ValueError if it cannot be loaded.

    channels: of pixel, 3 by default. memory_gb: limit of activations in 10⁹ bytes, beside the weights; larger images are processed in
    tiles. None: half of the memory of the device.
    """
    if kind == "pixel":
        return PixelCodec(channels or GEOMETRIES[kind].channels)
    source = location(kind, path)
    config = _config(source, kind=kind)
    actual = _config_geometry(config, source, kind=kind)
    expected = GEOMETRIES.get(kind, actual)
    if actual != expected:
        has, needs = (f"{each.factor} pixels per cell and {each.channels} channels" for each in (actual, expected))
        raise ValueError(f"{source.folder}: has {has}, codec {kind} has {needs}: use codec kl for other autoencoders of that class")
    network = _network(source, config, kind=kind)
    return CLASSES[AUTOENCODERS[kind]](network, actual, device=device, memory_gb=memory_gb)


def without_weights(kind: str, path: str | Path | None = None, *, memory_gb: float | None = None) -> Autoencoder:
    """A codec that can only tell its `tiling`: its network is on the meta device. path: None for the published architecture.

    kind: any but pixel. Raises ValueError if there is no config at `path`, or diffusers is missing.
    """
    config = PUBLISHED[AUTOENCODERS[kind]] if path is None else _config(location(kind, path), kind=kind)
    with torch.device("meta"):
        network = _network_class(kind).from_config(dict(config))
    known = GEOMETRIES.get(kind) or Geometry(2 ** (len(network.config.block_out_channels) - 1), network.config.latent_channels)
    return CLASSES[AUTOENCODERS[kind]](network, known, device="meta", memory_gb=memory_gb)


def weights_folder(kind: str, path: str | Path | None) -> Path:
    """The folder of a codec's weights. Raises ValueError for an unknown kind, a missing path and a missing folder."""
    return location(kind, path).folder


def digest(path: str | Path) -> str:
    """Digest of the weights at `path` (see `tim.pretrained.weight_files.digest`). Raises ValueError if there are none."""
    return weight_files.digest(path, parts=PARTS)


def location(kind: str, path: str | Path | None, *, only_config: bool = False) -> Location:
    """Location of a codec's weights; with `only_config`, those of a hub are not downloaded. Raises ValueError like `weights_folder`."""
    if kind not in CODECS:
        raise ValueError(f"unknown codec {kind!r}: choose one of {', '.join(CODECS)}")
    if path is None:
        raise ValueError(f"codec {kind} needs its weights: give its path, a folder that diffusers reads or hf://OWNER/NAME")
    return weight_files.locate_config(path, parts=PARTS) if only_config else weight_files.locate(path, parts=PARTS)


def _config(source: Location, *, kind: str) -> dict[str, Any]:
    """The config of an autoencoder: config.json, or derived from the shapes in a weights file that has none beside it."""
    is_bare = not (source.folder / "config.json").is_file()
    if is_bare and (source.file is not None or len(list(source.folder.glob(f"*{weight_files.SAFE}"))) == 1):
        return single_file.derived_config(_weights_file(source), kind=kind)
    return read_config(source.folder)


def _config_geometry(config: dict[str, Any], source: Location, *, kind: str) -> Geometry:
    """The geometry in the config of the weights."""
    if config.get("_class_name") != AUTOENCODERS[kind]:
        raise ValueError(f"{source.folder}: has {config.get('_class_name')}, codec {kind} is {AUTOENCODERS[kind]}")
    blocks = config.get("encoder_block_out_channels") or config.get("block_out_channels") or ()
    rows, columns = config.get("patch_size", (2, 2)) if kind == "flux2-vae" else (1, 1)
    return Geometry(2 ** (len(blocks) - 1) * rows, int(config["latent_channels"]) * rows * columns)


def _network_class(kind: str) -> Any:
    """diffusers' class of a kind. Raises ValueError if it is missing."""
    try:
        import diffusers  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError(f"codec {kind} needs diffusers: pip install 'tim[latent]'") from None
    network_class = getattr(diffusers, AUTOENCODERS[kind], None)
    if network_class is None:
        raise ValueError(f"codec {kind} needs a diffusers with {AUTOENCODERS[kind]}, this is {diffusers.__version__}: update it")
    return network_class


def _network(source: Location, config: dict[str, Any], *, kind: str) -> Any:
    """The autoencoder with its weights in float32. Raises ValueError if diffusers is missing, or cannot read them."""
    network_class = _network_class(kind)
    try:
        if not (source.folder / "config.json").is_file() or (source.file is not None and single_file.is_original(read_header(source.file))):
            network, missing = single_file.load(network_class, _weights_file(source), config)
        else:
            with weight_files.loadable(source, stem=STEM, pickle_stem=STEM) as (weights, arguments):
                options = {**arguments, "torch_dtype": torch.float32, "output_loading_info": True}
                network, info = network_class.from_pretrained(weights, **options)
                missing = info["missing_keys"]
    except weight_files.FAILURES as error:
        raise weight_files.failure(source, error, library="diffusers") from error
    if missing:
        raise ValueError(f"{source.file or source.folder}: its weights lack {min(missing)}: weights and config are of different models")
    return network


def _weights_file(source: Location) -> Path:
    return weight_files.weights_file(source, stem=STEM, pickle_stem=STEM)
