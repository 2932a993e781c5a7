"""Published networks: their recipes, and where the hub has their weights, codec and text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

GEMMA = "hf://google/gemma-3-1b-it"
DC_AE, SD_VAE = "DC-AE f32c32 of Sana 1.1", "SD-VAE-ft-EMA"


@dataclass(frozen=True, slots=True)
class Published:
    """A published network.

    about: what it draws; parameters: without the projection for the alignment teacher; codec_name, text_name: for people, None: it has no
    text encoder; network, codec, text: hub addresses, None if the user must give the file.
    """

    about: str
    parameters: int
    codec_name: str
    text_name: str | None = None
    network: str | None = None
    codec: str | None = None
    text: str | None = None


# Parameters as counted in the published code.
PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "t2i-xl-1": Published("text to image", 864_978_080, DC_AE, text_name="Gemma 3 1B, gated", text=GEMMA),
        "c2i-xl-1-512": Published("ImageNet, 512 × 512", 664_164_896, DC_AE),
        "c2i-xl-2-256": Published("ImageNet, 256 × 256", 664_128_016, SD_VAE),
        "c2i-b-4-256": Published("ImageNet, 256 × 256", 128_828_224, SD_VAE),
    }
)


def listing() -> str:
    """What `tim pull` can build, as a table."""
    rows = [("recipe", "draws", "network", "codec", "text encoder")]
    for recipe, found in PUBLISHED.items():
        size = f"{found.parameters / 1e6:,.0f}M, {4 * found.parameters / 1e9:.1f} GB"
        network = f"{size} in fp32: {found.network or '--network'}"
        text = "none" if found.text_name is None else f"{found.text_name}: {found.text or '--text'}"
        rows.append((recipe, found.about, network, f"{found.codec_name}: {found.codec or '--codec'}", text))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "An option in place of an address: give a file, a folder or hf://OWNER/NAME there."])
