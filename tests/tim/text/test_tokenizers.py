"""Tokenizers: found where people keep them, and refused in one form where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.tim.families import FAMILIES, without_tokenizer
from tests.tim.models import WORDS, bert, clip
from tim.text import encoders

REFUSAL = r"has no usable tokenizer \(.*\): missing .*tokenizer\.json.*; set text\.tokenizer to the folder that has them"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert(tmp_path_factory.mktemp("encoder") / "bert")


def pipeline_of(encoder: Path, folder: Path) -> Path:
    """A pipeline as diffusers lays it out: tokenizer/ beside text_encoder/."""
    for part in ("text_encoder", "tokenizer"):
        (folder / part).mkdir(parents=True)
    for file in encoder.iterdir():
        part = "text_encoder" if file.name in ("config.json", "model.safetensors") else "tokenizer"
        shutil.copy(file, folder / part / file.name)
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "text_encoder": [], "tokenizer": []}')
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_without_a_tokenizer_is_refused_alike(family: str, tmp_path: Path) -> None:
    folder = without_tokenizer(tmp_path / "text_encoder", family)
    for remains in (None, {"tokenizer_class": "PreTrainedTokenizerFast"}):
        if remains is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(remains))
        with pytest.raises(ValueError, match=REFUSAL) as refusal:
            encoders.make("hf", folder, max_tokens=8)
        assert str(refusal.value).startswith(str(folder))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "tokenizer.json").write_bytes(b""),
        lambda folder: (folder / "tokenizer.json").unlink(),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_the_same_form(spoil: object, encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder, tmp_path / "bert"))
    for name in ("vocab.txt",):
        (folder / name).unlink()
    spoil(folder)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="has no usable tokenizer") as refusal:
        encoders.make("hf", folder, max_tokens=8)
    assert "text.tokenizer" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_vocabulary_of_special_tokens_alone_is_none(encoder: Path, tmp_path: Path) -> None:
    import transformers

    folder = without_tokenizer(tmp_path / "bert", "bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS[:5]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"it has special tokens only"):
        encoders.make("hf", folder, max_tokens=8)
    named = encoders.make("hf", folder, tokenizer_path=encoder, max_tokens=8)
    own = encoders.make("hf", encoder, max_tokens=8)
    assert named.tokenizer(["a red image"]) == own.tokenizer(["a red image"])


def test_the_tokenizer_of_a_pipeline_is_found(encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = pipeline_of(encoder, tmp_path / "pipe")
    captions = ["a red image", ""]
    expected = encoders.make("hf", encoder, max_tokens=8).encode(captions)
    with caplog.at_level("INFO"):
        for path in (pipe, pipe / "text_encoder"):
            for found, wanted in zip(encoders.make("hf", path, max_tokens=8).encode(captions), expected, strict=True):
                torch.testing.assert_close(found, wanted)
    assert "has no tokenizer, using" in caplog.text
    named = encoders.make("hf", pipe / "text_encoder", tokenizer_path=pipe, max_tokens=8)
    torch.testing.assert_close(named.encode(captions)[0], expected[0])
    (pipe / "text_encoder").rename(pipe / "text_encoder_2")
    (pipe / "tokenizer").rename(pipe / "tokenizer_2")
    torch.testing.assert_close(encoders.make("hf", pipe / "text_encoder_2", max_tokens=8).encode(captions)[0], expected[0])
    shutil.rmtree(pipe / "tokenizer_2")
    with pytest.raises(ValueError, match=REFUSAL):
        encoders.make("hf", pipe / "text_encoder_2", max_tokens=8)


def test_a_digest_is_of_the_tokenizer_too(encoder: Path, tmp_path: Path) -> None:
    pipe = pipeline_of(encoder, tmp_path / "pipe")
    before = encoders.digest("hf", pipe)
    assert before == encoders.digest("hf", pipe / "text_encoder", tokenizer_path=pipe / "tokenizer")
    assert before != encoders.digest("hf", pipe / "text_encoder", tokenizer_path=encoder)
    (pipe / "tokenizer" / "vocab.txt").write_text("other")
    assert before != encoders.digest("hf", pipe)
    assert encoders.digest("hf", encoder) == encoders.digest("hf", encoder, tokenizer_path=encoder)


def test_lengths_are_those_before_the_cut(encoder: Path, tmp_path: Path) -> None:
    captions = ["a red image", "", "a " * 30]
    for kind, path in (("hf", encoder), ("open_clip", clip(tmp_path / "clip")), ("lookup", None)):
        found = encoders.tokenizer(kind, path, max_tokens=8)
        assert found.lengths(captions) == [5, 2, 32], kind
        assert [len(ids) for ids in found(captions)] == [5, 2, 8]
        assert found.lengths([]) == []


def test_words_that_are_all_alike_are_an_error(encoder: Path, tmp_path: Path) -> None:
    import transformers

    numb = tmp_path / "numb"
    model = transformers.BertModel.from_pretrained(encoder)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.zero_()
    model.save_pretrained(numb)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "nan")
    tower = clip(tmp_path / "clip")
    for kind, path, settings, said in (
        ("hf", numb, {"tokenizer_path": encoder}, r"'red' and 'blue' have identical features, and so have all words: check its weights"),
        ("hf", tmp_path / "nan", {"tokenizer_path": encoder}, "its features are not finite"),
        ("hf", encoder, {"max_tokens": 2}, r"identical features.*text\.max_tokens=2"),
        ("open_clip", tower, {"max_tokens": 2}, r"text encoder open_clip=.*identical features"),
        ("lookup", None, {"max_tokens": 2, "width": 8}, "text encoder lookup: .*identical features"),
        ("lookup", None, {"tokenizer_path": encoder, "width": 8}, r"text\.tokenizer: text encoder lookup has CLIP's tokenizer"),
        ("hf", encoder, {"tokenizer_path": tmp_path / "nowhere"}, r"text\.tokenizer: .*nowhere: no such folder"),
    ):
        with pytest.raises(ValueError, match=said):
            encoders.make(kind, path, **{"max_tokens": 8, **settings})  # pyright: ignore[reportArgumentType]


def test_a_tokenizer_of_a_larger_model_is_named(encoder: Path, tmp_path: Path) -> None:
    import transformers

    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS[:5], *(f"word{i}" for i in range(90)), "red", "blue"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match=rf"is beyond the text encoder's vocabulary of {len(WORDS)}: text\.tokenizer is of another model"):
        encoders.make("hf", encoder, tokenizer_path=tmp_path / "larger", max_tokens=8)
