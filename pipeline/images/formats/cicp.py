"""Code points of ITU-T H.273 (CICP), as used in AVIF and PNG, and the conversion of such colours to sRGB."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.images.formats.checked_header import Encoding
from pipeline.images.rejection import unsupported

SRGB_PRIMARIES = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290)
_D65, _C = (0.3127, 0.3290), (0.310, 0.316)
_PRIMARIES: dict[int, tuple[float, ...]] = {
    1: SRGB_PRIMARIES,
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08, *_C),
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, *_D65),
    6: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *_D65),
    7: (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *_D65),
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049, *_C),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *_D65),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *_D65),
    22: (0.630, 0.340, 0.295, 0.605, 0.155, 0.077, *_D65),
}
_UNSPECIFIED = 2
# Every viewer shows the television transfer curves (1, 6, 14, 15) as sRGB.
_TRANSFERS: dict[int, float | str] = {1: "srgb", 4: 2.2, 5: 2.8, 6: "srgb", 8: 1.0, 13: "srgb", 14: "srgb", 15: "srgb"}
_HDR = {16: "PQ", 18: "HLG"}
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_ROWS = 1 << 18  # pixels per conversion step


def cicp_encoding(primaries: int, *, transfer: int) -> Encoding | None:
    """The encoding of two code points; None for sRGB and unspecified. Raises `Rejection` for HDR and unknown ones."""
    if transfer in _HDR:
        raise unsupported(f"its levels are high dynamic range ({_HDR[transfer]})")
    curve = "srgb" if transfer == _UNSPECIFIED else _TRANSFERS.get(transfer)
    corners = SRGB_PRIMARIES if primaries == _UNSPECIFIED else _PRIMARIES.get(primaries)
    if curve is None or corners is None:
        raise unsupported(f"its colours have primaries {primaries} and transfer characteristics {transfer} (H.273)")
    if curve == "srgb" and corners == SRGB_PRIMARIES:
        return None
    return Encoding(primaries=corners, transfer=curve)  # type: ignore[arg-type]


def to_srgb_levels(pixels: NDArray[np.uint8], encoding: Encoding) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 in `encoding` → the same colours in sRGB; colours outside sRGB are clipped."""
    matrix, curve = _matrix(encoding.primaries).T, _linear(encoding.transfer)
    flat = pixels.reshape(-1, 3)
    out = np.empty_like(flat)
    for start in range(0, len(flat), _ROWS):
        light = np.clip(curve[flat[start : start + _ROWS]] @ matrix, 0, 1)
        out[start : start + _ROWS] = np.rint(255 * _srgb_level(light))
    return out.reshape(pixels.shape)


def _linear(transfer: float | str) -> NDArray[np.float32]:
    """(256,): linear light of each level."""
    level = np.arange(256) / 255
    srgb = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4)
    return (srgb if transfer == "srgb" else level ** float(transfer)).astype(np.float32)


def _srgb_level(light: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.power(light, 1 / 2.4, dtype=np.float32) - 0.055)


@lru_cache(maxsize=16)
def _matrix(primaries: tuple[float, ...]) -> NDArray[np.float32]:
    """(3, 3): linear RGB with these primaries → linear sRGB, white adapted by Bradford."""
    white, target = _xyz(*primaries[6:]), _xyz(*SRGB_PRIMARIES[6:])
    adapt = np.linalg.inv(_BRADFORD) @ np.diag((_BRADFORD @ target) / (_BRADFORD @ white)) @ _BRADFORD
    try:
        return (np.linalg.inv(_to_xyz(SRGB_PRIMARIES)) @ adapt @ _to_xyz(primaries)).astype(np.float32)
    except np.linalg.LinAlgError as error:
        raise unsupported("the primaries of its colours lie on one line") from error


def _to_xyz(primaries: tuple[float, ...]) -> NDArray[np.float64]:
    corners = np.stack([_xyz(*primaries[start : start + 2]) for start in (0, 2, 4)], axis=1)
    return corners * np.linalg.solve(corners, _xyz(*primaries[6:]))


def _xyz(x: float, y: float) -> NDArray[np.float64]:
    return np.array([x / y, 1, (1 - x - y) / y])
