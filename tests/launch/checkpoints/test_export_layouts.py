"""Shards, precisions, digests, layouts and the card of exported models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import load_state_dict_from_file, split_torch_state_dict_into_shards

from launch.checkpoints import checkpoint
from launch.checkpoints.export import export, model_folder
from launch.checkpoints.initial_weights import load_weights
from launch.checkpoints.saving.background import Part
from launch.checkpoints.tensor_fragments import Fragment
from launch.config.load import load_config
from launch.sampling.model_source import NO_REPLACEMENTS, open_model
from launch.training.build import make_network
from tests import REPOSITORY
from tests.launch.checkpoints.writing import save_parts
from tests.tim.models import autoencoder
from tim.disk_cache import DiskCache
from tim.model_folder.folder import load_model
from tim.model_kinds import Dtype
from tim.pretrained import safetensors_files
from tim.pretrained.safetensors_files import LazyTensors, write_file

CONFIG = """\
text: {caption_dropout: 0.1, max_tokens: 20}
network:
  params: {patch_size: 8, depth: 2, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}
train: {steps: 20, lr: 3.0e-4}
"""
SHARD = 60_000


def write_run(run: Path, *, config: str = CONFIG, step: int = 7) -> dict[str, torch.Tensor]:
    """A run folder with one checkpoint of two ranks' files. Returns its averaged weights."""
    run.mkdir()
    (run / "config.yaml").write_text(config)
    torch.manual_seed(0)
    network = make_network(load_config(run / "config.yaml").network)
    state = {name: torch.randn(parameter.shape) for name, parameter in network.named_parameters()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    trainer = {
        "meter": {"total": {"images": 1234, "tokens": 56789}},
        "data": {"inputs": {"corpora": [["photos", "5ca1ab1e" * 8], ["art", "0ddba11" * 8]]}},
    }

    parts = []
    for rank in range(2):
        halves = {}
        for name, value in state.items():
            middle = value.numel() // 2
            low, high = ((0, middle), (middle, value.numel()))[rank]
            halves[name] = Fragment(low, value.flatten()[low:high])
        pieces = {"ema": halves, "weights": {name: Fragment(each.start, -each.values) for name, each in halves.items()}}
        parts.append(Part(shapes, pieces, texts={checkpoint.TRAINER_STATE: json.dumps(trainer)} if rank == 0 else {}))
    save_parts(run, checkpoint.CheckpointMetadata(step=step, world_size=2, config_hash=""), parts)
    return state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder).state


@pytest.mark.parametrize("layout", ["own", "published", "diffusers"])
def test_shards_are_those_of_hugging_face(run: Path, tmp_path: Path, layout: str) -> None:
    expected = weights_of(run)
    one, many = tmp_path / "one", tmp_path / "many"
    export(run, out=one, layout=layout)  # pyright: ignore[reportArgumentType]
    export(run, out=many, layout=layout, max_shard_bytes=SHARD)  # pyright: ignore[reportArgumentType]
    stem = "diffusion_pytorch_model" if layout == "diffusers" else "model"
    inner = many / "transformer" if layout == "diffusers" else many
    pattern = stem + "{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(expected, filename_pattern=pattern, max_shard_size=SHARD)
    index = json.loads((inner / f"{stem}.safetensors.index.json").read_text())
    assert index["weight_map"] == split.tensor_to_filename
    assert index["metadata"]["total_size"] == split.metadata["total_size"]
    assert len(split.filename_to_tensors) > 2
    theirs: dict[str, torch.Tensor] = {}
    for name in split.filename_to_tensors:
        theirs.update(load_state_dict_from_file(inner / name))  # pyright: ignore[reportArgumentType]
    for found in (theirs, weights_of(one), weights_of(many)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    for folder in (one, many):
        network, spec, _ = open_model(folder, recipe=None, replacements=NO_REPLACEMENTS, log=print)
        assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())
        assert spec.sampling["guidance"] == 2.5
    export(run, out=many, layout=layout)  # pyright: ignore[reportArgumentType]  (replaces it, with all its shards)
    assert not list(many.rglob("*-of-*"))


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_weights_are_stored_in_the_precision_asked_for(run: Path, tmp_path: Path, dtype: Dtype, torch_dtype: torch.dtype) -> None:
    expected = weights_of(run)
    export(run, out=tmp_path / "m", dtype=dtype, ema=False)
    stored = weights_of(tmp_path / "m")
    assert all(torch.equal(stored[name], (-value).to(torch_dtype)) for name, value in expected.items())
    network, _ = load_model(tmp_path / "m")
    assert all(torch.equal(value, stored[name].float()) for name, value in network.state_dict().items())


@pytest.mark.parametrize("layout", ["own", "published", "diffusers"])
@pytest.mark.parametrize("shard", [SHARD, 10**9])
def test_a_flipped_byte_is_found_on_loading(run: Path, tmp_path: Path, layout: str, shard: int) -> None:
    folder = tmp_path / "m"
    export(run, out=folder, layout=layout, max_shard_bytes=shard)  # pyright: ignore[reportArgumentType]
    for path in sorted(folder.rglob("*.safetensors*")):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=rf"{path.name} does not match its digest in (config\.json|network\.yaml): copy or export"):
            load_weights(folder)
        path.write_bytes(content[:-1])
        with pytest.raises(ValueError, match=rf"{path.name} has {len(content) - 1} bytes, but {len(content)} in"):
            load_weights(folder)
        path.write_bytes(content)
    assert load_weights(folder).state


