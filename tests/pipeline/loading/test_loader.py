from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pipeline.corpus.corpus import Corpus
from pipeline.corpus.tags import TagShuffle
from pipeline.cost import DIFFUSION
from pipeline.images import load_image
from pipeline.loading.loader import Batch, LoadedStep, Loader
from pipeline.loading.pack_reader import FetchedPack, ReadPack
from pipeline.planning.config import PlanConfig, Stage
from pipeline.planning.planner import Planner
from pipeline.streams.corpus_view import CorpusView
from tests import REPOSITORY
from tests.pipeline.conftest import Sample, write_corpus

CHANNELS, FACTOR, STRIDE = 4, 2, 8


def make_loader(corpus: Corpus, *, packs: int = 4, workers: int = 0, dropout: float = 0.2, **changes: Any) -> Loader:
    plan = PlanConfig(stride=STRIDE, max_tokens=36, tokens_per_pack=144, packs_per_step=packs)
    planner = Planner(
        [Corpus.open(corpus.folder)], plan=plan, seed=5, width=32, diffusion_share=0.5, consistency_share=0.1, caption_dropout=dropout
    )
    return Loader(planner, seed=5, channels=CHANNELS, factor=FACTOR, workers=workers, **changes)


def assert_same(one: list[LoadedStep], other: list[LoadedStep]) -> None:
    assert [(step.index, step.ids, step.state, step.images, step.tokens) for step in one] == [
        (step.index, step.ids, step.state, step.images, step.tokens) for step in other
    ]
    for left, right in zip(one, other, strict=True):
        for batch, same in zip(left.batches, right.batches, strict=True):
            assert (batch.ids, batch.captions, batch.tokens) == (same.ids, same.captions, same.tokens)
            assert all(map(torch.equal, batch.images + batch.noise, same.images + same.noise))
            for name in ("labels", "kinds", "uniforms", "weights"):
                assert torch.equal(getattr(batch, name), getattr(same, name)), name


def by_sample(batches: list[Batch]) -> dict[tuple[str, float], tuple[Any, ...]]:
    """Everything of each sample, under its id and its first time draw, which tells visits apart."""
    return {
        (batch.ids[i], float(batch.uniforms[i, 0])): (
            batch.captions[i],
            int(batch.labels[i]),
            int(batch.kinds[i]),
            batch.images[i].numpy().tobytes(),
            batch.noise[i].numpy().tobytes(),
            batch.uniforms[i].numpy().tobytes(),
            float(batch.weights[i]),
        )
        for batch in batches
        for i in range(len(batch.ids))
        if batch.ids[i]
    }


