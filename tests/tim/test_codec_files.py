"""Autoencoders in one file: their authors' or diffusers' names, alone or in a checkpoint of a whole model, with and without a config."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tim.models import autoencoder
from tim import codecs

WIDTH = 32  # group norms of the published autoencoders have 32 groups
IMAGE = torch.arange(3 * 32 * 32).remainder(251).to(torch.uint8).view(3, 32, 32)
BLOCKS = {f"{side}_block_types": (f"{name}Block2D",) * 4 for side, name in (("down", "DownEncoder"), ("up", "UpDecoder"))}
KINDS: dict[str, dict[str, Any]] = {
    "sd-vae": {"latent_channels": 4, "scaling_factor": 0.18215, **BLOCKS},
    "sd3-vae": {
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **BLOCKS,
    },
    "flux2-vae": {},
}


def original(weights: dict[str, Tensor], *, blocks: int = 4) -> dict[str, Tensor]:
    """Weights of a KL autoencoder with the names that its authors gave them."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[1] in ("down_blocks", "up_blocks"):
            side, place = ("down", int(parts[2])) if parts[1] == "down_blocks" else ("up", blocks - 1 - int(parts[2]))
            inner = {"resnets": f"block.{parts[4]}", "downsamplers": "downsample", "upsamplers": "upsample"}[parts[3]]
            parts = [parts[0], side, str(place), inner, *parts[5:]]
        elif parts[1] == "mid_block":
            place = f"block_{int(parts[3]) + 1}" if parts[2] == "resnets" else "attn_1"
            names = {"group_norm": ["norm"], "to_q": ["q"], "to_k": ["k"], "to_v": ["v"], "to_out": ["proj_out"]}
            rest = [*names.get(parts[4], [parts[4]]), parts[-1]]
            is_matrix = parts[2] == "attentions" and value.ndim == 2
            value = value[..., None, None] if is_matrix else value
            parts = [parts[0], "mid", place, *rest]
        renamed = ".".join(parts).replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        found[renamed] = value.contiguous()
    return found


def saved(kind: str, folder: Path) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network_class = diffusers.AutoencoderKLFlux2 if kind == "flux2-vae" else diffusers.AutoencoderKL
    network = network_class(block_out_channels=(WIDTH,) * 4, layers_per_block=1, **KINDS[kind])
    if kind == "flux2-vae":
        network.bn.running_mean.normal_()
        network.bn.running_var.uniform_(0.5, 2)
    network.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_alone_equals_its_folder(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "vae")
    expected = codecs.make(kind, folder)
    latent = expected.encode([IMAGE]).means[0]
    pixels = expected.decode([latent])[0]
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    names = original(weights)
    if kind == "flux2-vae":
        names = {
            name.replace("post_quant_conv", "decoder.post_quant_conv")
            if name.startswith("post")
            else name.replace("quant_conv", "encoder.quant_conv"): value
            for name, value in names.items()
        }
    whole_model = {**{f"first_stage_model.{name}": value for name, value in names.items()}, "model.diffusion_model.x": torch.zeros(1)}
    for place, content in enumerate((names, whole_model, weights)):
        file = tmp_path / str(place) / "ae.safetensors"
        file.parent.mkdir()
        save_file(content, file)
        for path in (file, file.parent):
            codec = codecs.make(kind, path)
            assert codecs.geometry(kind, path) == (codec.factor, codec.channels) == (expected.factor, expected.channels)
            torch.testing.assert_close(codec.encode([IMAGE]).means[0], latent)
            assert torch.equal(codec.decode([latent])[0], pixels)


def test_a_file_of_its_authors_beside_its_config(tmp_path: Path) -> None:
    folder = autoencoder(tmp_path, "kl")
    expected = codecs.make("kl", folder).encode([IMAGE]).means[0]
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file(original(weights, blocks=2), folder / "ae.safetensors")
    torch.testing.assert_close(codecs.make("kl", folder / "ae.safetensors").encode([IMAGE]).means[0], expected)


def test_what_a_file_lacks_is_named(tmp_path: Path) -> None:
    folder = saved("sd-vae", tmp_path / "vae")
    file = tmp_path / "ae.safetensors"
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", file)
    weights = load_file(file)
    decoder = tmp_path / "decoder" / "decoder.safetensors"
    decoder.parent.mkdir()
    save_file({name: value for name, value in weights.items() if name.startswith("decoder")}, decoder)
    cut = tmp_path / "cut" / "cut.safetensors"
    cut.parent.mkdir()
    save_file({name: value for name, value in weights.items() if name != "decoder.conv_out.bias"}, cut)
    for kind, path, said in (
        (
            "kl",
            file,
            r"ae\.safetensors: its scaling factor is not in the file: put its config\.json beside it, or give one of the kinds sd-vae,",
        ),
        ("dc-ae", file, r"ae\.safetensors: its architecture is not in the file: put its config\.json beside it$"),
        ("sd-vae", decoder, r"decoder\.safetensors: not a KL autoencoder with encoder and decoder; codec sd-vae needs both"),
        ("sd-vae", cut, r"cut\.safetensors: its weights lack decoder\.conv_out\.bias"),
        ("sd3-vae", file, r"has 8 pixels per cell and 4 channels, codec sd3-vae has 8 pixels per cell and 16 channels"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            codecs.make(kind, path)
        assert "\n" not in str(caught.value)
