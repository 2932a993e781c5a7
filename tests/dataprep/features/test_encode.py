"""Encoding a corpus: the right tensors under the right keys, and the same bytes whoever makes them and however often they are killed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from dataprep.features.encode import EncodeConfig, Encoded, encode
from dataprep.features.encode_shard import encode_shard
from pipeline.corpus.corpus import Corpus
from pipeline.features.manifest import Features
from pipeline.features.tensors import latent_name, text_name, unpack
from pipeline.images import load_image
from pipeline.loading.feature_reader import empty_text
from pipeline.loading.loader import Loader
from pipeline.planning.planner import PlanConfig, Planner
from pipeline.size_rule import SizeRule, target_size
from tests import REPOSITORY
from tests.pipeline.conftest import Sample, varied, write_corpus
from tests.tim.models import autoencoder, bert
from tests.tim.test_alignment import radio_weights
from tim import codecs
from tim.disk_cache import DiskCache
from tim.sampling.live_view import LiveView, live_view_for
from tim.text import encoders

SETTINGS: dict[str, Any] = {"max_tokens": (16, 30), "patch_size": 2, "flip": True, "dtype": "float32"}
SHARDS = [
    varied(7, seed=1),
    [*varied(4, seed=2), Sample(8, 90, ("too thin",)), Sample(3, 3, ("too small",)), Sample(40, 40)],
    varied(3, seed=3),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "codec": {"kind": "kl", "path": str(autoencoder(folder / "kl", "kl"))},
        "text": {"kind": "hf", "path": str(bert(folder / "bert")), "max_tokens": 12},
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write_corpus(tmp_path / "corpus", shards=SHARDS)


def encoded(corpus: Corpus, out: Path, **settings: Any) -> Encoded:
    done = encode(corpus.folder, out=out, config=EncodeConfig.model_validate(settings))
    assert done is not None
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(folder: Path, shard: int) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of every sample of a shard, found as a reader finds them."""
    tar = (folder / f"{shard:06d}.tar").read_bytes()
    rows = pq.read_table(folder / f"{shard:06d}.parquet").to_pylist()
    return {row["key"]: unpack(memoryview(tar)[row["offset"] : row["offset"] + row["length"]]) for row in rows if row["length"]}


def test_every_tensor_is_what_the_model_makes_of_it_alone(corpus: Corpus, models: dict[str, Any], tmp_path: Path) -> None:
    said: list[str] = []
    config = EncodeConfig.model_validate({**SETTINGS, **models})
    done = encode(corpus.folder, out=tmp_path / "features", config=config, announce=said.append)
    assert done == Encoded(3, 17, sum(len(s.captions) or 1 for shard in SHARDS for s in shard), done.bytes if done else 0, {})
    codec, encoder = codecs.make(**models["codec"]), encoders.make(**models["text"])
    rules = [SizeRule(stride=4, max_tokens=tokens) for tokens in (16, 30)]
    largest = 0
    for number, shard in enumerate(corpus.shards):
        found, pictures = members(tmp_path / "features", number), Path(shard.path).read_bytes()
        samples = corpus.read(number, columns=("key", "height", "width", "captions", "image_offset", "image_length")).to_pylist()
        assert [*found] == [sample["key"] for sample in samples]
        for sample in samples:
            tensors = found[sample["key"]]
            expected: dict[str, torch.Tensor] = {}
            for rule in rules:
                target = target_size(sample["height"], width=sample["width"], rule=rule)
                crop = (*target.resize, target.height, target.width)
                for flip in (False, True) if not target.left_out else ():
                    data = pictures[sample["image_offset"] :][: sample["image_length"]]
                    pixels = load_image(data, resize=crop[:2], crop=crop[2:], flip=flip)
                    means, deviations = codec.encode([torch.from_numpy(pixels.transpose(2, 0, 1).copy())])
                    expected[latent_name(crop, flipped=flip)] = means[0]
                    assert deviations is not None
                    expected[latent_name(crop, flipped=flip, deviation=True)] = deviations[0]
            for i, features in enumerate(encoder.encode(sample["captions"] or [""])):
                expected[text_name(i)] = features
            assert tensors.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)
            largest = max(largest, len(tensors))
    assert largest == 2 * 2 * 2 + 3
    features = Features.open(tmp_path / "features")
    assert features.empty is not None
    torch.testing.assert_close(empty_text(features.empty), encoder.encode([""])[0])
    assert "17 samples, " in said[0]
    amount, unit = re.findall(r"about ([\d.]+) (k?B|MB);", said[0])[0]
    assert float(amount) * {"B": 1, "kB": 1e3, "MB": 1e6}[unit] == pytest.approx(done.bytes if done else 0, rel=0.15)
    manifest = json.loads((tmp_path / "features" / "manifest.json").read_text())
    assert manifest["codec"].items() >= {"kind": "kl", "factor": 2, "channels": 6, "draws": True}.items()
    assert manifest["text"].items() >= {"kind": "hf", "width": 24, "max_tokens": 12, "precision": "fp32"}.items()
    assert all(len(manifest[model]["digest"]) == 64 for model in models)
    assert str(tmp_path) not in json.dumps(manifest)
    assert features.live_view is not None
    fitted = LiveView.from_json(features.live_view)
    found = live_view_for(codec, models["codec"], cache=DiskCache.default())
    assert torch.equal(found.matrix, fitted.matrix)
    assert not torch.equal(found.matrix, live_view_for(codec, models["codec"], cache=None).matrix)


