"""`tim encode`: encode the images and captions of a corpus into feature shards (docs/formats.md). Read `encode` from top to bottom.

Processes, one per GPU, share the shards: a free process takes the next one. Shards are written atomically, so a killed run can be resumed
and ends with the same bytes; new shards of an extended corpus are encoded the same way. The result does not depend on the number of
processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich import filesize

from dataprep.config_diff import difference
from dataprep.features.encode_shard import EncodedShard, encode_shard, finished_shard, fitted_live_view, read_samples
from dataprep.features.encoders import EncodeConfig, Encoders, identity
from dataprep.features.live_view import remember_live_view
from dataprep.shards.manifest import MANIFEST
from dataprep.shards.writer import shard_name
from dataprep.workers.decode_pool import Decoders
from pipeline.corpus.corpus import Corpus
from pipeline.features.manifest import EMPTY, KIND
from pipeline.features.tensors import pack, text_name
from pipeline.features.writer import features_manifest
from pipeline.progress import Progress, no_progress
from pipeline.storage.atomic import JOB, WORK, exclusive_lock, publish, publish_text
from pipeline.storage.remote import is_remote

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

__all__ = ["EncodeConfig", "Encoded", "encode"]

Announce = Callable[[str], None]

_POLL_SECONDS = 0.2
_PATIENCE = timedelta(days=7)  # how long processes wait for the main one, which reads all tables first
_TRIED_CAPTIONS = 2000  # sampled to estimate caption lengths
_DONE = "done-"  # prefix of the processes' progress files
_LISTED = ("name", "bytes", "sha256", "table", "table_sha256", "of")  # of a shard in the manifest
_MEMBER_BYTES = 1024  # header, padding and names of tensors
_DIGITS = {"float16": 2, "bfloat16": 2, "float32": 4}  # bytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """Content of a folder of features. `rejected`: reason → number of samples whose image could not be decoded. `cut`: number of captions
    longer than `text.max_tokens`."""

    shards: int
    samples: int
    captions: int
    bytes: int
    rejected: dict[str, int]
    cut: int = 0


def encode(
    corpus: str | Path,
    *,
    out: str | Path,
    config: EncodeConfig,
    progress: Progress = no_progress,
    announce: Announce | None = None,
) -> Encoded | None:
    """Encode a corpus into the folder `out`. Every process that accelerate or torchrun started calls it with the same arguments; the main
    process gets the result, the others get None.

    The same call resumes an interrupted run, returns at once if the folder is finished, and encodes new shards of an extended corpus.
    `announce` is called with the expected size before the work starts, `progress` with ("encode", samples done, samples).

    Raises ValueError if the corpus, a model or `out` cannot be used, or `out` holds features of other settings; OSError if a shard of the
    corpus cannot be read.
    """
    import torch
    from accelerate import PartialState

    team = PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    done = None
    with _reproducible(team) as device:
        opened, out = Corpus.open(corpus), Path(out)
        if team.is_main_process:
            done = _run_main(opened, out=out, config=config, team=team, device=device, progress=progress, announce=announce)
        else:
            _run_helper(opened, out=out, config=config, team=team, device=device)
    if team.num_processes > 1:
        team.destroy_process_group()
    return done


def _run_helper(corpus: Corpus, *, out: Path, config: EncodeConfig, team: PartialState, device: torch.device) -> None:
    """Other processes: encode a share of the shards between the main process's set-up and its end."""
    team.wait_for_everyone()
    if not (out / MANIFEST).is_file():
        encoders, counter = Encoders(config, device=device), _SampleCounter(corpus, out=out, team=team)
        _encode_missing(corpus, out=out, config=config, encoders=encoders, workers=_workers(team), counter=counter)
    team.wait_for_everyone()


