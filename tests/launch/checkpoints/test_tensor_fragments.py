from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launch.checkpoints.tensor_fragments import Fragment, ShardedTensors, save
from launch.engine.ema import ShardedEMA, decay_at

WHOLE = {"a": torch.arange(24.0).view(4, 6), "b": torch.arange(5.0), "c": torch.tensor(7.0)}
ELEMENTS = 30
SHAPES = {name: tuple(tensor.shape) for name, tensor in WHOLE.items()}


def cut(at: list[int]) -> list[dict[str, Fragment]]:
    """All parameters laid end to end and cut into pieces, as ZeRO does, wherever parameters begin."""
    pieces = []
    for low, high in zip([0, *at], [*at, ELEMENTS], strict=True):
        piece, position = {}, 0
        for name, tensor in WHOLE.items():
            first, last = max(low - position, 0), min(high - position, tensor.numel())
            if first < last:
                piece[name] = Fragment(first, tensor.flatten()[first:last].clone())
            position += tensor.numel()
        pieces.append(piece)
    return pieces


def write(folder: Path, pieces: Sequence[Mapping[str, Fragment]]) -> ShardedTensors:
    paths = [folder / str(rank) for rank in range(len(pieces))]
    for path, piece in zip(paths, pieces, strict=True):
        save(path, piece, shapes=SHAPES)
    return ShardedTensors(paths)


cuts = st.lists(st.integers(0, ELEMENTS), max_size=6).map(sorted)


@given(before=cuts, after=cuts)
@example(before=[24, 24, 29], after=[7, 26])
@settings(max_examples=60, deadline=None)
def test_pieces_of_any_number_of_ranks_fill_those_of_any_other(before: list[int], after: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        saved = write(Path(folder), cut(before))
        assert dict(saved.shapes) == SHAPES
        for name, tensor in WHOLE.items():
            assert torch.equal(saved.tensor(name), tensor), name
        for expected in cut(after):
            piece = {name: Fragment(part.start, torch.zeros_like(part.values)) for name, part in expected.items()}
            saved.read_into(piece)
            assert all(torch.equal(piece[name].values, part.values) for name, part in expected.items())


def test_a_gap_an_overlap_and_a_stranger_are_refused(tmp_path: Path) -> None:
    first, second, third = cut([7, 26])
    with pytest.raises(ValueError, match="a: the ranks' fragments cover 7 of 24"):
        write(tmp_path, [first, third]).tensor("a")
    with pytest.raises(ValueError, match="a: the ranks' fragments cover 7 of 24"):
        write(tmp_path, [first, first, second, third]).tensor("a")
    assert "c" not in write(tmp_path, [first, second])
    with pytest.raises(ValueError, match="c: the ranks' fragments cover 0 of 1"):
        write(tmp_path, [first, second]).tensor("c")
    (tmp_path / "x").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a safetensors file"):
        ShardedTensors([tmp_path / "x"])


def test_the_average_warms_up() -> None:
    assert [decay_at(n, decay=0.99) for n in (0, 90)] == [0.1, 0.91]
    assert decay_at(10**6, decay=0.99) == 0.99


def test_sharded_average_is_the_average(tmp_path: Path) -> None:
    whole = {name: tensor.clone() for name, tensor in WHOLE.items()}
    ranks = [ShardedEMA(piece, decay=0.3) for piece in cut([7, 26])]
    for updates in range(4):
        for name, tensor in whole.items():
            decay = min(0.3, (1 + updates) / (10 + updates))
            tensor.mul_(decay).add_(WHOLE[name] * (updates + 2), alpha=1 - decay)
        for ema, piece in zip(ranks, cut([7, 26]), strict=True):
            ema.update({name: Fragment(part.start, part.values * (updates + 2)) for name, part in piece.items()}, updates=updates)
    averaged = write(tmp_path, [ema.average for ema in ranks])
    for name, tensor in whole.items():
        torch.testing.assert_close(averaged.tensor(name), tensor)


def test_decay_zero_is_a_copy() -> None:
    ema = ShardedEMA(cut([])[0], decay=0.0)
    ema.update({name: Fragment(0, piece.values * 5) for name, piece in cut([])[0].items()}, updates=3)
    assert torch.equal(ema.average["a"].values, WHOLE["a"].flatten() * 5)