def test_a_plan_finds_all_that_it_needs(corpus: Corpus, models: dict[str, Any], tmp_path: Path) -> None:
    """At both sizes, with and without compression; and whatever it would not find is refused."""
    plain, small = tmp_path / "plain", tmp_path / "small"
    encoded(corpus, plain, **SETTINGS, **models)
    encoded(corpus, small, **SETTINGS, **models, zstd=True)
    assert sum(map(len, contents(small).values())) < sum(map(len, contents(plain).values()))

    def planner(folder: Path, **changes: Any) -> Planner:
        plan = PlanConfig.model_validate(
            {"stride": 4, "max_tokens": 30, "tokens_per_pack": 64, "packs_per_step": 2, "flip": 0.5, **changes}
        )
        return Planner(
            [Corpus.open(corpus.folder, features=folder)], plan=plan, seed=5, width=32, diffusion_share=0.5, consistency_share=0.1
        )

    for max_tokens in (16, 30):
        assert planner(plain, max_tokens=max_tokens).sample_counts["samples"] == 15
        plans = [planner(folder, max_tokens=max_tokens) for folder in (plain, small)]
        both = [Loader(plan, seed=5, channels=6, factor=2, workers=0, stochastic_codec=True, max_bad_fraction=0) for plan in plans]
        for one, other in zip(*(islice(loader, 6) for loader in both), strict=True):
            for batch, same in zip(one.batches, other.batches, strict=True):
                assert batch.ids == same.ids
                assert all(map(torch.equal, batch.latents or [], same.latents or []))
                assert all(map(torch.equal, batch.texts or [], same.texts or []))
    with pytest.raises(ValueError, match="other sizes"):
        planner(plain, max_tokens=20)
    write_corpus(tmp_path / "corpus", shards=[*SHARDS, varied(2, seed=9)])
    with pytest.raises(ValueError, match="have 3 shards, corpus corpus has 4: encode the rest"):
        planner(plain)


