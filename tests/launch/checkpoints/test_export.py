"""A run's checkpoints → model folders."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from launch.checkpoints import checkpoint
from launch.checkpoints.averages import average_kinds
from launch.checkpoints.export import export, model_folder, spec_of
from launch.checkpoints.finetuned.adapter import adapter_card
from launch.checkpoints.finetuned.base import FrozenBase
from launch.checkpoints.saving.background import Part
from launch.checkpoints.tensor_fragments import Fragment
from launch.cli import main
from launch.config.load import load_config
from tests.launch.checkpoints.writing import save_parts
from tim import TransitionTransformer
from tim.model_folder.folder import load_model
from tim.pretrained.official import read_weights

CONFIG = """\
text: {caption_dropout: 0.0, max_tokens: 20}
network:
  params: {patch_size: 8, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 2}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 3 and 5. All averaged weights are the step number, the others ten times that."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    for step in (3, 5):
        save_checkpoint(folder, step=step)
    return folder


def save_checkpoint(run: Path, *, step: int) -> None:
    spec = spec_of(load_config(run / "config.yaml"))
    shapes = {
        name: tuple(value.shape) for name, value in TransitionTransformer.from_official(spec.network, rope=spec.rope).state_dict().items()
    }

    values = {"ema": float(step), "weights": 10.0 * step}
    pieces = {
        kind: {name: Fragment(0, torch.full(shape, value).flatten()) for name, shape in shapes.items()} for kind, value in values.items()
    }
    save_parts(run, checkpoint.CheckpointMetadata(step=step, world_size=1, config_hash=""), [Part(shapes, pieces)])


def add_averages(run: Path, *, step: int, decays: list[float]) -> None:
    """Make the checkpoint of a step one with averages of these decays, all weights of which are the decay."""
    spec = spec_of(load_config(run / "config.yaml"))
    network = TransitionTransformer.from_official(spec.network, rope=spec.rope)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    folder = run / "checkpoints" / f"step-{step:06d}"
    fragments = {decay: {name: Fragment(0, torch.full(shape, decay).flatten()) for name, shape in shapes.items()} for decay in decays}
    pieces = dict(zip(average_kinds(decays), fragments.values(), strict=True))
    part = Part(shapes, pieces, texts={checkpoint.TRAINER_STATE: json.dumps({"ema": decays})})
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"].update(part.write(folder, rank=0))
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def some_weight(folder: Path) -> float:
    network, _ = load_model(folder)
    values: Tensor = next(network.parameters())
    return values.flatten()[0].item()


def test_the_newest_checkpoint_averaged_by_default(run: Path, tmp_path: Path) -> None:
    done = export(run, out=tmp_path / "m")
    assert (done.step, done.ema, done.notes) == (5, True, ())
    assert some_weight(tmp_path / "m") == 5.0
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    network, spec = load_model(tmp_path / "m")
    assert done.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert spec.text == {"kind": "lookup", "max_tokens": 20}
    assert spec.sampling["guidance"] == 1.0  # no caption was ever dropped: there is no unconditional model to guide with


def test_another_step_and_the_last_weights(run: Path, tmp_path: Path) -> None:
    assert export(run, out=tmp_path / "m", step=3, ema=False).step == 3
    assert some_weight(tmp_path / "m") == 30.0
    with pytest.raises(ValueError, match="no checkpoint of step 4; available: 3, 5"):
        export(run, out=tmp_path / "n", step=4)


def test_one_of_several_averages_is_chosen_by_its_decay(run: Path, tmp_path: Path) -> None:
    add_averages(run, step=5, decays=[0.5, 0.25, 0.9375])
    done = export(run, out=tmp_path / "first")
    assert some_weight(tmp_path / "first") == 0.5
    assert done.notes == ("exported the first of the averages with decay 0.5, 0.25, 0.9375: --ema chooses another",)
    done = export(run, out=tmp_path / "third", ema=0.9375)
    assert some_weight(tmp_path / "third") == 0.9375
    assert (done.ema, done.notes) == (True, ())
    with pytest.raises(ValueError, match=r"step-000005: no average with decay 0\.999; available: 0\.5, 0\.25, 0\.9375"):
        export(run, out=tmp_path / "x", ema=0.999)
    with pytest.raises(ValueError, match=r"step-000003: no average with decay 0\.999; available: one without its decay"):
        export(run, out=tmp_path / "x", step=3, ema=0.999)


def test_cards_name_the_average(run: Path, tmp_path: Path) -> None:
    add_averages(run, step=5, decays=[0.5, 0.25])
    for name, (ema, words) in {
        "a": (True, "averaged weights (decay 0.5)"),
        "b": (0.25, "averaged weights (decay 0.25)"),
        "c": (False, "weights"),
    }.items():
        export(run, out=tmp_path / name, ema=ema)
        assert f"| weights | {words}, fp32 |" in (tmp_path / name / "README.md").read_text()


def test_adapters_without_their_settings_are_refused_in_one_line() -> None:
    base = FrozenBase("0" * 64, source=None, lora={"rank": 4})
    with pytest.raises(ValueError, match=r"trainer\.json does not name the adapters' alpha: export another --step"):
        adapter_card(base, step=1, steps=2, weights="weights")


