"""The published files, as people find them: safetensors and pickles, bare and nested."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tim.tiny import TINY
from tim import TransitionTransformer
from tim.pretrained.official import NESTS, read_weights


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_kind_of_file_and_nesting(tiny: TransitionTransformer, tmp_path: Path) -> None:
    weights = tiny.to_official()
    other = {name: value + 1 for name, value in weights.items()}
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "b.bin")
    torch.save({"step": 7, "model": other, "ema": {"state_dict": weights, "decay": 0.99}}, tmp_path / "c.pt")
    torch.save({"state_dict": {"model": weights}}, tmp_path / "d.pth")
    for name in ("a.safetensors", "b.bin", "c.pt", "d.pth"):
        network = TransitionTransformer.from_official(TINY)
        network.load_official(tmp_path / name)
        assert equal(network.to_official(), weights), name
    network = TransitionTransformer.from_official(TINY)
    network.load_official({"ema": weights})
    assert equal(network.to_official(), weights)


@pytest.mark.parametrize("nest", NESTS)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model."])
def test_wrappers_leave_their_names(nest: str, prefix: str, tiny: TransitionTransformer) -> None:
    weights = tiny.to_official()
    network = TransitionTransformer.from_official(TINY)
    network.load_official({"step": 3, nest: {prefix + name: value for name, value in weights.items()}})
    assert equal(network.to_official(), weights)


def test_names_of_averaging_and_of_compiled_and_sharded_blocks(tiny: TransitionTransformer) -> None:
    weights = tiny.to_official()
    blocks = {name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._orig_mod."): value for name, value in weights.items()}
    averaged = {"n_averaged": torch.tensor(3), **{f"module.{name}": value for name, value in weights.items()}}
    both = {f"online_model.{name}": value + 1 for name, value in weights.items()}
    both |= {"initted": torch.tensor(1), **{f"ema_model.{name}": value for name, value in weights.items()}}
    for given in (blocks, averaged, both):
        network = TransitionTransformer.from_official(TINY)
        network.load_official(given)
        assert equal(network.to_official(), weights)


def test_a_copy_is_a_copy(tiny: TransitionTransformer) -> None:
    weights = tiny.to_official()
    weights["final_layer.linear.bias"] += 1
    assert not equal(weights, tiny.to_official())


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("exploded"),)  # pyright: ignore[reportReturnType]


def test_files_that_are_no_weights_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Bomb()}, tmp_path / "bomb.pt")
    torch.save({"step": 3, "optimizer": [1]}, tmp_path / "empty.pt")
    torch.save({"ema": {"x": torch.zeros(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "values.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "network.pt")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")
    (tmp_path / "nothing.pt").touch()
    (tmp_path / "half.pt").write_bytes((tmp_path / "network.pt").read_bytes()[:500])
    (tmp_path / "text.bin").write_text("no pickle")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    refusals = {
        "bomb.pt": "cannot read weights",
        "empty.pt": "or under ema, .*, module; found step, optimizer",
        "values.pt": r"it contains argparse\.Namespace, which could run code: save its weights alone",
        "network.pt": r"it contains torch\.nn\.modules\.linear\.Linear, which could run code",
        "page.pt": "it is truncated, damaged, or not a torch.save file",
        "nothing.pt": "it is truncated, damaged, or not a torch.save file",
        "half.pt": "it is truncated, damaged, or not a torch.save file",
        "text.bin": "cannot read weights",
        "cut.safetensors": "cannot read weights",
        "none.pt": "no such file",
    }
    for name, message in refusals.items():
        with pytest.raises(ValueError, match=message) as refusal:
            read_weights(tmp_path / name)
        assert str(refusal.value).startswith(str(tmp_path / name))
        assert "\n" not in str(refusal.value)
        assert "\x1b" not in str(refusal.value)
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "weights.npz").touch()
    with pytest.raises(ValueError, match=r"are read from \.safetensors, \.bin"):
        read_weights(tmp_path / "weights.npz")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: these weights do not fit this network: missing keys"):
        TransitionTransformer.from_official(TINY).load_official(tmp_path / "other.safetensors")