def test_what_is_new_is_encoded_and_what_is_there_is_kept(corpus: Corpus, tmp_path: Path) -> None:
    settings = {"codec": {"kind": "pixel"}, "text": {"kind": "lookup", "width": 8}, "max_tokens": (40,), "patch_size": 8}
    out = tmp_path / "features"
    encoded(corpus, out, **settings)
    before, when = contents(out), (out / "000000.tar").stat().st_mtime_ns
    assert encoded(corpus, out, **settings).shards == 3
    assert contents(out) == before
    grown = write_corpus(tmp_path / "corpus", shards=[*SHARDS, varied(2, seed=9)])
    assert encoded(grown, out, **settings).shards == 4
    assert (out / "000000.tar").stat().st_mtime_ns == when
    assert encoded(grown, tmp_path / "fresh", **settings).samples == 19
    assert contents(out) == contents(tmp_path / "fresh")
    shrunk = write_corpus(tmp_path / "corpus", shards=[SHARDS[0], varied(4, seed=8)])
    encoded(shrunk, out, **settings)
    encoded(shrunk, tmp_path / "again", **settings)
    assert contents(out) == contents(tmp_path / "again")


def test_other_settings_are_refused_with_what_differs(corpus: Corpus, models: dict[str, Any], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"codec": {"kind": "pixel"}, "text": {"kind": "lookup", "width": 8}, "patch_size": 8}
    out = tmp_path / "features"
    encoded(corpus, out, **settings)
    other = tmp_path / "moved"
    shutil.copytree(models["codec"]["path"], other)
    for changes, said in (
        ({"flip": True}, r"finished features with another flipped \(false there, true here\)"),
        ({"max_tokens": (64,)}, "another sizes"),
        ({"text": {"kind": "lookup", "width": 8, "max_tokens": 5}}, r"another text\.max_tokens \(77 there, 5 here\)"),
        ({"codec": models["codec"], "patch_size": 4}, r"another codec\.channels"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            encoded(corpus, out, **{**settings, **changes})
        assert "\n" not in str(caught.value)
    encoded(corpus, tmp_path / "kl", codec=models["codec"], patch_size=4)
    moved = {"codec": {"kind": "kl", "path": str(other)}, "patch_size": 4}
    assert encoded(corpus, tmp_path / "kl", **moved).shards == 3
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"another codec\.digest"):
        encoded(corpus, tmp_path / "kl", **moved)
    for place, said in ((corpus.path, "is inside the corpus"), (corpus.path / "x", "is inside the corpus"), (tmp_path, "not empty")):
        with pytest.raises(ValueError, match=said):
            encoded(corpus, place, **settings)


def test_an_image_that_cannot_be_decoded_is_counted_and_left_out(corpus: Corpus, tmp_path: Path) -> None:
    row = corpus.read(0, columns=("key", "image_offset", "image_length")).to_pylist()[2]
    with open(corpus.shards[0].path, "r+b") as tar:
        tar.seek(row["image_offset"])
        tar.write(bytes(row["image_length"]))
    bad = f"corpus/{row['key']}"
    out = tmp_path / "features"
    done = encoded(corpus, out, codec={"kind": "pixel"}, text={"kind": "lookup", "width": 8}, patch_size=8, max_tokens=(40,))
    assert done.rejected == {"not-an-image": 1}
    assert json.loads((out / "manifest.json").read_text())["rejected"] == {"not-an-image": 1}
    plan = PlanConfig(stride=8, max_tokens=40, tokens_per_pack=160, packs_per_step=2)
    opened = Corpus.open(corpus.folder, features=out)
    planner = Planner([opened], plan=plan, seed=5, width=32, diffusion_share=0.5, consistency_share=0.1)
    loader = Loader(planner, seed=5, channels=3, factor=1, workers=0, max_bad_fraction=1)
    weights = {id: float(batch.weights[i]) for step in islice(loader, 6) for batch in step.batches for i, id in enumerate(batch.ids)}
    assert [id for id, weight in weights.items() if not weight] == [bad]


def test_a_decoder_that_takes_its_process_down_costs_one_image(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        "import os, simplejpeg\n"
        "decode = simplejpeg.decode_jpeg\n"
        "simplejpeg.decode_jpeg = lambda data, **options: os.abort() if b'BOOM' in bytes(data) else decode(data, **options)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{REPOSITORY}")
    row = corpus.read(1, columns=("key", "image_offset", "image_length")).to_pylist()[1]
    with open(corpus.shards[1].path, "r+b") as tar:
        tar.seek(row["image_offset"] + row["image_length"] - 12)
        tar.write(b"BOOM")
    out, log = tmp_path / "features", tmp_path / "log"
    job = start("encode", corpus.folder, "--out", str(out), "--codec", "pixel", "patch_size=8", "--processes", "1", "--json", log=log)
    told, _ = job.communicate(timeout=120)
    assert job.returncode == 0, log.read_text()
    assert (json.loads(told)["samples"], json.loads(told)["rejected"]) == (17, {"crashed": 1})
    rows = pq.read_table(out / "000001.parquet").to_pylist()
    assert [each["key"] for each in rows if each["reason"] == "crashed"] == [row["key"]]
    assert len(members(out, 1)) == len(rows) - 1


def test_numbers_that_do_not_fit_are_an_error(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs.PixelCodec, "encode", lambda self, images: codecs.Latents([image.float() * 1e6 for image in images], None))
    with pytest.raises(ValueError, match=r"does not fit into float16: use dtype=bfloat16"):
        encoded(corpus, tmp_path / "features", codec={"kind": "pixel"}, patch_size=8)
    assert encoded(corpus, tmp_path / "other", codec={"kind": "pixel"}, patch_size=8, dtype="bfloat16").shards == 3


PARTS = [("codec",), ("text",), ("codec", "text"), ("codec", "teacher"), ("codec", "text", "teacher")]


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_each_combination_is_what_all_together_hold(parts: tuple[str, ...], models: dict[str, Any], tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", shards=[varied(4, seed=1)])
    save_file(radio_weights(), tmp_path / "radio.safetensors")
    every = {**models, "teacher": {"kind": "radio", "path": str(tmp_path / "radio.safetensors")}}
    encoded(corpus, tmp_path / "all", **SETTINGS, **every)
    done = encoded(corpus, tmp_path / "some", **SETTINGS, **{part: every[part] for part in parts})
    assert done.samples == 4
    assert (done.captions > 0) == ("text" in parts)
    assert (tmp_path / "some" / "empty.safetensors").exists() == ("text" in parts)
    found = Features.open(tmp_path / "some")
    names = {"codec": "latents", "text": "captions", "teacher": "teacher"}
    assert set(found.parts) == {names[part] for part in parts}
    together, apart = members(tmp_path / "all", 0), members(tmp_path / "some", 0)
    assert apart.keys() == together.keys()
    for key, tensors in apart.items():
        assert tensors
        assert {name.split(".")[0].split("_")[0] for name in tensors} <= {"latent", "text", "teacher"}
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, together[key][name])


@pytest.mark.parametrize("parts", [(), ("teacher",), ("text", "teacher")], ids="+".join)
def test_a_teacher_needs_the_codec_and_nothing_is_nothing(parts: tuple[str, ...], models: dict[str, Any]) -> None:
    every = {**models, "teacher": {"kind": "radio", "path": "radio.safetensors"}}
    with pytest.raises(ValueError, match=r"give the codec, too|nothing to encode"):
        EncodeConfig.model_validate({**SETTINGS, **{part: every[part] for part in parts}})


@pytest.mark.parametrize("existed", [False, True])
def test_an_error_leaves_no_half_written_folder(
    existed: bool, corpus: Corpus, models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "features"
    if existed:
        out.mkdir()

    def fail(*_: object, **__: object) -> None:
        raise ValueError("no more")

    with monkeypatch.context() as patched:
        patched.setattr("dataprep.features.encode.encode_shard", fail)
        with pytest.raises(ValueError, match="no more"):
            encoded(corpus, out, **SETTINGS, text=models["text"])
    assert out.exists() == existed
    assert not existed or not list(out.iterdir())
    kept = 0

    def fail_later(*arguments: Any, **named: Any) -> Any:
        nonlocal kept
        kept += 1
        return fail() if kept == 2 else encode_shard(*arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr("dataprep.features.encode.encode_shard", fail_later)
        with pytest.raises(ValueError, match="no more"):
            encoded(corpus, out, **SETTINGS, text=models["text"])
    assert (out / "000000.tar").exists()  # the same command goes on from here
    assert encoded(corpus, out, **SETTINGS, text=models["text"]).shards == 3


def test_captions_that_are_cut_are_counted(tmp_path: Path, models: dict[str, Any]) -> None:
    samples = [Sample(20, 20, ("a red image", "a " * 20)), Sample(20, 20, ("the " * 11,)), Sample(20, 20, ("the " * 10,))]
    corpus = write_corpus(tmp_path / "corpus", shards=[samples])
    done = encoded(corpus, tmp_path / "features", text=models["text"])  # 12 tokens, two of them start and end
    assert (done.captions, done.cut) == (4, 2)
    assert json.loads((tmp_path / "features" / "manifest.json").read_text())["totals"]["cut"] == 2


def start(*arguments: str, log: Path, launcher: tuple[str, ...] = ("launch.cli",)) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", *launcher, *arguments]
    with log.open("ab") as output:
        return subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=output)


def kill_after(shards: set[str], job: subprocess.Popen[bytes], *, out: Path, log: Path) -> dict[str, int]:
    """Kill a job with -9 as soon as these shards are finished; which are by then, and when they were."""
    while not all((out / f"{shard}_stats.json").exists() for shard in shards):
        assert job.poll() is None, log.read_text()
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (out / "manifest.json").exists(), "it was faster than this test"
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*_stats.json")}


def test_two_processes_killed_and_one_that_goes_on_make_what_one_makes_alone(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", shards=[varied(25, seed=number) for number in range(40)])
    settings = {"codec": {"kind": "pixel"}, "patch_size": 4, "flip": True, "max_tokens": (9, 16, 30), "zstd": True}
    encoded(corpus, tmp_path / "alone", **settings)
    out, log = tmp_path / "features", tmp_path / "log"
    typed = [*(f"{key}={value}" for key, value in (("patch_size", 4), ("flip", "true"), ("max_tokens", "[9,16,30]"), ("zstd", "true")))]
    job = start("encode", corpus.folder, "--out", str(out), "--codec", "pixel", *typed, "--processes", "2", log=log)
    kept = kill_after({"000000", "000001"}, job, out=out, log=log)  # each process begins with one of them
    wait_until_free(out)
    encoded(corpus, out, **settings)
    assert all((out / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert contents(out) == contents(tmp_path / "alone")


def wait_until_free(out: Path) -> None:
    """Its processes end with a job that was killed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with open(out / ".work" / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)
    raise AssertionError(f"somebody still writes to {out}")


@pytest.mark.soak
def test_real_models_in_two_processes_of_accelerate(models: dict[str, Any], tmp_path: Path) -> None:
    """Two processes under torchrun, killed with -9, then two under accelerate to the end: what one alone makes."""
    corpus = write_corpus(tmp_path / "corpus", shards=[varied(40, seed=number) for number in range(6)])
    encoded(corpus, tmp_path / "alone", **SETTINGS, **models)
    out, log = tmp_path / "features", tmp_path / "log"
    chosen = ["--codec", f"kl={models['codec']['path']}", "--text", f"hf={models['text']['path']}"]
    typed = ["encode", corpus.folder, "--out", str(out), *chosen, "text.max_tokens=12"]
    typed += ["max_tokens=[16,30]", "patch_size=2", "flip=true", "dtype=float32"]
    kept = kill_after({"000000"}, start(*typed, "--processes", "2", log=log), out=out, log=log)
    wait_until_free(out)
    layout = ("--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0")
    again = start(*layout, "-m", "launch.cli", *typed, "--json", log=log, launcher=("accelerate.commands.launch",))
    output, _ = again.communicate(timeout=500)
    assert again.returncode == 0, log.read_text()
    assert json.loads(output)["shards"] == 6
    assert all((out / name).stat().st_mtime_ns == when for name, when in kept.items())
    assert contents(out) == contents(tmp_path / "alone")
