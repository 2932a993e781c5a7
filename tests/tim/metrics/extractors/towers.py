"""Tiny networks with random weights, as their libraries write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.tim.models import WORDS, bert

VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32, "patch_size": 16}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": len(WORDS)}


def noise(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Images of random pixels, of these widths and heights."""
    generator = torch.Generator().manual_seed(0)
    return [
        Image.frombytes("RGB", size, bytes(torch.randint(256, (size[0] * size[1] * 3,), generator=generator).tolist())) for size in sizes
    ]


def inception(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Random weights of FID's Inception in a file, and torch-fidelity's own extractor with them."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # its constructor has no way without a file
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    for layer in network.modules():  # else features vanish
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.normal_(layer.weight, std=(2 / layer.weight[0].numel()) ** 0.5)
    torch.save(network.state_dict(), path)
    return network


def transformers_clip(folder: Path, *, kind: str = "CLIP") -> Path:
    """A CLIP or SigLIP of transformers that reads 8 tokens, with its image processor and a tokenizer of a few words."""
    transformers = pytest.importorskip("transformers")
    bert(folder)
    names = ["input_ids", "attention_mask"] if kind == "CLIP" else ["input_ids"]
    transformers.BertTokenizer(str(folder / "vocab.txt"), model_input_names=names).save_pretrained(folder)
    text = {**TEXT, "max_position_embeddings": 8, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    shape = {"projection_dim": 24} if kind == "CLIP" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=VISION, **shape)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    if kind == "CLIP":
        size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    else:
        transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def dinov2(folder: Path) -> Path:
    """A DINOv2 of transformers whose processor resizes to 36 pixels and crops 28."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    transformers.Dinov2Model(transformers.Dinov2Config(**shape)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 28, "width": 28}}
    transformers.BitImageProcessor(**size).save_pretrained(folder)
    return folder


class Payload:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.mkdir, (str(self.folder),)
