"""Autoencoders from one weights file, in the layout of their authors or of diffusers, with or without a config.

The architecture of a KL autoencoder follows from the shapes of its weights. Its scaling factors do not: they follow from the codec's kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tim.pretrained.headers import read_header
from tim.pretrained.official import read_weights

FACTORS: dict[str, dict[str, float]] = {  # by kind, from the published configs
    "sd-vae": {"scaling_factor": 0.18215},
    "sd3-vae": {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux-vae": {"scaling_factor": 0.3611, "shift_factor": 0.1159},
    "flux2-vae": {},
}
PREFIXES = ("first_stage_model.", "vae.")  # of the autoencoder in a checkpoint of a whole model


def derived_config(file: Path, *, kind: str) -> dict[str, Any]:
    """The config of a KL autoencoder in a file without one. Raises ValueError, naming what is missing, if it cannot be known."""
    if kind not in FACTORS:
        what = "scaling factor" if kind == "kl" else "architecture"
        kinds = f", or give one of the kinds {', '.join(FACTORS)}" if kind == "kl" else ""
        raise ValueError(f"{file}: its {what} is not in the file: put its config.json beside it{kinds}")
    shapes = {name: tuple(tensor.shape) for name, tensor in _names(read_header(file)).items()}
    levels = "encoder.down.{}.block.{}" if is_original(shapes) else "encoder.down_blocks.{}.resnets.{}"
    encoder = _channels(shapes, levels)
    decoder = _channels(shapes, levels.replace("encoder.down", "decoder.up"))
    if not encoder or not decoder or "decoder.conv_in.weight" not in shapes:
        raise ValueError(f"{file}: not a KL autoencoder with encoder and decoder; codec {kind} needs both")
    config: dict[str, Any] = {
        "_class_name": "AutoencoderKLFlux2" if kind == "flux2-vae" else "AutoencoderKL",
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * len(encoder),
        "up_block_types": ["UpDecoderBlock2D"] * len(encoder),
        "block_out_channels": encoder,
        "layers_per_block": sum(f"{levels.format(0, j)}.conv1.weight" in shapes for j in range(16)),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(name.startswith(("encoder.mid.attn", "encoder.mid_block.attentions")) for name in shapes),
        **FACTORS[kind],
    }
    if kind == "flux2-vae":
        config["decoder_block_out_channels"] = decoder if is_original(shapes) else decoder[::-1]
    return config


def is_original(names: Mapping[str, Any]) -> bool:
    """Whether the weights have their authors' names, not those of diffusers."""
    return any(part in name for name in names for part in ("encoder.down.0.", "encoder.project_in.", "encoder.stages."))


def load(network_class: Any, file: Path, config: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """A diffusers autoencoder from one file and a config, and the names of weights that the file lacks.

    Raises what reading and converting the file raises.
    """
    from diffusers.loaders import single_file_utils  # pyright: ignore[reportMissingImports]

    weights = _names(read_weights(file))
    if is_original(weights):
        if config["_class_name"] == "AutoencoderDC":
            weights = single_file_utils.convert_autoencoder_dc_checkpoint_to_diffusers(weights)
        else:
            statistics = {name: value for name, value in weights.items() if name.startswith("bn.")}
            weights = {**single_file_utils.convert_ldm_vae_checkpoint(weights, config), **statistics}
    network = network_class.from_config(dict(config))
    missing = network.load_state_dict(weights, strict=False).missing_keys
    return network.float(), [name for name in missing if not name.endswith("num_batches_tracked")]


def _names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's weights without their prefix in a whole model; FLUX.2's quantising convolutions by the names of diffusers."""
    prefix = next((each for each in PREFIXES if any(name.startswith(each) for name in weights)), "")
    inside = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    return {
        name.replace("encoder.quant_conv.", "quant_conv.").replace("decoder.post_quant_conv.", "post_quant_conv."): value
        for name, value in inside.items()
    }


def _channels(shapes: Mapping[str, tuple[int, ...]], levels: str) -> list[int]:
    """Output channels of the stages of an encoder or decoder."""
    names = [f"{levels.format(i, 0)}.conv1.weight" for i in range(16)]
    return [shapes[name][0] for name in names if name in shapes]