def test_folders_without_digests_still_load(run: Path, tmp_path: Path) -> None:
    export(run, out=tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    content = json.loads(path.read_text())
    del content["files"]
    path.write_text(json.dumps(content))
    assert weights_of(tmp_path / "m").keys() == weights_of(run).keys()
    load_model(tmp_path / "m")


def test_the_diffusers_layout_moves_as_a_whole(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]

    autoencoder(tmp_path / "vae", "kl")
    patch = "{patch_size: 1, depth: 1, hidden_size: 32, num_heads: 2, cap_feat_dim: 16}"
    config = f"codec: {{kind: kl, path: {tmp_path / 'vae'}}}\nnetwork: {{params: {patch}}}\ntrain: {{steps: 9}}\n"
    write_run(tmp_path / "run", config=config)
    export(tmp_path / "run", out=tmp_path / "first", layout="diffusers", with_models=True)
    (tmp_path / "first").rename(tmp_path / "moved")
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    moved = tmp_path / "moved"
    assert sorted(path.name for path in moved.iterdir()) == ["README.md", "model_index.json", "transformer", "vae"]
    assert json.loads((moved / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    assert model_folder(moved, log=print) == moved
    AutoencoderKL.from_pretrained(moved, subfolder="vae")
    _, spec = load_model(moved)
    assert spec.codec == {"kind": "kl", "path": str(moved / "vae")}
    weights = next((moved / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    for cache in (None, DiskCache(tmp_path / "cache")):
        with pytest.raises(ValueError, match="does not match its digest"):
            load_model(moved, cache=cache)


def test_a_model_beside_the_network_is_read_for_its_digest_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run, out=tmp_path / "m")
    large, config = tmp_path / "m" / "text_encoder" / "model.safetensors", tmp_path / "m" / "config.json"
    large.parent.mkdir()
    large.write_bytes(bytes(2_000_000))
    content = json.loads(config.read_text())
    content["files"]["text_encoder/model.safetensors"] = safetensors_files.file_facts(large)
    config.write_text(json.dumps(content))
    read: list[str] = []
    original = safetensors_files.file_digest
    monkeypatch.setattr(safetensors_files, "file_digest", lambda path: (read.append(path.name), original(path))[1])
    for _ in range(2):
        load_model(tmp_path / "m", cache=DiskCache(tmp_path / "cache"))
    assert len(read) == 1
    large.write_bytes(bytes(1_999_999) + b"x")
    with pytest.raises(ValueError, match=r"text_encoder/model\.safetensors does not match its digest"):
        load_model(tmp_path / "m", cache=DiskCache(tmp_path / "cache"))


def test_the_card_states_corpora_steps_and_recipe(run: Path, tmp_path: Path) -> None:
    export(run, out=tmp_path / "m", dtype="bf16")
    card = (tmp_path / "m" / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    assert yaml.safe_load(header) == {"library_name": "tim", "pipeline_tag": "text-to-image"}
    for line in ("| weights | averaged weights, bf16 |", "| steps | 7 of 20 |", "| images trained | 1,234 |"):
        assert line in text
    assert f"| photos | `{'5ca1ab1e' * 8}` |" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["train"] == {"steps": 20, "lr": 3e-4}
    assert recipe["network"]["params"]["hidden_size"] == 32


MEASURE = """
import sys, threading, time
from pathlib import Path
from launch.checkpoints.export import export

def anonymous():
    return int(next(line for line in open('/proc/self/status') if line.startswith('RssAnon')).split()[1]) * 1024

peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
export(Path(sys.argv[1]), out=Path(sys.argv[2]), dtype='bf16')
done = True
thread.join()
print(peak - before)
"""


def test_memory_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    large = CONFIG.replace("depth: 2, hidden_size: 32", "depth: 8, hidden_size: 512")
    state = write_run(tmp_path / "run", config=large)
    total = sum(value.nbytes for value in state.values())
    largest = max(value.nbytes for value in state.values())
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "run"), str(tmp_path / "m")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * largest + (32 << 20) < total / 2, (done.stdout, largest, total)


def test_a_written_file_is_read_by_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "half": torch.arange(3).half(),
        "wide": torch.arange(6, dtype=torch.float64).view(2, 3),
        "scalar": torch.tensor(7.0),
        "none": torch.zeros(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "bools": torch.tensor([True, False]),
        "brain": torch.arange(4).bfloat16(),
        "transposed": torch.arange(6.0).view(2, 3).T,
    }
    facts = write_file(tmp_path / "t.safetensors", LazyTensors.of(tensors), metadata={"format": "pt"})
    assert facts == checkpoint.file_facts(tmp_path / "t.safetensors")
    found = load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
