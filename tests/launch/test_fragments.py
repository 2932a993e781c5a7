from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.ema import ShardedEMA, decay_at
from launch.fragments import Fragment, assemble, load, save

WHOLE = {"a": torch.arange(24.0).view(4, 6), "b": torch.arange(5.0), "c": torch.tensor(7.0)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in WHOLE.items()}


def cut(at: list[int]) -> list[dict[str, Fragment]]:
    """All parameters laid end to end and cut into pieces, as ZeRO does, wherever parameters begin."""
    pieces = []
    for low, high in zip([0, *at], [*at, 30], strict=True):
        piece, position = {}, 0
        for name, tensor in WHOLE.items():
            first, last = max(low - position, 0), min(high - position, tensor.numel())
            if first < last:
                piece[name] = Fragment(first, tensor.flatten()[first:last].clone())
            position += tensor.numel()
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize("at", [[], [15], [1, 2, 3], [24, 24, 29], [7, 26]])
def test_pieces_become_whole_again(tmp_path: Path, at: list[int]) -> None:
    for rank, piece in enumerate(cut(at)):
        save(tmp_path / str(rank), piece, shapes=SHAPES)
    loaded = [load(tmp_path / str(rank)) for rank in reversed(range(len(at) + 1))]
    whole = assemble([pieces for pieces, _ in loaded], shapes=loaded[0][1])
    assert list(whole) == list(WHOLE)
    for name, tensor in WHOLE.items():
        assert torch.equal(whole[name], tensor), name


def test_a_gap_an_overlap_and_a_stranger_are_refused(tmp_path: Path) -> None:
    first, second, third = cut([7, 26])
    with pytest.raises(ValueError, match="a: the ranks' fragments cover 7 of 24"):
        assemble([first, third], shapes=SHAPES)
    with pytest.raises(ValueError, match="a: the ranks' fragments cover 7 of 24"):
        assemble([first, first, second, third], shapes=SHAPES)
    (tmp_path / "x").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load(tmp_path / "x")


def test_the_average_warms_up() -> None:
    assert [decay_at(n, decay=0.99) for n in (0, 90)] == [0.1, 0.91]
    assert decay_at(10**6, decay=0.99) == 0.99


def test_sharded_average_is_the_average(tmp_path: Path) -> None:
    whole = {name: tensor.clone() for name, tensor in WHOLE.items()}
    ranks = [ShardedEMA(piece, shapes=SHAPES, decay=0.3) for piece in cut([7, 26])]
    for updates in range(4):
        for name, tensor in whole.items():
            decay = min(0.3, (1 + updates) / (10 + updates))
            tensor.mul_(decay).add_(WHOLE[name] * (updates + 2), alpha=1 - decay)
        for ema, piece in zip(ranks, cut([7, 26]), strict=True):
            ema.update({name: Fragment(part.start, part.values * (updates + 2)) for name, part in piece.items()}, updates=updates)
    for name, tensor in assemble([ema.average for ema in ranks], shapes=SHAPES).items():
        torch.testing.assert_close(tensor, whole[name])

    ranks[0].save(tmp_path / "0")
    again = ShardedEMA(cut([7, 26])[0], shapes=SHAPES, decay=0.3)
    again.load(tmp_path / "0")
    assert torch.equal(again.average["a"].values, ranks[0].average["a"].values)
    with pytest.raises(ValueError, match="belong to another network, rank or ZeRO stage"):
        ranks[1].load(tmp_path / "0")


def test_decay_zero_is_a_copy() -> None:
    ema = ShardedEMA(cut([])[0], shapes=SHAPES, decay=0.0)
    ema.update({name: Fragment(0, piece.values * 5) for name, piece in cut([])[0].items()}, updates=3)
    assert torch.equal(ema.average["a"].values, WHOLE["a"].flatten() * 5)
