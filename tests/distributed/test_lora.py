"""Adapters and frozen weights under every ZeRO stage: gradients, kills, another stage and number of ranks, exports."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from launch.checkpoints import checkpoint
from launch.checkpoints.initial_weights import load_weights
from launch.checkpoints.model_spec import spec_of
from launch.cli import main
from launch.config.load import load_config
from launch.training.train import train
from tests.distributed import jobs
from tests.tim.tiny import tiny_network
from tim import Generator, TransitionTransformer
from tim.model_folder.folder import load_model, read_spec, save_model, weights_file

WORKER = "tests.distributed.lora_worker"
CASES = [  # stage 3 last: it patches torch's linear, without a forward-mode derivative
    "0:lora:jvp:adamw",
    *(f"{stage}:lora:finite-difference:adamw" for stage in (1, 2, 3)),
    "3:freeze:finite-difference:adamw",
]
LR = 1e-3
CONFIG = f"""\
plan: {{max_tokens: 64, tokens_per_pack: 128, packs_per_step: 3}}
network:
  params: {{patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}}
objective:
  guidance: {{w_gt: 0.5, interval: [0, 1], after: 1, refresh: 3}}
text: {{caption_dropout: 0.3}}
loader: {{workers: 0}}
checkpoint: {{every: 1}}
log: {{every: 1}}
train:
  steps: 1000
  lr: {LR}
  ema: 0.9
  lora: {{rank: 4, alpha: 8, dropout: 0.2}}