def test_batches_hold_what_was_planned(corpus: Corpus) -> None:
    loader, planner = make_loader(corpus), make_loader(corpus)._planner
    pictures = {f"corpus/{key}": data for key, data in stored_images(corpus).items()}
    for step in islice(loader, 4):
        planned = planner.next_step()
        assert (step.index, step.images, step.tokens, step.fill) == (planned.index, planned.images, planned.tokens, planned.fill)
        assert step.ids == planned.ids
        samples = {(sample.id, sample.visit): sample for pack in planned.packs for sample in pack.samples}
        assert sum(len(batch.ids) for batch in step.batches) == len(samples)
        for batch in step.batches:
            assert batch.tokens == sum(image.shape[1] * image.shape[2] for image in batch.images) // STRIDE**2
            assert batch.weights.tolist() == [1.0] * len(batch.ids)
            for i, sample_id in enumerate(batch.ids):
                matching = [s for (each, _), s in samples.items() if each == sample_id and s.kind == batch.kinds[i]]
                sample = matching[0]
                row = int(sample.key[-4:]) + 14 * sample.shard
                assert batch.images[i].shape == (3, sample.height, sample.width)
                assert batch.noise[i].shape == (CHANNELS, sample.height // FACTOR, sample.width // FACTOR)
                expected = load_image(pictures[sample_id], resize=sample.resize, crop=(sample.height, sample.width))
                assert np.array_equal(batch.images[i].permute(1, 2, 0).numpy(), expected)
                assert batch.captions[i] in {"", *(f"caption {k} of {row}" for k in range(1 + row % 3))}
                assert batch.labels[i] == (row if batch.captions[i] else -1)
            assert batch.uniforms.dtype == torch.float64
            assert 0 < batch.uniforms.min() < batch.uniforms.max() < 1


def stored_images(corpus: Corpus) -> dict[str, bytes]:
    pictures = {}
    for number, shard in enumerate(corpus.shards):
        tar = Path(shard.path).read_bytes()
        for row in corpus.read(number, columns=("key", "image_offset", "image_length")).to_pylist():
            pictures[row["key"]] = tar[row["image_offset"] : row["image_offset"] + row["image_length"]]
    return pictures


def test_every_caption_is_chosen_and_dropout_drops(corpus: Corpus) -> None:
    steps = list(islice(make_loader(corpus, dropout=0.3), 12))
    captions = [caption for step in steps for batch in step.batches for caption in batch.captions]
    assert {f"caption {k} of 5" for k in range(3)} <= set(captions)
    assert 0.2 < captions.count("") / len(captions) < 0.4


def test_noise_is_normal_and_belongs_to_sample_and_visit(corpus: Corpus) -> None:
    batches = [batch for step in islice(make_loader(corpus), 6) for batch in step.batches]
    values = torch.cat([noise.flatten() for batch in batches for noise in batch.noise])
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    firsts = [float(noise.flatten()[0]) for batch in batches for noise in batch.noise]
    assert len(set(firsts)) == len(firsts)


def test_worker_processes_give_what_this_process_gives(corpus: Corpus) -> None:
    here = list(islice(make_loader(corpus, workers=0), 5))
    loader = make_loader(corpus, workers=2, prefetch=3)
    there = list(islice(loader, 5))
    assert_same(here, there)
    assert loader.state_dict() == here[-1].state
    loader.close()


def test_workers_and_ranks_are_pure_functions_of_the_plan(corpus: Corpus, tmp_path: Path) -> None:
    """With everything drawn that can be, from a mixture with a schedule: byte by byte the same, however many workers and ranks."""
    tagged = [Sample(40, 24 + 8 * i, (f"first, a{i}, b, c, d", f"second, x, y{i}, z")) for i in range(9)]
    write_corpus(tmp_path / "tagged", shards=[tagged[:4], tagged[4:]], name="tagged")
    stages = (Stage(step=2, max_tokens=16, packs_per_step=8, weights={"corpus": 1, "tagged": 3}),)

    def load(*, workers: int, ranks: int) -> list[list[LoadedStep]]:
        shares = []
        for rank in range(ranks):
            planner = Planner(
                [CorpusView(corpus, weight=1.0, where="width > 20"), CorpusView(Corpus.open(tmp_path / "tagged"), weight=1.0)],
                plan=PlanConfig(stride=STRIDE, max_tokens=36, tokens_per_pack=72, packs_per_step=4, flip=0.5, schedule=stages),
                seed=5,
                width=32,
                diffusion_share=0.5,
                consistency_share=0.1,
                caption_dropout=0.2,
                caption_weights=(1, 2),
                shuffle_tags=TagShuffle(keep=1),
            )
            loader = Loader(planner, seed=5, rank=rank, world_size=ranks, channels=CHANNELS, factor=FACTOR, workers=workers)
            shares.append(list(islice(loader, 3)))
            loader.close()
        return shares

    (alone,) = load(workers=0, ranks=1)
    for workers, ranks in ((1, 1), (3, 1), (0, 2), (3, 2), (0, 4), (1, 4)):
        shares = load(workers=workers, ranks=ranks)
        if ranks == 1:
            assert_same(alone, shares[0])
        for step, *parts in zip(alone, *shares, strict=True):
            assert {(part.ids, part.images, part.tokens, json.dumps(part.state)) for part in parts} == {
                (step.ids, step.images, step.tokens, json.dumps(step.state))
            }
            together = by_sample([batch for part in parts for batch in part.batches])
            assert together == by_sample(step.batches)
            assert len(together) == step.images
    captions = {caption for step in alone for batch in step.batches for caption in batch.captions if "," in caption}
    assert {caption.split(",")[0] for caption in captions} == {"first", "second"}
    assert any(not caption.startswith(("first, a", "second, x")) for caption in captions)


def test_captions_are_drawn_by_their_weights(corpus: Corpus) -> None:
    draws = {weights: drawn_captions(corpus, weights=weights) for weights in ((1.0,), (3.0, 1.0), (0.0, 0.0, 1.0))}
    assert 0.28 < draws[1.0,].count(0) / len(draws[1.0,]) < 0.39
    assert 0.53 < draws[3.0, 1.0].count(0) / len(draws[3.0, 1.0]) < 0.67  # 3 of 3 + 1 + 1
    assert set(draws[0.0, 0.0, 1.0]) == {2}


def drawn_captions(corpus: Corpus, *, weights: tuple[float, ...]) -> list[int]:
    """Which of their captions samples get that have three."""
    plan = PlanConfig(stride=STRIDE, max_tokens=36, tokens_per_pack=288, packs_per_step=8)
    planner = Planner([corpus], plan=plan, seed=1, width=32, diffusion_share=0.5, consistency_share=0.1, caption_weights=weights)
    samples = [sample for _ in range(12) for pack in planner.next_step().packs for sample in pack.samples]
    assert {sample.caption for sample in samples if (sample.row + 14 * sample.shard) % 3 == 0} == {0}  # they have one
    return [sample.caption for sample in samples if (sample.row + 14 * sample.shard) % 3 == 2]


def test_resume_is_exact_whatever_was_read_ahead(corpus: Corpus) -> None:
    unbroken = list(islice(make_loader(corpus, workers=0), 7))
    first = make_loader(corpus, workers=2, prefetch=2)
    begun = list(islice(first, 3))
    state = first.state_dict()
    first.close()
    assert state == begun[-1].state
    second = make_loader(corpus, workers=1, prefetch=1)
    second.load_state_dict(state)
    assert_same(unbroken, begun + list(islice(second, 2)) + list(islice(second, 2)))  # a second iteration goes on, too
    second.close()


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_ranks_share_the_step(corpus: Corpus, world_size: int) -> None:
    alone = list(islice(make_loader(corpus), 3))
    ranks = [list(islice(make_loader(corpus, rank=rank, world_size=world_size), 3)) for rank in range(world_size)]
    for step, *shares in zip(alone, *ranks, strict=True):
        assert {share.ids for share in shares} == {step.ids}
        assert {len(share.batches) for share in shares} == {-(-4 // world_size)}
        assert by_sample(step.batches) == by_sample([batch for share in shares for batch in share.batches])


def test_an_empty_pack_is_one_dummy(corpus: Corpus) -> None:
    batch = next(iter(make_loader(corpus, packs=1, rank=99, world_size=100))).batches[0]
    assert (batch.ids, batch.captions, batch.tokens) == ([""], [""], 0)
    assert batch.images[0].shape == (3, STRIDE, STRIDE)
    assert batch.noise[0].shape == (CHANNELS, STRIDE // FACTOR, STRIDE // FACTOR)
    assert (batch.weights.tolist(), batch.kinds.tolist(), batch.labels.tolist()) == ([0.0], [DIFFUSION], [-1])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_leaves_weight_0(
    corpus: Corpus, damage: Callable[[Corpus, int, int], str], caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    whole = list(islice(make_loader(corpus), 4))
    broken = damage(corpus, 1, 3)
    loader = make_loader(corpus, workers=workers, max_bad_fraction=0.2)
    with caplog.at_level(logging.WARNING):
        steps = list(islice(loader, 4))
    loader.close()
    places = 0
    for step, before in zip(steps, whole, strict=True):
        assert (step.ids, step.images, step.tokens) == (before.ids, before.images, before.tokens)
        for batch, same in zip(step.batches, before.batches, strict=True):
            for i, sample_id in enumerate(batch.ids):
                if sample_id == broken:
                    places += 1
                    assert batch.weights[i] == 0
                    assert batch.images[i].shape == (3, STRIDE, STRIDE)
                else:
                    assert batch.weights[i] == 1
                    assert torch.equal(batch.images[i], same.images[i])
                    assert torch.equal(batch.noise[i], same.noise[i])
    assert places == loader.samples_failed > 0
    assert loader.samples_seen == sum(step.images for step in steps)
    assert f"skipped sample {broken} of {corpus.shards[1].path}: " in caplog.text
    assert "not-an-image" in caplog.text


def test_too_many_damaged_images_stop_the_run(corpus: Corpus, damage: Callable[[Corpus, int, int], str]) -> None:
    for row in range(3):
        damage(corpus, 0, row)
    with pytest.raises(RuntimeError, match=r"samples could not be used, more than max_bad_fraction 0\.05 allows.*tim verify"):
        list(islice(make_loader(corpus, max_bad_fraction=0.05), 20))
    with pytest.raises(RuntimeError, match="max_bad_fraction 0 allows"):
        list(islice(make_loader(corpus, max_bad_fraction=0), 20))


def lose(tar: Path) -> str:
    tar.unlink()
    return "is missing"


def cut(tar: Path) -> str:
    os.truncate(tar, tar.stat().st_size - 1024)
    return r"has \d+ bytes, the manifest says \d+"


def change(tar: Path) -> str:
    with tar.open("r+b") as stream:
        stream.write(b"other")  # in a header: no sample notices
    return "does not match its digest"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("ruin", [lose, cut, change])
def test_a_bad_shard_is_an_error_or_skipped_and_counted(
    corpus: Corpus, ruin: Callable[[Path], str], caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    """The rest of a plan from which a shard is skipped is read as if it were there, and resumes from the same states."""
    whole = list(islice(make_loader(corpus), 6))
    limits = {"error": 0.01, "skip": 1.0, "some": 0.05}
    loader, skipping, limited = (
        make_loader(corpus, workers=workers, verify=True, on_bad_shard="error" if what == "error" else "skip", max_bad_fraction=limit)
        for what, limit in limits.items()
    )
    tar = corpus.shards[0].path
    problem = ruin(Path(tar))
    with pytest.raises(RuntimeError, match=f"sample corpus/000000.* cannot be read: BadShard: {tar} {problem}"):
        list(islice(loader, 20))
    with caplog.at_level(logging.WARNING):
        steps = list(islice(skipping, 6))
    skipping.close()
    assert [(step.ids, step.state) for step in steps] == [(step.ids, step.state) for step in whole]
    assert [message.count(tar) for message in caplog.messages] == [2]
    lost = sum(id.startswith("corpus/000000") for step in steps for id in step.ids)
    assert (skipping.samples_skipped, skipping.samples_failed) == (lost, 0)
    with pytest.raises(RuntimeError, match=r"\d+ of \d+ samples could not be used, more than max_bad_fraction 0\.05 allows"):
        list(islice(limited, 20))
    for step, before in zip(steps, whole, strict=True):
        for batch, same in zip(step.batches, before.batches, strict=True):
            assert batch.weights.tolist() == [float(not id.startswith("corpus/000000")) for id in batch.ids]
            kept = [i for i, weight in enumerate(batch.weights) if weight]
            assert all(torch.equal(batch.images[i], same.images[i]) and batch.captions[i] == same.captions[i] for i in kept)


def test_killed_workers_cost_nothing_but_time(corpus: Corpus, caplog: pytest.LogCaptureFixture) -> None:
    """Whenever it happens to them: no sample is lost, repeated or blamed."""
    here = list(islice(make_loader(corpus, workers=0), 8))
    loader = make_loader(corpus, workers=2)
    steps, there = iter(loader), []
    for _ in range(8):
        there.append(next(steps))
        for child in workers_of_this_process():
            child.send_signal(signal.SIGKILL)
    loader.close()
    assert_same(here, there)
    assert (loader.samples_seen, loader.samples_failed) == (sum(step.images for step in there), 0)
    assert re.search(r"reader-\d \(pid \d+\) (was killed by signal 9 \(SIGKILL\)|ended with exit code 255).*: a new process", caplog.text)


class Dying:
    """Decodes packs as a loader does, but for what happens at one sample: the process ends by a signal, or waits for ever."""

    def __init__(self, decode: Callable[..., Any], *, key: str, number: int | None) -> None:
        self.decode, self.key, self.number = decode, key, number

    def __call__(
        self, fetched: FetchedPack, /, *, begin: Callable[[int], None] = print, lost: Mapping[int, str] = MappingProxyType({})
    ) -> ReadPack:
        def meet(position: int) -> None:
            begin(position)
            if position >= 0 and fetched.samples[position].key == self.key:
                os.kill(os.getpid(), self.number) if self.number is not None else time.sleep(1000)

        return self.decode(fetched, begin=meet, lost=lost)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, None])
def test_a_sample_that_takes_its_reader_down_is_named_and_skipped(
    corpus: Corpus, caplog: pytest.LogCaptureFixture, number: int | None
) -> None:
    steps = 1 if number is None else 3  # each time that it is stuck takes the time limit
    whole = list(islice(make_loader(corpus), steps))
    victim = whole[0].ids[5]
    came = []
    for workers in (1, 2) if number == signal.SIGSEGV else (2,):
        loader = make_loader(corpus, workers=workers, max_bad_fraction=0.2, timeout=5 if number is None else 60)
        loader._decode = Dying(loader._decode, key=victim.partition("/")[2], number=number)
        came.append(list(islice(loader, steps)))
        loader.close()
        assert loader.samples_failed == sum(id == victim for step in whole for id in step.ids) > 0
    assert_same(came[0], came[-1])
    for step, before in zip(came[0], whole, strict=True):
        assert (step.ids, step.images, step.tokens) == (before.ids, before.images, before.tokens)
        for batch, same in zip(step.batches, before.batches, strict=True):
            assert batch.weights.tolist() == [float(id != victim) for id in batch.ids]
            kept = [i for i, weight in enumerate(batch.weights) if weight]
            assert all(torch.equal(batch.images[i], same.images[i]) and torch.equal(batch.noise[i], same.noise[i]) for i in kept)
    how = "was stuck for 5 s" if number is None else f"was killed by signal {number:d} ({signal.Signals(number).name})"
    assert re.search(rf"reader-\d \(pid \d+\) {re.escape(how)} at sample {victim} of .*\.tar: a new process retries its work", caplog.text)
    assert re.search(rf"skipped sample {victim} of .*\.tar: .*crashed: .* {re.escape(how)}", caplog.text)


def test_samples_that_take_readers_down_count_as_bad(corpus: Corpus) -> None:
    loader = make_loader(corpus, workers=1, max_bad_fraction=0)
    loader._decode = Dying(loader._decode, key="0000000002", number=signal.SIGSEGV)
    with pytest.raises(RuntimeError, match=r"[12] of .* samples could not be used, more than max_bad_fraction 0 allows"):
        list(islice(loader, 20))
    assert not workers_of_this_process()


class DyingAtOnce:
    """Dies before any sample is looked at."""

    def __call__(
        self, fetched: FetchedPack, /, *, begin: Callable[[int], None] = print, lost: Mapping[int, str] = MappingProxyType({})
    ) -> ReadPack:
        os._exit(3)


def test_workers_that_die_without_end_end_the_run(corpus: Corpus) -> None:
    loader = make_loader(corpus, workers=2)
    loader._decode = DyingAtOnce()
    with pytest.raises(RuntimeError, match=r"reader-\d \(pid \d+\) ended with exit code 3, the 5th time that a worker died at this task: "):
        next(iter(loader))
    assert not workers_of_this_process()


def test_a_stuck_read_is_an_error_within_the_limit(corpus: Corpus) -> None:
    loader = make_loader(corpus, workers=1, timeout=1.5)
    pipe = Path(corpus.shards[0].path)
    pipe.unlink()
    os.mkfifo(pipe)  # opening it waits for a writer who never comes
    with pytest.raises(RuntimeError, match=r"has been stuck for 1\.5 s: is the storage alive"):
        list(islice(loader, 20))
    assert not workers_of_this_process()


TRAINER = """
import sys, time
from pathlib import Path
from pipeline.corpus.corpus import Corpus
from tests.pipeline.loading.test_loader import make_loader

if __name__ == "__main__":
    loader = make_loader(Corpus.open(Path(sys.argv[1])), workers=1)
    steps = iter(loader)
    next(steps)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(5):
        next(steps)
    print("done", flush=True)
"""


@pytest.fixture
def trainer(corpus: Corpus, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has loaded a step, loads five more when a line is typed, and ends without closing its loader."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, script, corpus.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_workers_end_with_a_trainer_that_is_killed(trainer: subprocess.Popen[bytes]) -> None:
    children = psutil.Process(trainer.pid).children(recursive=True)
    assert len(children) >= 2
    trainer.kill()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


def test_signals_that_a_scheduler_sends_to_all_leave_the_trainer_its_workers(trainer: subprocess.Popen[bytes]) -> None:
    children = psutil.Process(trainer.pid).children(recursive=True)
    for child in children:
        child.send_signal(signal.SIGTERM)
    output, _ = trainer.communicate(b"go on\n", timeout=60)
    assert (output, trainer.returncode) == (b"done\n", 0)
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


def workers_of_this_process() -> list[psutil.Process]:
    """The fork server's children."""
    servers = [child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())]
    return [worker for server in servers for worker in server.children() if worker.status() != psutil.STATUS_ZOMBIE]


def test_impossible_loaders(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match=r"plan\.stride 8 is not a multiple"):
        Loader(make_loader(corpus)._planner, seed=0, channels=3, factor=3)
    with pytest.raises(ValueError, match="rank 2 is not one of 2 ranks"):
        make_loader(corpus, rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"loader\.workers -1"):
        make_loader(corpus, workers=-1)


def test_captions_and_labels_may_be_absent(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path, shards=[[Sample(16, 16), Sample(24, 16, (), 7)]])
    batches = next(iter(make_loader(corpus, dropout=0.0))).batches
    assert {caption for batch in batches for caption in batch.captions} == {""}
    assert {label for batch in batches for label in batch.labels.tolist()} == {-1, 7}
