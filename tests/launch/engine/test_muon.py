"""Muon's orthogonalised steps. The ranks' shares of them are tested in tests/distributed/test_engine.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from launch.engine.muon import hidden_matrices, orthogonalise


@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_singular_values_end_near_one_whatever_they_were(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    matrix = (u * torch.logspace(-0.7, 0.7, len(s))) @ v
    found = orthogonalise(matrix)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(found.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_a_step_is_torchs_up_to_its_half_precision() -> None:
    matrix = nn.Parameter(torch.zeros(40, 24))
    optimizer = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    matrix.grad = torch.randn(40, 24, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    expected = -0.1 * 0.2 * 40**0.5 * orthogonalise(matrix.grad)
    assert float((matrix.detach() - expected).norm() / expected.norm()) < 0.03


def test_only_the_blocks_matrices_are_hidden() -> None:
    network = nn.Module()
    network.embedding, network.blocks = nn.Linear(4, 8), nn.ModuleList([nn.Linear(8, 8)])
    block = network.blocks[0]
    assert isinstance(block, nn.Linear)
    assert [id(p) for p in hidden_matrices(network)] == [id(block.weight)]
