"""Situations from public reports (`shared/cases/users`), with text encoders, codecs and weights as people have them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.launch.test_cli import Tim, refused, tim

__all__ = ["tim"]

WITHOUT = "01-text-encoder-without-tokenizer"
REFUSAL = r"has no usable tokenizer \(.*\): missing tokenizer\.json.*set text\.tokenizer to the folder that has them"
TINY = ["train.steps=1", "loader.workers=0"]


@pytest.fixture(scope="module")
def cases(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the cases that can be written to."""
    source = shared / "cases" / "users"
    if not source.is_dir():
        pytest.skip(f"no cases at {source}: set TIM_SHARED")
    folder = tmp_path_factory.mktemp("cases")
    for name in (WITHOUT, "03-encode-captions-only", "09-captions-cut-unsaid", "15-weights-loading", "16-published-weights"):
        shutil.copytree(source / name, folder / name, copy_function=shutil.copyfile)
        for path in (folder / name).rglob("*"):
            path.chmod(0o755)
    return folder


def prepared(folder: Path, tim: Tim) -> Path:
    if not (folder / "corpus").exists():
        assert tim("prepare", folder / "pictures", "--out", folder / "corpus", "--workers", 1).code == 0
    return folder / "corpus"


@pytest.mark.parametrize("name", ["text_encoder", "bert", "gemma2"])
def test_a_text_encoder_without_a_tokenizer(name: str, cases: Path, tim: Tim, tmp_path: Path) -> None:
    case, pipe = cases / WITHOUT, cases / "15-weights-loading" / "pipe"
    corpus, encoder = prepared(case, tim), case / name
    words = [f"corpus={corpus}", "text.kind=hf", f"text.path={encoder}", *TINY]
    refused(tim("train", case / "tiny.yaml", f"run_dir={tmp_path / 'run'}", *words), REFUSAL)
    refused(tim("encode", corpus, "--text", f"hf={encoder}", "--out", tmp_path / "features", "--processes", 1), REFUSAL)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "features").exists()
    if name == "text_encoder":
        typed = ["--text", f"hf={encoder}", "--tokenizer", pipe / "tokenizer", "text.max_tokens=16"]
        assert tim("encode", corpus, *typed, "--out", tmp_path / "features", "--processes", 1).code == 0


def test_captions_alone_are_encoded(cases: Path, tim: Tim, tmp_path: Path) -> None:
    case = cases / "03-encode-captions-only"
    done = tim("encode", prepared(case, tim), "--text", f"hf={case / 'text_encoder'}", "--out", tmp_path / "f", "--processes", 1, "--json")
    assert (done.code, done.data["captions"], done.data["samples"]) == (0, 24, 24)


def test_captions_that_are_cut_are_named_everywhere(cases: Path, tim: Tim, tmp_path: Path) -> None:
    case, config = cases / "09-captions-cut-unsaid", cases / WITHOUT / "tiny.yaml"
    corpus = prepared(case, tim)
    assert "6 of 6</td>" in (corpus / "report.html").read_text()
    typed = [config, f"corpus={corpus}", *TINY]
    planned = tim("plan", *typed, "--steps", 1)
    assert "captions cut     6 of 6 in a sample, at text.max_tokens 16; the longest has 1092 tokens" in planned.out
    assert tim("plan", *typed, "--steps", 1, "--json").data["captions"]["cut"] == 6
    encoded = tim("encode", corpus, "--text", "lookup", "text.width=16", "--out", tmp_path / "f", "--processes", 1)
    assert "6 of 6 captions are longer than text.max_tokens" in encoded.out
    trained = tim("train", *typed, f"run_dir={tmp_path / 'run'}")
    assert "warning: 6 of 6 sampled captions are longer than text.max_tokens 16 and are cut" in trained.err
    asked = ["--prompt", "word " * 30, "--prompt", "a", "--size", "64x64", "--steps", 1]
    sampled = tim("sample", tmp_path / "run", *asked, "--out", tmp_path / "s")
    assert sampled.err.count("is truncated: its first 16 of 32 tokens are used") == 1


@pytest.mark.parametrize("path", ["pipe", "vae_bin", "vae_fp16", "pipe/vae", "pipe/vae/diffusion_pytorch_model.safetensors"])
def test_codecs_as_they_lie_on_disks(path: str, cases: Path) -> None:
    from tim import codecs

    pytest.importorskip("diffusers")
    assert codecs.make("sd-vae", cases / "15-weights-loading" / path).factor == 8


def test_a_pickle_of_more_than_tensors_is_refused_in_plain_words(cases: Path) -> None:
    from tim.pretrained.official import read_weights

    with pytest.raises(
        ValueError, match=r"ns\.pt: .*it contains argparse\.Namespace, which could run code: save its weights alone"
    ) as refusal:
        read_weights(cases / "15-weights-loading" / "ns.pt")
    assert "\x1b" not in str(refusal.value)


def test_an_official_export_is_sampled(cases: Path, tim: Tim, tmp_path: Path) -> None:
    sample = ["sample", cases / "16-published-weights" / "exo", "--prompt", "a", "--size", "64x64", "--steps", 1]
    for typed in ([], ["--codec", "pixel", "--text", "lookup"]):
        done = tim(*sample, *typed, "--out", tmp_path / "s", "--json")
        assert (done.code, len(done.data["images"])) == (0, 1), done.err
    assert "rotary layout legacy" in done.err