def _run_main(
    corpus: Corpus,
    *,
    out: Path,
    config: EncodeConfig,
    team: PartialState,
    device: torch.device,
    progress: Progress,
    announce: Announce | None,
) -> Encoded:
    """The main process: check the arguments, set up the folder, encode a share of the shards, write the manifest."""
    _check_output(out, corpus=corpus)
    settings = features_manifest(**identity(config), dtype=config.dtype, zstd=config.zstd, flipped=config.flip, rules=config.rules)
    _check_settings(out, settings=settings)
    encoders = None
    if not _is_finished(out, corpus=corpus):
        if announce is not None:
            announce(_expectation(corpus, config=config, settings=settings, out=out))
        encoders = Encoders(config, device=device)
    existed = out.is_dir()
    with exclusive_lock(out) as work, _cleaned_up_on_error(out, corpus=corpus, existed=existed):
        if encoders is not None:
            _begin(out, corpus=corpus, settings=settings, encoders=encoders)
        team.wait_for_everyone()
        if encoders is not None:
            counter = _SampleCounter(corpus, out=out, team=team, progress=progress)
            _encode_missing(corpus, out=out, config=config, encoders=encoders, workers=_workers(team), counter=counter)
            shards = _wait_for_all(corpus, out=out, counter=counter)
            manifest = _manifest(settings, shards=shards, live_view=fitted_live_view(out) if shards else None)
            publish_text(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            remember_live_view(manifest["live_view"], section=config.codec and config.codec.model_dump())
        team.wait_for_everyone()
        shutil.rmtree(work)
    return read_encoded(out)


@contextmanager
def _cleaned_up_on_error(out: Path, *, corpus: Corpus, existed: bool) -> Iterator[None]:
    """After an error before any shard is finished: delete the files of the job, and the folder if it did not exist before."""
    try:
        yield
    except BaseException:
        if not any(finished_shard(out, number=number, of=shard.digest) for number, shard in enumerate(corpus.shards)):
            for path in out.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not existed:
                out.rmdir()
        raise


def read_encoded(out: Path) -> Encoded:
    """Content of a finished folder, from its manifest."""
    manifest = json.loads((out / MANIFEST).read_text("utf-8"))
    return Encoded(shards=len(manifest["shards"]), rejected=manifest["rejected"], **manifest["totals"])


@contextmanager
def _reproducible(team: PartialState) -> Iterator[torch.device]:
    """The device of this process. On a CPU, torch runs one thread, because the rounding of sums depends on their number."""
    import torch

    device, threads = torch.device(team.device or "cpu"), torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield device
    finally:
        torch.set_num_threads(threads)


def _workers(team: PartialState) -> int:
    """Decoding processes per encoding process."""
    return max(1, len(os.sched_getaffinity(0)) // team.num_processes)


def _check_output(out: Path, *, corpus: Corpus) -> None:
    """Raises ValueError if features cannot be written to `out`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder")
    if not is_remote(corpus.folder) and corpus.path.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out}: is inside the corpus {corpus.path}; give a folder elsewhere")
    if not out.is_dir():
        return
    ours = re.compile(rf"\d{{6,}}(\.tar|\.parquet|_stats\.json)(\..+\.tmp)?|(manifest\.json|{re.escape(EMPTY)}).*|{re.escape(WORK)}")
    unknown = sorted(path.name for path in out.iterdir() if not ours.fullmatch(path.name))
    if unknown:
        raise ValueError(f"{out}: not empty ({unknown[0]} is in it) and not features; give a new or empty folder")


def _check_settings(out: Path, *, settings: dict[str, Any]) -> None:
    """Raises ValueError if `out` holds features of other settings, finished or not, with the difference."""
    before, state = out / MANIFEST, "finished"
    if not before.is_file():
        before, state = out / WORK / JOB, "unfinished"
    if not before.is_file():
        return
    found = json.loads(before.read_text("utf-8"))
    if state == "finished" and found.get("kind") != KIND:
        raise ValueError(f"{out}: holds a corpus, not features; give a new folder")
    if state == "unfinished":
        if found.get("version") != version("tim"):
            raise ValueError(
                f"{out}: holds unfinished features of tim {found.get('version')}; finish them with that version, or give another folder"
            )
        found = found["settings"]
    changed = next((text for name in settings if (text := difference(found.get(name), settings[name], at=name))), "")
    if changed:
        raise ValueError(f"{out}: holds {state} features with another {changed}; give another folder, or delete this one")


def _is_finished(out: Path, *, corpus: Corpus) -> bool:
    """Whether `out` has a manifest and all shards of the current corpus."""
    shards = (finished_shard(out, number=number, of=shard.digest) for number, shard in enumerate(corpus.shards))
    return (out / MANIFEST).is_file() and all(shards) and not _obsolete_files(out, shards=len(corpus.shards))


def _obsolete_files(out: Path, *, shards: int) -> list[Path]:
    """Files of shards that the corpus no longer has."""
    return [path for path in out.glob("[0-9]*") if int(re.split(r"[._]", path.name)[0]) >= shards]


def _begin(out: Path, *, corpus: Corpus, settings: dict[str, Any], encoders: Encoders) -> None:
    """Record the job before the other processes start."""
    work = out / WORK
    publish_text(work / JOB, json.dumps({"version": version("tim"), "settings": settings}, indent=1))
    (out / MANIFEST).unlink(missing_ok=True)  # it does not list the shards about to be written
    for file in [*_obsolete_files(out, shards=len(corpus.shards)), *work.glob(f"{_DONE}*")]:
        file.unlink()
    if encoders.text is not None:
        with publish(out / EMPTY) as stream:
            stream.write(pack({text_name(0): encoders.captions([""])[0]}))


def _encode_missing(corpus: Corpus, *, out: Path, config: EncodeConfig, encoders: Encoders, workers: int, counter: _SampleCounter) -> None:
    """Encode shards until each is finished or taken by another process."""
    with Decoders(workers) as decoders:
        for number, shard in enumerate(corpus.shards):
            with _try_lock(out / WORK / f"{shard_name(number)}.lock") as mine:
                if mine and finished_shard(out, number=number, of=shard.digest) is None:
                    encode_shard(corpus, number, out=out, config=config, encoders=encoders, decoders=decoders, report=counter.add)


@contextmanager
def _try_lock(lock: Path) -> Iterator[bool]:
    """Whether this process gets the lock. The operating system releases it when the process ends, even by SIGKILL."""
    held = FileLock(lock, timeout=0, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()


class _SampleCounter:
    """Counts encoded samples: each process writes its count to a file; the main process adds them up and reports the sum."""

    def __init__(self, corpus: Corpus, *, out: Path, team: PartialState, progress: Progress | None = None) -> None:
        finished = [shard.count for i, shard in enumerate(corpus.shards) if finished_shard(out, number=i, of=shard.digest)]
        self._known = sum(finished)
        self._total = corpus.count
        self._file = out / WORK / f"{_DONE}{team.process_index}"
        self._progress = progress
        self._mine = 0
        self.show()

    def add(self, samples: int) -> None:
        self._mine += samples
        self._file.write_text(str(self._mine))
        self.show()

    def show(self) -> None:
        if self._progress is not None:
            done = sum(int(file.read_text() or 0) for file in self._file.parent.glob(f"{_DONE}*"))
            self._progress("encode", min(self._known + done, self._total), self._total)


def _wait_for_all(corpus: Corpus, *, out: Path, counter: _SampleCounter) -> list[EncodedShard]:
    """Wait until all shards are finished. If another process fails, the launcher ends this one."""
    shards: list[EncodedShard] = []
    for number, shard in enumerate(corpus.shards):
        while (found := finished_shard(out, number=number, of=shard.digest)) is None:
            time.sleep(_POLL_SECONDS)
            counter.show()
        shards.append(found)
    return shards


def _manifest(settings: dict[str, Any], *, shards: list[EncodedShard], live_view: dict[str, Any] | None) -> dict[str, Any]:
    rejected = sum((Counter(shard.rejected) for shard in shards), Counter())
    totals = {name: sum(getattr(shard, name) for shard in shards) for name in ("samples", "captions", "bytes", "cut")}
    entries = [{name: value for name, value in asdict(shard).items() if name in _LISTED} for shard in shards]
    return {**settings, "live_view": live_view, "totals": totals, "rejected": dict(sorted(rejected.items())), "shards": entries}


def _expectation(corpus: Corpus, *, config: EncodeConfig, settings: dict[str, Any], out: Path) -> str:
    """The expected size, in one line: exact for latents, estimated from sampled lengths for captions."""
    cells = images = tokens = captions = 0
    some: list[str] = []
    for number, shard in enumerate(corpus.shards):
        samples = read_samples(corpus, number, config=config) if shard.count else []
        for sample in samples:
            area = sum(height * width for _, _, height, width in sample.crops) * (1 + config.flip)
            images += len(sample.crops) * (1 + config.flip)
            captions += len(sample.captions)
            if (codec := settings["codec"]) is not None:
                cells += area // codec["factor"] ** 2 * codec["channels"] * (1 + codec["draws"])
                if (teacher := settings["teacher"]) is not None:
                    cells += area // (codec["factor"] * config.patch_size) ** 2 * teacher["width"]
        some += [sample.captions[0] for sample in samples[: -(-_TRIED_CAPTIONS // len(corpus.shards))]]
    if (text := config.text) is not None:
        from tim.text import encoders

        tokenize = encoders.tokenizer(text.kind, text.path, tokenizer_path=text.tokenizer, max_tokens=text.max_tokens)
        lengths = [len(each) for each in tokenize(some)]
        tokens = captions * sum(lengths) // max(1, len(lengths))
        cells += tokens * settings["text"]["width"]
    expected = cells * _DIGITS[config.dtype] + corpus.count * _MEMBER_BYTES
    parts = [f"{images} images"] * (images > 0) + [f"{captions} captions"] * (text is not None)
    folder = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    expectation = f"about {filesize.decimal(expected)}{' before compression' if config.zstd else ''}"
    return f"{corpus.count} samples, {' and '.join(parts)}: {expectation}; {filesize.decimal(free)} are free"
