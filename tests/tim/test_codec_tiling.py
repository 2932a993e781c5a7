"""Large images in tiles: the same latents and pixels as from the whole image, for every layout of layers, within the memory limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tim.codecs import Geometry, dc_ae_layers, tiles
from tim.codecs.autoencoder import GB
from tim.codecs.dc_ae import DCAE
from tim.codecs.layered import Layered
from tim.codecs.tiny import Tiny

RES, VIT = "ResBlock", "EfficientViTBlock"
LAYOUTS: dict[str, dict[str, Any]] = {
    "as f64c128 and f128c512": {
        "layers": (0, 5, 10, 2, 2, 2),
        "types": (RES,) * 3 + (VIT,) * 3,
        "scales": ((),) * 6,
        "resampling": ("interpolate", "Conv"),
        "norms": ("batch_norm",) * 3 + ("rms_norm",) * 3,
        "act": "relu",
    },
    "as f32c32": {
        "layers": (2, 2, 1, 1, 1, 2),
        "types": (RES,) * 3 + (VIT,) * 3,
        "scales": ((),) * 3 + ((5,),) * 3,
        "resampling": ("pixel_shuffle", "pixel_unshuffle"),
        "norms": "rms_norm",
        "act": "relu",
    },
    "attention between convolutions": {
        "layers": (1, 2, 1, 2),
        "types": (RES, VIT, RES, VIT),
        "scales": ((), (3, 5), (), ()),
        "resampling": ("interpolate", "pixel_unshuffle"),
        "norms": "rms_norm",
        "act": "silu",
        "shortcut": False,
    },
    "attention in every stage": {
        "layers": (1, 1),
        "types": VIT,
        "scales": ((7,), (3,)),
        "resampling": ("pixel_shuffle", "Conv"),
        "norms": "rms_norm",
        "act": "relu",
    },
}


def dc_ae(*, layers: Any, types: Any, scales: Any, resampling: Any, norms: Any, act: str, shortcut: bool = True) -> Any:
    """An AutoencoderDC with random weights and statistics."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        **{f"{part}_block_types": types for part in ("encoder", "decoder")},
        **{f"{part}_block_out_channels": (4, 8, 8, 8, 8, 8)[: len(layers)] for part in ("encoder", "decoder")},
        **{f"{part}_layers_per_block": layers for part in ("encoder", "decoder")},
        **{f"{part}_qkv_multiscales": scales for part in ("encoder", "decoder")},
        upsample_block_type=resampling[0],
        downsample_block_type=resampling[1],
        decoder_norm_types=norms,
        decoder_conv_act_fn=act,
        encoder_out_shortcut=shortcut,
        decoder_in_shortcut=shortcut,
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        elif type(module).__name__ == "RMSNorm":
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return network


def tiny() -> Any:
    torch.manual_seed(0)
    channels = {f"{part}_block_out_channels": (4,) * 3 for part in ("encoder", "decoder")}
    return pytest.importorskip("diffusers").AutoencoderTiny(**channels, num_encoder_blocks=(1, 1, 2), num_decoder_blocks=(2, 1, 1))


def codec_of(name: str, *, memory_gb: float | None = None) -> Layered:
    if name == "tiny":
        return Tiny(tiny(), Geometry(4, 4), memory_gb=memory_gb)
    network = dc_ae(**LAYOUTS[name])
    return DCAE(network, Geometry(network.spatial_compression_ratio, 4), memory_gb=memory_gb)


@pytest.mark.parametrize("name", [*LAYOUTS, "tiny"])
def test_tiles_equal_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = codec_of(name)
    height, width = (cells * whole.factor for cells in ((9, 5) if whole.factor == 32 else (17, 9)))
    pixels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    latent = whole.encode([pixels]).means[0]
    image = whole.decode([latent])[0]
    assert whole.tiling(height, width).splits == whole.tiling(height, width, "encode").splits == 1
    monkeypatch.setattr(tiles, "SMALLEST", 4)
    for share in (0.6, 0.0):  # tiles in the large maps only, and in all of them
        for direction in ("encode", "decode"):
            tiled = codec_of(name)
            tiled.memory = share * whole.tiling(height, width, direction).bytes
            plan = tiled.tiling(height, width, direction)
            assert plan.splits > 1
            if direction == "encode":
                torch.testing.assert_close(tiled.encode([pixels]).means[0], latent, rtol=0, atol=1e-4)
            else:
                assert (tiled.decode([latent])[0].int() - image.int()).abs().max() <= 1
                torch.testing.assert_close(values(tiled, latent), whole.network.decode(latent[None]).sample, rtol=0, atol=1e-4)


@torch.no_grad()
def values(codec: Layered, latent: Tensor) -> Tensor:
    """The decoder's output in tiles before it is rounded."""
    height, width = latent.shape[-2:]
    plan = tiles.plan(codec.decoder_layers(), height, width, memory=codec.memory)
    output = torch.full((1, 3, height * codec.factor, width * codec.factor), float("nan"))

    def write(rows: tiles.Span, columns: tiles.Span, tile: Tensor) -> None:
        output[..., slice(*rows), slice(*columns)] = tile

    tiles.run(plan, lambda rows, columns: latent[None, :, slice(*rows), slice(*columns)], write)
    return output


def test_the_halo_follows_from_the_layers() -> None:
    """Exactly as far as a pixel depends on the map that is tiled: one cell less would change pixels."""
    network = dc_ae(**LAYOUTS["as f64c128 and f128c512"])
    last = tiles.plan(dc_ae_layers.decoder_layers(network.decoder), 128, 128, memory=0).segments[-1]
    pixels = tiles.Span(2048, 2048 + 8)
    cells = tiles.needed(last.layers, pixels, last.heights)[0]
    assert last.heights[0] == 128 * 4  # the map at /8
    halo = (pixels.start // 8 - cells.start, cells.stop - pixels.stop // 8)
    assert halo == (16, 16)


def test_a_limit_that_is_too_low_is_named() -> None:
    codec = codec_of("tiny", memory_gb=1e-6)
    with pytest.raises(
        ValueError, match=r"codec\.memory_gb: decoding 512x256 pixels takes at least .* GB, the limit is 1e-06 GB: raise it"
    ):
        codec.decode([torch.zeros(4, 64, 128)])
    least = codec.plan_tiling(256, 512, "decode").bytes / GB
    assert codec_of("tiny", memory_gb=least * 1.001).decode([torch.zeros(4, 64, 128)])[0].shape == (3, 256, 512)
