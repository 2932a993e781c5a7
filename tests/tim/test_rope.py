from __future__ import annotations

import torch

from tim import PackedTokens
from tim.rope import rotate, rotations

PACKED = PackedTokens.from_latents([torch.zeros(1, 3, 5), torch.zeros(1, 4, 2)], 1)


def test_each_half_of_a_head_turns_with_one_coordinate() -> None:
    turns = rotations(PACKED, head_dim=8, layout="rowcol")[:, 0]
    row, column = PACKED.positions.float().unbind(-1)
    expected = torch.stack([column, column / 100, row, row / 100], dim=-1)
    torch.testing.assert_close(turns, torch.polar(torch.ones_like(expected), expected))


def test_a_rotation_turns_interleaved_pairs() -> None:
    x = torch.tensor([[[1.0, 0.0, 0.0, 1.0]]])
    quarter_turns = torch.tensor([[[1j, -1j]]])
    torch.testing.assert_close(rotate(x, quarter_turns), torch.tensor([[[0.0, 1.0, 1.0, 0.0]]]))


def test_centred_differs_from_rowcol_by_one_turn_per_image_and_mirrors_around_the_middle() -> None:
    corner = rotations(PACKED, head_dim=8, layout="rowcol")[:, 0]
    middle = rotations(PACKED, head_dim=8, layout="centred")[:, 0]
    for image in (slice(0, 15), slice(15, 23)):
        turn = corner[image] / middle[image]
        torch.testing.assert_close(turn, turn[:1].expand_as(turn))
        torch.testing.assert_close(middle[image].flip(0), middle[image].conj())


def test_legacy_counts_along_the_wrong_side() -> None:
    angles = rotations(PackedTokens.from_latents([torch.zeros(1, 2, 3)], 1), head_dim=4, layout="legacy")[:, 0].angle()
    assert angles[:, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert angles[:, 1].tolist() == [0, 0, 1, 1, 2, 2]