"""
TOLERANCES = {"jvp": 1e-6, "finite-difference": 1e-4}  # relative; a finite difference amplifies rounding


@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.soak) for ranks in (1, 3))])
def test_a_step_of_several_ranks_is_that_of_one_process(tmp_path: Path, ranks: int) -> None:
    jobs.run_ranks(WORKER, str(tmp_path / "report"), *CASES, log=tmp_path / "log", ranks=ranks)
    for rank in range(ranks):
        reports = json.loads((tmp_path / f"report-{rank}.json").read_text())
        assert list(reports) == CASES
        for case, report in reports.items():
            assert report["gradient_error"] < TOLERANCES[case.split(":")[2]], (case, report)
            assert report["weight_error"] < 1e-3, (case, report)
            assert report["frozen"], case
            assert report["frozen_count"] > 10, case
            assert report["moments"] == [], case


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of a tiny network in which every parameter matters."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "run.yaml").write_text(CONFIG)
    spec = spec_of(load_config(folder / "run.yaml"))
    save_model(folder / "model", tiny_network(spec.network).state_dict(), spec)
    return folder / "model"


@dataclass(frozen=True)
class Killed:
    """A run that was killed, and resumed with other stages and numbers of ranks; and an unbroken one. steps: of both."""

    broken: Path
    unbroken: Path
    config: Path
    steps: int


def run_and_kill(figures: Path, base: Path, folder: Path, *, legs: Sequence[tuple[int, int]]) -> Killed:
    """Train with the stage and number of ranks of each leg, kill -9 in all but the last, and compare with one process."""
    config, log, unbroken, broken = (folder / name for name in ("run.yaml", "log", "unbroken", "broken"))
    config.write_text(f"corpus: {figures}\nrun_dir: {broken}\n{CONFIG}  init: {base}\n")
    done = 0
    for zero, ranks in legs[:-1]:
        job = jobs.start_ranks("launch.cli", "train", str(config), f"train.zero={zero}", log=log, ranks=ranks)
        jobs.wait_for_row(broken, done + 3, job, log=log)  # so that the save of step done + 1 is concluded
        job.kill()
        found = checkpoint.newest(broken)
        assert found is not None
        assert (found.metadata.world_size, found.metadata.step > done) == (ranks, True)
        done = found.metadata.step
    zero, ranks = legs[-1]
    settings = [f"train.zero={zero}", f"train.steps={done + 3}"]
    jobs.run_ranks("launch.cli", "train", str(config), *settings, log=log, ranks=ranks)
    train(load_config(config, overrides=[f"train.steps={done + 3}", f"run_dir={unbroken}", "train.zero=0"]), quiet=True)
    assert log.read_text().count("continuing from ") == len(legs) - 1
    return Killed(broken, unbroken, config, done + 3)


def check_equal(killed: Killed) -> None:
    for column in ("ids_digest", "lr", "images"):
        assert jobs.story(killed.broken, columns=[column]) == jobs.story(killed.unbroken, columns=[column])
    for one, other in zip(*(jobs.story(run, columns=["loss", "grad_norm"]) for run in (killed.broken, killed.unbroken)), strict=True):
        assert one == pytest.approx(other, rel=2e-3)
    for ema in (False, True):
        one, other = (checkpoint.consolidate(checkpoint.find(run).folder, ema=ema) for run in (killed.broken, killed.unbroken))
        for name, weight in one.items():
            torch.testing.assert_close(weight, other[name], rtol=0, atol=0.1 * LR)


@pytest.fixture(scope="module")
def killed(figures: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    return run_and_kill(figures, base, tmp_path_factory.mktemp("killed"), legs=[(1, 2), (3, 2), (2, 1)])


def test_kills_and_other_stages_and_ranks_change_nothing(killed: Killed) -> None:
    check_equal(killed)
    assert "LoRA of rank 4, alpha 8, dropout 0.2" in (killed.broken.parent / "log").read_text()


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", [1, 2, 3])
def test_many_kills_change_nothing(figures: Path, base: Path, tmp_path: Path, first: int) -> None:
    order = [(first + step) % 4 for step in range(6)]
    check_equal(run_and_kill(figures, base, tmp_path, legs=[(zero, 1 + number % 3) for number, zero in enumerate(order)]))


def test_checkpoints_hold_adapters_only(killed: Killed, base: Path) -> None:
    found = checkpoint.find(killed.broken)
    shapes = found.pieces("weights").shapes
    assert all(".lora_A." in name or ".lora_B." in name for name in shapes)
    trained = sum(map(math.prod, shapes.values()))
    whole = sum(value.numel() for value in load_weights(base).state.values())
    assert trained < whole / 3
    tensors = [path.stat().st_size for path in found.folder.glob("*.safetensors") if not path.name.startswith("replica")]
    assert sum(tensors) < 4 * 4 * trained + 4 * 20_000  # weights, average and two moments, each with a header
    recorded = checkpoint.read_trainer_state(found.folder)["frozen"]
    assert recorded["source"] == str(base)
    assert recorded["lora"] == {"rank": 4, "alpha": 8.0}


def test_exports_draw_the_same_images(killed: Killed, base: Path, tmp_path: Path) -> None:
    for ema, flags in ((True, []), (False, ["--no-ema"])):
        merged, adapter = tmp_path / f"merged-{ema}", tmp_path / f"adapter-{ema}"
        assert main(["export", str(killed.broken), "--out", str(merged), "--merged", *flags]) == 0
        assert main(["export", str(killed.broken), "--out", str(adapter), "--adapter", *flags]) == 0
        assert (
            f"alpha 8; {'averaged weights (decay 0.9)' if ema else 'weights'} of step {killed.steps} of"
            in (adapter / "README.md").read_text()
        )
        files = [adapter, adapter / "adapter_model.safetensors", adapter / "comfyui.safetensors"]
        for file in files[1:]:
            assert not [name for name in load_file(file) if "base_layer" in name]
        expected = drawn(Generator.from_pretrained(merged))
        for file in files:
            assert drawn(Generator.from_pretrained(base, loras=[(file, 1.0)])) == expected
        assert drawn(Generator.from_pretrained(base, loras=[(adapter, 0.5)])) != expected
        assert drawn(Generator.from_pretrained(base)) != expected
        if ema:
            assert weights_of(killed.broken / "model").read_bytes() == weights_of(merged).read_bytes()
        network, _ = load_model(base)
        tuned = PeftModel.from_pretrained(network, str(adapter)).merge_and_unload()  # pyright: ignore[reportArgumentType]
        for name, value in load_file(weights_of(merged)).items():
            torch.testing.assert_close(tuned.state_dict()[name], value, rtol=0, atol=1e-6)


def weights_of(model: Path) -> Path:
    found = weights_file(model)
    assert found is not None
    return found


def drawn(generator: Generator) -> bytes:
    (image,) = generator("a red circle", height=16, width=24, steps=2, guidance=2.0)
    return image.tobytes()


def test_sampling_from_the_command_line(killed: Killed, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, options = (
        tmp_path / "adapter",
        ["--prompt", "a", "--size", "16x16", "--steps", "1", "--out", str(tmp_path / "images"), "--json"],
    )
    assert main(["export", str(killed.broken), "--out", str(adapter), "--adapter"]) == 0
    images = []
    for arguments in ([str(killed.broken)], [str(base), "--lora", f"{adapter}:0.5", "--lora", f"{adapter / 'comfyui.safetensors'}:0.5"]):
        capsys.readouterr()
        assert main(["sample", *arguments, *options]) == 0
        with Image.open(json.loads(capsys.readouterr().out)["images"][0]["path"]) as image:
            images.append(image.tobytes())
    assert images[0] == images[1]
    refused = {
        ("sample", str(base), "--lora", f"{adapter}:much", *options): "'much' is not a number; give FILE or FILE:SCALE",
        ("export", str(killed.broken), "--out", str(tmp_path / "x"), "--adapter", "--official"): "--adapter has its own layout",
    }
    for command, problem in refused.items():
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 2
        assert problem in capsys.readouterr().err


def test_another_base_or_other_settings_are_refused(killed: Killed, base: Path, tmp_path: Path) -> None:
    network, spec = load_model(base)
    state = {**network.state_dict(), "x_embedder.proj.bias": network.state_dict()["x_embedder.proj.bias"] + 1}
    save_model(tmp_path / "other", state, spec)
    step = f"train.steps={killed.steps + 1}"
    cases = {
        f"train.init={tmp_path / 'other'}": rf"train\.init: the frozen weights of .*other have sha256 \w+, not \w+ as in .*init={base}",
        f"train.init={tmp_path / 'gone'}": r"train\.init: .*gone: no such folder",
        "train.lora.rank=8": r"was written with train\.lora\.rank=4, not 8",
        "train.lora.alpha=1": r"was written with train\.lora\.alpha=8, not 1",
        "train.lora.targets=[attn.qkv]": r"holds other trained parameters .*restore train\.lora\.targets",
        "train.lora=null": r"the run trained only a part of the weights, but now neither",
    }
    for change, problem in cases.items():
        with pytest.raises(ValueError, match=problem) as refused:
            train(load_config(killed.config, overrides=[step, change]), quiet=True)
        assert "\n" not in str(refused.value)
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    done = train(load_config(killed.config, overrides=[step, f"train.init={moved}", f"run_dir={killed.unbroken}"]), quiet=True)
    assert done.steps == killed.steps + 1


def test_frozen_weights_of_a_new_network_are_drawn_again(figures: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"corpus: {figures}\n{CONFIG.replace('lora: {rank: 4, alpha: 8, dropout: 0.2}', 'freeze: [blocks.0.*]')}")
    settings = {
        "whole": [["train.steps=3"]],
        "broken": [["train.steps=2"], ["train.steps=3", "train.zero=2"]],
    }
    for name, legs in settings.items():
        for leg in legs:
            train(load_config(config, overrides=[f"run_dir={tmp_path / name}", "objective.guidance=null", *leg]), quiet=True)
    one, other = (load_weights(tmp_path / name).state for name in settings)
    assert all(torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(0)
    new = TransitionTransformer.from_official(read_spec(tmp_path / "whole" / "model").network).state_dict()
    changed = {name for name, value in load_weights(tmp_path / "whole", ema=False).state.items() if not torch.equal(value, new[name])}
    assert changed
    assert not [name for name in changed if name.startswith("blocks.0.")]
    assert not [name for name in checkpoint.find(tmp_path / "whole").pieces("exp_avg").shapes if name.startswith("blocks.0.")]
    resumed = [f"run_dir={tmp_path / 'whole'}", "objective.guidance=null", "train.steps=4"]
    for freeze, parameter in (
        ("blocks.1.*", r"blocks\.0\.\S+ was not trained, and is now"),
        ("blocks.*", r"blocks\.1\.\S+ was trained, and is not"),
    ):
        with pytest.raises(ValueError, match=rf"holds other trained parameters \({parameter}.*restore .*train\.freeze"):
            train(load_config(config, overrides=[*resumed, f"train.freeze=[{freeze}]"]), quiet=True)
    with pytest.raises(ValueError, match=r"drawn from the seed, have sha256 \w+, not \w+ as in .*restore seed"):
        train(load_config(config, overrides=[*resumed, "seed=1"]), quiet=True)
