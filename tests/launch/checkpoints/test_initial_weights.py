"""Weights of trained networks from every place where people have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from launch.checkpoints.export import export
from launch.checkpoints.initial_weights import load_weights
from tests.launch.checkpoints.test_export import CONFIG, save_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose averaged weights are 3 and 5 in its checkpoints of these steps."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    for step in (3, 5):
        save_checkpoint(folder, step=step)
    return folder


def value_of(path: Path, *, ema: bool = True) -> float:
    return float(load_weights(path, ema=ema).state["final_layer.linear.bias"][0])


def test_every_place(run: Path, tmp_path: Path) -> None:
    export(run, out=tmp_path / "model")
    export(run, out=tmp_path / "official", official=True)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    torch.save({"model_ema": {f"module._orig_mod.{name}": value for name, value in weights.items()}}, tmp_path / "weights.pt")
    assert value_of(run) == 5
    assert value_of(run, ema=False) == 50
    assert value_of(run / "checkpoints" / "step-000003") == 3
    for name in ("model", "official", "official/model.safetensors", "weights.pt"):
        assert value_of(tmp_path / name) == 5, name
        assert load_weights(tmp_path / name).state.keys() == weights.keys()
    assert load_weights(tmp_path / "weights.pt").params is None
    params = {load_weights(place).params["hidden_size"] for place in (run, tmp_path / "model", tmp_path / "official")}  # pyright: ignore
    assert params == {32}
    assert {load_weights(place).rope for place in (run, tmp_path / "model")} == {"rowcol"}


def test_a_folder_without_a_description_is_its_one_file(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "t2i.safetensors")
    assert load_weights(tmp_path).params is None
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"holds other\.safetensors, t2i\.safetensors: give the path of one file"):
        load_weights(tmp_path)


def test_what_is_none_of_these_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "network.yaml").write_text("model: {network: 3}")
    save_file({"x": torch.ones(1)}, tmp_path / "nothing" / "model.safetensors")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "network.yaml").write_text("model: [")
    save_file({"x": torch.ones(1)}, tmp_path / "broken" / "model.safetensors")
    (tmp_path / "edm").mkdir()
    described = {"model": {"network": {"params": {}}, "transport": {"target": "tim.schedulers.transports.EDM"}}}
    (tmp_path / "edm" / "network.yaml").write_text(yaml.safe_dump(described))
    save_file({"x": torch.ones(1)}, tmp_path / "edm" / "model.safetensors")
    for name, said in (
        (
            "absent",
            "no such folder or weight file; give a model folder, a run folder, a checkpoint of a run, an export of",
        ),
        ("empty", "not a model folder or a run folder, and has no weight file; give a model folder"),
        ("nothing", r"network\.yaml: has no model\.network\.params"),
        ("broken", r"network\.yaml: while parsing"),
        ("edm", r"network\.yaml: model\.transport\.target EDM: expected one of OT_FM"),
    ):
        with pytest.raises(ValueError, match=said) as refusal:
            load_weights(tmp_path / name)
        assert str(refusal.value).startswith(str(tmp_path / name))
        assert "\n" not in str(refusal.value)
