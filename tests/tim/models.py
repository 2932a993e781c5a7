"""Tiny models of other libraries, as their `save_pretrained` writes them, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

AUTOENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": (
        "AutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "latent_channels": 6,
            "scaling_factor": 0.5,
            "shift_factor": 0.25,
        },
    ),
    "sd-vae": (
        "AutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (4,) * 4,
            "norm_num_groups": 2,
            "latent_channels": 4,
        },
    ),
    "flux-vae": (
        "AutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (4,) * 4,
            "norm_num_groups": 2,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    ),
    "flux2-vae": ("AutoencoderKLFlux2", {"block_out_channels": (4,) * 4, "norm_num_groups": 2}),
    "dc-ae": (
        "AutoencoderDC",
        {
            "latent_channels": 32,
            "attention_head_dim": 8,
            "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock",
            "encoder_block_out_channels": (8,) * 6,
            "decoder_block_out_channels": (8,) * 6,
            "encoder_layers_per_block": (1,) * 6,
            "decoder_layers_per_block": (1,) * 6,
            "encoder_qkv_multiscales": ((),) * 6,
            "decoder_qkv_multiscales": ((),) * 6,
            "downsample_block_type": "Conv",
            "upsample_block_type": "interpolate",
            "encoder_out_shortcut": False,
            "decoder_in_shortcut": False,
            "decoder_norm_types": "rms_norm",
            "decoder_act_fns": "silu",
            "scaling_factor": 0.41407,
        },
    ),
    "tiny": (
        "AutoencoderTiny",
        {
            "encoder_block_out_channels": (8,) * 3,
            "decoder_block_out_channels": (8,) * 3,
            "num_encoder_blocks": (1,) * 3,
            "num_decoder_blocks": (1,) * 3,
        },
    ),
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "image", "number", "of", "red", "small", "large", *"0123456789"]


def autoencoder(folder: Path, kind: str) -> Path:
    """A folder that codec `kind` reads."""
    diffusers = pytest.importorskip("diffusers")
    name, settings = AUTOENCODERS[kind]
    torch.manual_seed(0)
    network = getattr(diffusers, name)(**settings)
    if hasattr(network, "bn"):
        network.bn.running_mean.normal_()
        network.bn.running_var.uniform_(0.5, 2)
    network.save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    """A text encoder of transformers, 24 wide, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **shape)).save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    """The encoder of an encoder-decoder, 16 wide."""
    transformers = pytest.importorskip("transformers")
    bert(folder)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


def gemma(folder: Path) -> Path:
    """A causal language model, 32 wide."""
    transformers = pytest.importorskip("transformers")
    bert(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = transformers.Gemma3TextConfig(vocab_size=len(WORDS), intermediate_size=32, **shape)
    transformers.Gemma3TextModel(config).save_pretrained(folder)
    return folder


def clip(folder: Path, *, vision: dict[str, int] | None = None, text: dict[str, int] | None = None) -> Path:
    """open_clip's folder of a CLIP whose text tower is 32 wide and reads 16 tokens, but for what `vision` and `text` change."""
    import open_clip

    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16, **(vision or {})},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **(text or {})},
    }
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    folder.mkdir(parents=True, exist_ok=True)
    described = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder
