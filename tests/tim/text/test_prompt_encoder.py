"""Features of prompts from the cache: those of the encoder, which is loaded only for others, checked when it is, and leaves memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import REPOSITORY
from tests.tim.models import bert, clip, gemma, t5
from tim.disk_cache import DiskCache
from tim.text import encoders
from tim.text.prompt_encoder import PromptEncoder

CAPTIONS = ["a small red image", "", "the 3 large blue image number 7 of 9", "the", "a small red image", "🦊 東"]
MODELS: dict[str, tuple[str, Callable[[Path], Path], int]] = {
    "t5": ("hf", t5, 16),
    "gemma3": ("hf", gemma, 32),
    "clip": ("open_clip", clip, 32),
}


@pytest.fixture(scope="module", params=MODELS)
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    kind, write, _ = MODELS[request.param]
    return {"kind": kind, "path": str(write(tmp_path_factory.mktemp(request.param) / "model")), "tokenizer": None, "max_tokens": 12}


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[encoders.TextEncoder]:
    """The encoders that were loaded."""
    loaded: list[encoders.TextEncoder] = []
    original = encoders.make

    def recorded(*positions: Any, **settings: Any) -> encoders.TextEncoder:
        loaded.append(original(*positions, **settings))
        return loaded[-1]

    monkeypatch.setattr(encoders, "make", recorded)
    return loaded


def entries(cache: DiskCache) -> list[str]:
    return [name for name in os.listdir(cache.folder) if name.startswith("text-")]


def test_features_are_those_of_the_encoder(text: dict[str, Any], cache: DiskCache, loads: list[encoders.TextEncoder]) -> None:
    direct = encoders.make(text["kind"], text["path"], max_tokens=12).encode(CAPTIONS)
    loads.clear()
    for again in (cache, cache, None):
        found = PromptEncoder(text, width=direct[0].shape[1], cache=again).encode(CAPTIONS)
        for ours, theirs in zip(found, direct, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(loads) == 2  # for an empty cache, and without one
    assert len(entries(cache)) == len(set(CAPTIONS))


def test_the_encoder_is_loaded_only_for_what_is_missing(text: dict[str, Any], cache: DiskCache, loads: list[encoders.TextEncoder]) -> None:
    first = PromptEncoder(text, cache=cache)
    stored = first.encode(CAPTIONS)
    again = PromptEncoder(text, cache=cache)
    assert all(torch.equal(one, other) for one, other in zip(again.encode(CAPTIONS), stored, strict=True))
    assert (again.is_loaded, len(loads)) == (False, 1)
    assert again.width == stored[0].shape[1]
    assert again.tokenizer.lengths(["the"]) == [3]
    assert (again.is_loaded, len(loads)) == (False, 1)
    new = again.encode([*CAPTIONS, "the red"])
    assert (again.is_loaded, len(loads)) == (True, 2)
    assert all(torch.equal(one, other) for one, other in zip(new, stored, strict=False))
    torch.testing.assert_close(new[-1], first.encode(["the red"])[0])
    assert len(loads) == 2


def test_known_prompts_need_neither_weights_nor_libraries(cache: DiskCache, tmp_path: Path) -> None:
    texts = [
        {"kind": "hf", "path": str(gemma(tmp_path / "gemma")), "max_tokens": 12},
        {"kind": "open_clip", "path": str(clip(tmp_path / "clip")), "max_tokens": 12},
    ]
    expected = [PromptEncoder(text, cache=cache).encode(["a red image"])[0] for text in texts]
    script = f"""
import sys, torch
read = []
sys.addaudithook(lambda event, found: read.append(str(found[0])) if event == "open" else None)
from tim.disk_cache import DiskCache
from tim.text.prompt_encoder import PromptEncoder
encoders = [PromptEncoder(text, cache=DiskCache({str(cache.folder)!r})) for text in {texts!r}]
torch.save([each.encode(["a red image"])[0] for each in encoders], {str(tmp_path / "found.pt")!r})
assert not any(each.is_loaded for each in encoders)
assert not {{"transformers", "open_clip"}} & set(sys.modules)
assert not [path for path in read if path.endswith("open_clip_model.safetensors")], "6 MB, whose digest is remembered"
"""
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True, timeout=120)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_whatever_changes_features_changes_their_key(cache: DiskCache, tmp_path: Path, loads: list[encoders.TextEncoder]) -> None:
    folder, other_tokenizer = t5(tmp_path / "t5"), bert(tmp_path / "bert")
    words = (other_tokenizer / "vocab.txt").read_text().splitlines()
    shutil.rmtree(other_tokenizer)
    other_tokenizer.mkdir()
    import transformers

    (tmp_path / "vocab.txt").write_text("\n".join([*words[:5], *words[:4:-1]]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(other_tokenizer)
    text = {"kind": "hf", "path": folder, "max_tokens": 12}

    def encode(**changes: Any) -> torch.Tensor:
        return PromptEncoder({**text, **changes}, cache=cache).encode(["the 1 2 3 4 5"])[0]

    first = encode()
    for number, changes in enumerate(({"max_tokens": 4}, {"precision": "bf16"}, {"tokenizer": str(other_tokenizer)}), start=2):
        changed = encode(**changes)
        assert changed.shape != first.shape or not torch.equal(changed, first)
        assert (len(loads), len(entries(cache))) == (number, number)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 0.5 for name, value in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert not torch.equal(encode(), first)
    alone = str(folder / "model.safetensors")
    changed = encode(path=alone)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1.0}))
    assert not torch.equal(encode(path=alone), changed)
    assert len(loads) == len(entries(cache)) == 7
    shutil.copytree(folder, tmp_path / "moved")
    encode(path=str(tmp_path / "moved" / "model.safetensors"))
    assert len(loads) == 7  # the same weights elsewhere


def test_damaged_features_are_computed_again(text: dict[str, Any], cache: DiskCache, loads: list[encoders.TextEncoder]) -> None:
    [expected] = PromptEncoder(text, cache=cache).encode(["the"])
    [name] = entries(cache)
    content = bytearray((cache.folder / name).read_bytes())
    content[-5] ^= 1
    (cache.folder / name).write_bytes(content)
    for _ in range(2):
        assert torch.equal(PromptEncoder(text, cache=cache).encode(["the"])[0], expected)
    assert len(loads) == 2


def test_offloaded_weights_leave_memory_and_come_back(text: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = PromptEncoder(text)
    expected = prompts.encode(["the red"])[0]
    network = weakref.ref(prompts._encoder._network)  # pyright: ignore
    prompts.offload()
    assert not prompts.is_loaded
    assert network() is None
    assert torch.equal(prompts.encode(["the red"])[0], expected)

    places: list[str] = []
    monkeypatch.setattr(encoders.TowerEncoder, "to", lambda encoder, device: places.append(str(device)))
    prompts.device = torch.device("cuda")  # the features of no caption need to be moved there
    prompts.offload()
    assert prompts.is_loaded
    monkeypatch.setattr(encoders.TowerEncoder, "encode", lambda encoder, captions: [expected] * len(captions))
    prompts.encode(["the"])
    assert places == ["cpu", "cuda"]
    prompts.offload()
    prompts.encode([])
    assert places == ["cpu", "cuda", "cpu"]


def test_in_bf16_features_do_not_depend_on_neighbours_at_all(text: dict[str, Any]) -> None:
    prompts = PromptEncoder({**text, "precision": "bf16"})
    together = prompts.encode(CAPTIONS)
    for caption, features in zip(CAPTIONS, together, strict=True):
        assert torch.equal(prompts.encode([caption])[0], features)


def test_lookup_needs_no_cache(cache: DiskCache) -> None:
    prompts = PromptEncoder({"kind": "lookup", "max_tokens": 16}, width=8, cache=cache)
    direct = encoders.make("lookup", width=8, max_tokens=16)
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(prompts.encode(CAPTIONS), direct.encode(CAPTIONS), strict=True))
        prompts.offload()
    assert not cache.folder.exists()


def test_bad_encoders_are_named(cache: DiskCache, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        PromptEncoder({"kind": "hf", "path": str(tmp_path / "nowhere")}, cache=cache)
    folder = bert(tmp_path / "bert")
    text = {"kind": "hf", "path": str(folder), "max_tokens": 16}
    PromptEncoder(text, cache=cache).encode(["the"])
    with pytest.raises(ValueError, match=r"its features have width 24, not 16: set network\.params\.cap_feat_dim=24"):
        PromptEncoder(text, width=16, cache=cache).encode(["the"])
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * float("nan") for name, value in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its features are not finite"):
        PromptEncoder(text, cache=cache).encode(["the"])


def test_a_cache_without_a_folder_does_not_read_the_weights_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {"kind": "hf", "path": str(bert(tmp_path / "bert")), "max_tokens": 16}
    monkeypatch.setattr(DiskCache, "file_digest", None)
    features = PromptEncoder(text, cache=DiskCache("/proc/tim")).encode(["the"])[0]
    assert torch.equal(features, PromptEncoder(text).encode(["the"])[0])