def test_the_command_line_chooses_an_average(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_averages(run, step=5, decays=[0.5, 0.25])
    for number, (options, weight) in enumerate({(): 0.5, ("--ema", "0.25"): 0.25, ("--no-ema",): 50.0}.items()):
        assert main(["export", str(run), "--out", str(tmp_path / str(number)), *options]) == 0
        assert some_weight(tmp_path / str(number)) == weight
    assert "averaged weights (decay 0.25) of step 5" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(run), "--out", str(tmp_path / "x"), "--no-ema", "--ema", "0.25"])
    assert "--ema and --no-ema exclude each other" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_and_named(run: Path, tmp_path: Path) -> None:
    weights = run / "checkpoints" / "step-000005" / checkpoint.fragment_file("ema", 0)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    done = export(run, out=tmp_path / "m")
    assert done.step == 3
    assert "step-000005" in done.notes[0]
    with pytest.raises(ValueError, match="step-000005"):
        export(run, out=tmp_path / "n", step=5)
    assert not (tmp_path / "n").exists()


def test_the_published_format_builds_the_same_network(run: Path, tmp_path: Path) -> None:
    done = export(run, out=tmp_path / "m", official=True)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["README.md", "model.safetensors", "network.yaml"]
    model = yaml.safe_load((tmp_path / "m" / "network.yaml").read_text())["model"]
    assert model["network"]["target"] == "tim.models.t2i.tim_model.TiM"
    assert model["transport"] == {"target": "tim.schedulers.transports.OT_FM", "params": {"P_mean": 0.0, "P_std": 1.6}}
    assert not {"z_dim", "lora_hidden_size", "num_classes"} & set(model["network"]["params"])  # unset: the published defaults hold
    network = TransitionTransformer.from_official(model["network"]["params"])
    network.load_official(tmp_path / "m" / "model.safetensors")
    assert all((value == 5.0).all() for value in network.to_official().values())
    assert "only square images give the same result" in done.notes[0]

    export(run, out=tmp_path / "m", step=3, official=True)
    assert (next(iter(read_weights(tmp_path / "m" / "model.safetensors").values())) == 3.0).all()
    with pytest.raises(ValueError, match="exists and is not a model folder"):
        export(run, out=tmp_path / "m")
    (run / "config.yaml").write_text(CONFIG.replace("network:", "network:\n  rope: centred"))
    with pytest.raises(ValueError, match="rope: centred is unknown to the published code"):
        export(run, out=tmp_path / "n", official=True)
    assert not (tmp_path / "n").exists()


def test_an_older_model_is_replaced_and_nothing_else(run: Path, tmp_path: Path) -> None:
    export(run, out=tmp_path / "m", step=3)
    export(run, out=tmp_path / "m")
    assert some_weight(tmp_path / "m") == 5.0
    with pytest.raises(ValueError, match="exists and is not a model folder"):
        export(run, out=run)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file"):
        export(run, out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_is_sampled_from_its_model_or_from_its_newest_checkpoint(run: Path) -> None:
    said: list[str] = []
    exported = model_folder(run, log=said.append)
    assert some_weight(exported) == 5.0
    before = (exported / "model.safetensors").stat().st_mtime_ns
    assert model_folder(run, log=said.append) == exported
    assert (exported / "model.safetensors").stat().st_mtime_ns == before

    export(run, out=run / "model")
    now = time.time()
    for number, name in enumerate(("model/config.json", "latest")):  # as a copy may write them
        os.utime(run / name, (now + number, now + number))
    assert model_folder(run, log=said.append) == run / "model"

    save_checkpoint(run, step=8)  # the run was continued
    assert some_weight(model_folder(run, log=said.append)) == 8.0


def test_sampling_defaults_follow_the_training_unless_the_config_says_otherwise(run: Path) -> None:
    config = run / "config.yaml"

    def sampling(*overrides: str) -> dict[str, object]:
        return spec_of(load_config(config, overrides=overrides)).sampling

    assert sampling() == {"steps": 8, "guidance": 1.0, "interval": [0.0, 1.0], "shift": 1024, "instantaneous": False}
    assert sampling("sampling.interval=[0, 0.6]")["interval"] == [0.0, 0.6]
    assert sampling("objective={diffusion_share: 1, consistency_share: 0}")["instantaneous"]  # such a network has never seen r < t
    later = load_config(
        config, overrides=["objective={diffusion_share: 1, consistency_share: 0}", "plan.schedule=[{step: 4, diffusion_share: 0.5}]"]
    )
    assert [spec_of(later, step=step).sampling["instantaneous"] for step in (4, 5)] == [True, False]
    assert sampling("text.caption_dropout=0.1")["guidance"] == 2.5
    assert sampling("objective.shift=null")["shift"] is None
    chosen = sampling("sampling.steps=4", "sampling.guidance=1.5", "sampling.shift=7")
    assert (chosen["steps"], chosen["guidance"], chosen["shift"]) == (4, 1.5, 7)
