"""Teachers from tiny weights on disk: right tokens at right places, for any grid."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tim import models
from tim import alignment

GRIDS = [(2, 3), (4, 4), (2, 3), (1, 5)]


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, 8 * h, 8 * w), generator=generator, dtype=torch.uint8) for h, w in GRIDS]


def radio_weights() -> dict[str, Tensor]:
    """Of a RADIO of 2 blocks, under the names of its published files."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    blocks = VisionTransformer(embed_dim=128, depth=2, num_heads=2, init_values=1.0, num_classes=0).blocks.state_dict()
    weights = {f"radio_model.model.blocks.{name}": torch.randn_like(value) * 0.1 for name, value in blocks.items()}
    weights |= {
        "radio_model.model.patch_generator.embedder.weight": torch.randn(128, 3 * 16 * 16) * 0.1,
        "radio_model.model.patch_generator.pos_embed": torch.randn(1, 8 * 8, 128),
        "radio_model.model.patch_generator.cls_token.token": torch.randn(3, 128),
    }
    return {
        **weights,
        "radio_model.input_conditioner.norm_mean": torch.rand(3, 1, 1),
        "radio_model.input_conditioner.norm_std": torch.ones(3, 1, 1),
    }


@pytest.fixture
def open_clip_folder(tmp_path: Path) -> Path:
    vision, text = {"layers": 2, "width": 64, "patch_size": 8}, {"context_length": 8, "vocab_size": 64, "layers": 1}
    return models.clip(tmp_path / "clip", vision=vision, text=text)


@pytest.fixture(params=["radio", "open_clip", "dinov2"])
def teacher(request: pytest.FixtureRequest, tmp_path: Path) -> alignment.AlignmentTeacher:
    kind = request.param
    if kind == "radio":
        save_file(radio_weights(), tmp_path / "model.safetensors")
        return alignment.make(kind, tmp_path)
    if kind == "open_clip":
        return alignment.make(kind, request.getfixturevalue("open_clip_folder"))
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56, num_register_tokens=2
    )
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path)
    return alignment.make(kind, tmp_path)


def test_every_image_has_the_tokens_of_its_own_grid(teacher: alignment.AlignmentTeacher) -> None:
    together = teacher.tokens(images(), GRIDS)
    assert together.shape == (sum(h * w for h, w in GRIDS), teacher.width)
    alone = [teacher.tokens([image], [grid]) for image, grid in zip(images(), GRIDS, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not together.requires_grad


def test_tokens_lie_where_their_patches_lie(teacher: alignment.AlignmentTeacher) -> None:
    """Of two images that differ in one corner, that corner's token differs most."""
    for grid, corner in (((3, 5), (2, 4)), ((5, 2), (0, 1))):
        plain = torch.full((3, 16 * grid[0], 16 * grid[1]), 128, dtype=torch.uint8)
        marked = plain.clone()
        row, column = corner
        marked[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = torch.arange(256, dtype=torch.uint8).view(16, 16)
        change = (teacher.tokens([marked], [grid]) - teacher.tokens([plain], [grid])).norm(dim=-1)
        assert int(change.argmax()) == row * grid[1] + column


def test_radio_sees_what_an_independent_implementation_sees(tmp_path: Path) -> None:
    from timm.models import naflexvit

    save_file(radio_weights(), tmp_path / "radio.safetensors")
    teacher = alignment.make("radio", tmp_path / "radio.safetensors")
    shape = {"embed_dim": 128, "depth": 2, "num_heads": 2, "init_values": 1.0, "reg_tokens": 2, "pos_embed_grid_size": (8, 8)}
    kept = {"class_token": True, "global_pool": "token", "final_norm": False, "patch_size": 16}
    positions = {
        "pos_embed_interp_mode": "bilinear",
        "pos_embed_ar_preserving": True,
        "pos_embed_antialias": False,
        "pos_embed_align_corners": True,
    }
    other = naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**shape, **kept, **positions), num_classes=0).eval()
    other.load_state_dict(naflexvit.checkpoint_filter_fn(radio_weights(), other))
    image = images()[0]
    for grid in ((2, 3), (8, 8), (4, 2), (11, 9)):
        pixels = torch.nn.functional.interpolate(image[None].float() / 255, (16 * grid[0], 16 * grid[1]), mode="bicubic")
        mean = radio_weights()["radio_model.input_conditioner.norm_mean"]
        with torch.no_grad():
            expected = other.forward_features(pixels - mean)
        assert isinstance(expected, Tensor)
        torch.testing.assert_close(teacher.tokens([image], [grid]), expected[0, 3:], rtol=1e-4, atol=1e-4)


def test_the_published_tar_of_radio_is_read_without_running_code(tmp_path: Path) -> None:
    weights = {
        name.replace("radio_model.model.", "base_model.").replace("radio_model.", ""): value for name, value in radio_weights().items()
    }
    torch.save({"state_dict": weights, "args": argparse.Namespace(model="vit")}, tmp_path / "radio.pth.tar")
    save_file(radio_weights(), tmp_path / "radio.safetensors")
    one, other = (alignment.make("radio", tmp_path / name).tokens(images(), GRIDS) for name in ("radio.pth.tar", "radio.safetensors"))
    assert torch.equal(one, other)
    torch.save({"state_dict": weights, "args": Path("x")}, tmp_path / "strange.pth.tar")
    with pytest.raises(ValueError, match=r"strange\.pth\.tar: cannot read weights"):
        alignment.make("radio", tmp_path / "strange.pth.tar")


def test_the_open_clip_tower_at_its_own_size_says_what_open_clip_says(open_clip_folder: Path) -> None:
    import open_clip

    model: Any = open_clip.create_model(f"local-dir:{open_clip_folder}").eval()
    model.visual.output_tokens = True
    image = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    teacher = alignment.make("open_clip", open_clip_folder)
    teacher.tokens(images(), GRIDS)  # other sizes in between leave no trace
    with torch.no_grad():
        expected = model.visual((image[None] / 255 - 0.5) / 0.25)[1]
    torch.testing.assert_close(teacher.tokens([image], [(4, 4)]), expected[0], rtol=1e-4, atol=1e-4)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown alignment teacher 'vgg': choose one of radio, dinov2, open_clip"):
        alignment.make("vgg", tmp_path)
    with pytest.raises(ValueError, match=r"nowhere: no such file or folder; give the local weights of the alignment teacher radio"):
        alignment.make("radio", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"not an open_clip folder: it needs open_clip_config\.json"):
        alignment.make("open_clip", tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not RADIO weights: no key ends with patch_generator\.embedder\.weight"):
        alignment.make("radio", tmp_path)
