"""Text encoders from tiny weights on disk: each token's feature is the library's own, whatever is encoded beside the caption."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tim.families import FAMILIES, without_tokenizer
from tests.tim.models import bert, clip, gemma, t5
from tim.pretrained import weight_files
from tim.text import encoders

CAPTIONS = ["a small red image", "", "the 3 large blue image number 7 of 9", "the"]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.mark.parametrize(("write", "width"), [(bert, 24), (t5, 16), (gemma, 32)])
def test_hidden_states_of_transformers_without_padding(write: Callable[[Path], Path], width: int, tmp_path: Path) -> None:
    import transformers

    folder = write(tmp_path / "model")
    assert encoders.width("hf", folder) == width
    encoder = encoders.make("hf", folder, width=width, max_tokens=8)
    found = encoder.encode(CAPTIONS)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    loader: Any = transformers.AutoModelForTextEncoding if write is t5 else transformers.AutoModel
    network = loader.from_pretrained(folder).eval()
    for caption, features in zip(CAPTIONS, found, strict=True):
        ids = tokenizer(caption, truncation=True, max_length=8, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = network(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert [len(features) for features in found] == [6, 2, 8, 3]
    assert not found[0].requires_grad


def test_features_of_clip_are_those_before_its_pooling(tmp_path: Path) -> None:
    import open_clip

    folder = clip(tmp_path / "clip")
    assert encoders.width("open_clip", folder) == 32
    encoder = encoders.make("open_clip", folder, width=32, max_tokens=16)
    model: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    found = encoder.encode(CAPTIONS)
    with torch.no_grad():
        pooled = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS))
        ours = torch.stack([features[-1] for features in found]) @ model.text_projection  # its last token is the one that CLIP takes
    torch.testing.assert_close(ours, pooled, rtol=1e-4, atol=1e-5)
    cut = encoders.make("open_clip", folder, max_tokens=4).encode(CAPTIONS[:1])[0]
    torch.testing.assert_close(cut[:3], found[0][:3], rtol=1e-4, atol=1e-5)
    assert len(cut) == 4


@pytest.mark.parametrize("kind", ["hf", "open_clip"])
def test_captions_do_not_see_their_neighbours(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoders.make(kind, (clip if kind == "open_clip" else bert)(tmp_path / "model"), max_tokens=16)
    together = encoder.encode(CAPTIONS)
    monkeypatch.setattr(encoders, "BATCH_TOKENS", 1)
    for alone, features in zip(encoder.encode(CAPTIONS), together, strict=True):
        torch.testing.assert_close(alone, features, rtol=1e-4, atol=1e-5)
    half = encoders.make(kind, tmp_path / "model", max_tokens=16, precision="bf16").encode(CAPTIONS)
    assert not torch.equal(half[0], together[0])
    torch.testing.assert_close(half[0], together[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_do_not_see_their_neighbours_in_any_family(family: str, bert_folder: Path, tmp_path: Path) -> None:
    encoder = encoders.make("hf", without_tokenizer(tmp_path / family, family), tokenizer_path=bert_folder, max_tokens=32)
    for caption, features in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        torch.testing.assert_close(features, encoder.encode([caption])[0], rtol=1e-5, atol=1e-5)


def test_batches_hold_captions_of_similar_lengths(bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = encoders.make("hf", bert_folder, max_tokens=64)
    masks: list[torch.Tensor] = []
    forward = encoder._forward  # pyright: ignore

    def recorded(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        masks.append(mask)
        return forward(ids, mask)

    monkeypatch.setattr(encoder, "_forward", recorded)
    captions = [" ".join(["red"] * count) for count in (1, 62, 3, 30, 2, 31, 60, 5)]
    assert [len(features) for features in encoder.encode(captions)] == [3, 64, 5, 32, 4, 33, 62, 7]
    assert [mask.sum(1).tolist() for mask in masks] == [[3, 4, 5, 7], [32], [33], [62, 64]]
    assert all(bool(mask[-1].all()) for mask in masks)


def test_what_cannot_be_had_is_named(tmp_path: Path) -> None:
    folder, other = clip(tmp_path / "clip"), bert(tmp_path / "bert")
    for kind, path, changes, said in (
        ("t5", None, {}, "unknown text encoder 't5': choose one of lookup, open_clip, hf"),
        ("hf", None, {}, r"text encoder hf needs its weights: give its path, a folder or hf://OWNER/NAME"),
        ("hf", folder, {}, r"has no config\.json, which text encoder hf needs"),
        ("open_clip", other, {}, r"has no open_clip_config\.json"),
        ("hf", other, {"width": 16}, r"its features have width 24, not 16: set network\.params\.cap_feat_dim=24"),
        ("open_clip", folder, {"max_tokens": 77}, r"supports 16 tokens, text\.max_tokens is 77"),
        ("lookup", None, {}, "give the width of its features"),
    ):
        settings: dict[str, Any] = {"max_tokens": 16, **changes}
        with pytest.raises(ValueError, match=said) as caught:
            encoders.make(kind, path, **settings)
        assert "\n" not in str(caught.value)


def test_a_digest_is_of_the_weights_and_not_of_where_they_lie(tmp_path: Path) -> None:
    one, other = bert(tmp_path / "one"), bert(tmp_path / "two" / "three")
    assert weight_files.digest(one) == weight_files.digest(other)
    (other / "notes.md").write_text("of no account")
    assert weight_files.digest(one) == weight_files.digest(other)
    (other / "vocab.txt").write_text("x")
    assert weight_files.digest(one) != weight_files.digest(other)
