"""`tim index`: index tars written by other tools into a corpus folder. The tars are not modified or copied.

Each tar gets a table and a stats file, its commit marker, as a prepared shard has; manifest.json is written last. A tar that has both is
not read again, so a killed run can be resumed and a corpus extended. A tar that cannot be read becomes one rejected input.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq

from dataprep.shards.manifest import MANIFEST, InputCounts, count_entries
from dataprep.shards.writer import ShardEntry, shard_name
from dataprep.sources.files.paths import is_pattern, named_files
from dataprep.sources.webdataset import DOTTED_TAKEN, members_left_out, open_tar, sidecar_table
from dataprep.workers.pool import LocalPool
from pipeline.bounded_counter import MAX_NAMES, BoundedCounter
from pipeline.corpus.corpus import FORMAT, read_manifest
from pipeline.corpus.foreign_tar import ForeignShard, index_tar, unreadable
from pipeline.progress import Progress, no_progress
from pipeline.storage.atomic import JOB, WORK, exclusive_lock, publish, publish_text
from pipeline.storage.remote import is_remote
from pipeline.workers.pool import WorkerDied

__all__ = ["index"]

KIND = "index"
_QUALIFIED = "keys of different tars may be equal: in ids of samples the number of the tar stands before them"


@dataclass(frozen=True, slots=True)
class IndexTask:
    """A tar to index. `crashed`: offsets of images that crashed the decoder."""

    number: int
    tar: str
    out: Path
    crashed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class IndexedShard:
    """A finished shard: its manifest entry, its rejected rows by reason, its smallest and largest key, notes, and the number of members
    left out by extension (`has_dotted`: some because of dots in their names)."""

    shard: ShardEntry
    rejected: dict[str, int]
    first_key: str
    last_key: str
    notes: list[str]
    left_out: dict[str, int] = field(default_factory=dict)
    has_dotted: bool = False


def index(shards: Sequence[str], *, out: str | Path, workers: int = 1, progress: Progress = no_progress) -> InputCounts:
    """Make a corpus in the folder `out` from the tars that `shards` name ("x/{000..999}.tar", "x/*.tar", URLs). Returns the input counts.

    The same call resumes an interrupted run; if tars are added at the end, only those are read. `progress` is called with
    ("index", tars done, number of tars).

    Raises ValueError if no tar exists or `out` cannot be used, RuntimeError if no sample is usable.
    """
    out = Path(out)
    if not shards:
        raise ValueError("no shards: name at least one tar")
    tars = [tar for spec in shards for tar in _find_tars(spec)]
    if len(set(tars)) < len(tars):
        twice = next(tar for tar, times in Counter(tars).items() if times > 1)
        raise ValueError(f"{twice}: named twice; a corpus may contain a tar once")
    _check_output(out)
    with exclusive_lock(out):
        found = _index_all(tars, out=out, workers=workers, progress=progress)
        _delete_shards(out, first=len(tars))  # of an earlier run with more tars
        counts = _input_counts(found)
        if counts.kept:
            _write_manifest(out, name=_name(shards[0], tars[0]), found=found, counts=counts)
        else:
            _delete_shards(out, first=0)
        shutil.rmtree(out / WORK)
    if not counts.kept:
        if not any(out.iterdir()):
            out.rmdir()
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts.rejected.items()) or "they are empty"
        notes = "".join(f"; {note}" for note in counts.notes)
        raise RuntimeError(f"no usable sample in {len(tars)} tar(s) ({reasons}): nothing was written{notes}")
    return counts


def index_shard(task: IndexTask, report: Callable[[int], None]) -> IndexedShard:
    """Read one tar, then write its table and its stats. `report` is called with the offset of each image before Pillow opens it."""
    found, size = read_foreign(task.tar, crashed=task.crashed, report=report)
    table, stats = _names(task.number)
    buffer = io.BytesIO()
    pq.write_table(found.table, buffer, compression="zstd", row_group_size=max(1, found.table.num_rows))
    with publish(task.out / table) as stream:
        stream.write(buffer.getbuffer())
    keys = [key for key in found.table.column("key").to_pylist() if key is not None]
    shard = ShardEntry(
        name=task.tar,
        count=len(keys),
        bytes=size,
        sha256=None,
        table=table,
        table_sha256=hashlib.sha256(buffer.getbuffer()).hexdigest(),
        table_bytes=buffer.getbuffer().nbytes,
        rows=found.table.num_rows,
    )
    rejected = found.table.filter(found.table.column("key").is_null()).select(["path", "reason", "detail"]).to_pylist()
    notes = [f"{task.tar}: {row['reason']}: {row['detail']}" for row in rejected if row["path"] == os.path.basename(task.tar)]
    done = IndexedShard(
        shard=shard,
        rejected=dict(sorted(Counter(row["reason"] for row in rejected).items())),
        first_key=min(keys, default=""),
        last_key=max(keys, default=""),
        notes=notes,
        left_out=dict(found.left_out),
        has_dotted=found.has_dotted,
    )
    publish_text(task.out / stats, json.dumps({"format": FORMAT, **asdict(done)}, indent=1, ensure_ascii=False) + "\n")
    return done


def read_foreign(
    tar: str, *, crashed: frozenset[int] = frozenset(), report: Callable[[int], None] = lambda offset: None
) -> tuple[ForeignShard, int]:
    """The index and the size in bytes of a tar at a path or URL. An unreadable tar gives one rejected row."""
    name = os.path.basename(tar)
    try:
        with open_tar(tar) as file:
            return index_tar(file, tar=name, sidecar=sidecar_table(tar), crashed=crashed, on_risk=report), file.size
    except FileNotFoundError:
        return unreadable(name, reason="missing", detail="there is no such tar"), 0
    except OSError as error:
        return unreadable(name, reason="bad-record", detail=f"cannot be read: {error}"), 0


def _find_tars(spec: str) -> list[str]:
    """All tars that a pattern names, including missing ones: gaps in a download become rejected inputs. Raises ValueError."""
    names = named_files(spec)
    if not is_remote(spec):
        names = [os.path.abspath(name) for name in names]
        if not any(map(os.path.exists, names)):
            raise ValueError(f"{spec}: no file matches")
    unusable = next((name for name in names if not name.lower().endswith(".tar") or os.path.isdir(name)), None)
    if unusable:
        raise ValueError(f"{unusable}: not a .tar; compressed ones can be prepared from, but not read at any offset")
    return names


def _name(spec: str, tar: str) -> str:
    """Name of the corpus: the folder's name, or the name of a single tar."""
    *folders, base = tar.removesuffix(".tar").split("/")
    return (folders[-1:] or [""])[0] or "data" if "{" in spec or is_pattern(spec) else base


def finished(out: Path, *, number: int, tar: str) -> IndexedShard | None:
    """The shard if it is complete: stats file written, table of full length, and the size of the tar (if local) unchanged."""
    table, stats = _names(number)
    try:
        record = json.loads((out / stats).read_text("utf-8"))
        shard = ShardEntry(**record.pop("shard"))
        if record.pop("format") != FORMAT or (shard.name, shard.table) != (tar, table) or not shard.bytes:
            return None
        lengths = (out / table).stat().st_size, shard.bytes if is_remote(tar) else os.stat(tar).st_size
        return IndexedShard(shard=shard, **record) if lengths == (shard.table_bytes, shard.bytes) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _delete_shards(out: Path, *, first: int) -> None:
    """Delete tables and stats of the shards from number `first` on."""
    for stats in out.glob("[0-9]*_stats.json"):
        number = int(stats.name.removesuffix("_stats.json"))
        if number >= first:
            for name in _names(number):
                (out / name).unlink(missing_ok=True)


def _names(number: int) -> tuple[str, str]:
    return f"{shard_name(number)}.parquet", f"{shard_name(number)}_stats.json"


def _check_output(out: Path) -> None:
    """Raises ValueError if `out` holds anything but an index, finished or not."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; give a folder")
    if not out.is_dir():
        return
    if ((out / MANIFEST).is_file() and read_manifest(out).get("kind") != KIND) or (out / WORK / JOB).is_file():
        raise ValueError(f"{out}: holds a corpus that `tim prepare` made; give another folder")
    ours = re.compile(r"\d{6,}(\.parquet|_stats\.json)(\..+\.tmp)?|manifest\.json.*|" + re.escape(WORK))
    unknown = sorted(path.name for path in out.iterdir() if not ours.fullmatch(path.name))
    if unknown:
        raise ValueError(f"{out}: not empty ({unknown[0]} is in it) and not an index; give a new or empty folder")


def _index_all(tars: Sequence[str], *, out: Path, workers: int, progress: Progress) -> list[IndexedShard]:
    """Index all tars that are not finished; returns all shards."""
    found = [finished(out, number=number, tar=tar) for number, tar in enumerate(tars)]
    missing = [number for number, shard in enumerate(found) if shard is None]
    if missing:
        (out / MANIFEST).unlink(missing_ok=True)  # it does not list the tables about to be written

    def show(done: int) -> None:
        progress("index", len(tars) - len(missing) + done, len(tars))

    show(0)
    tasks = (IndexTask(number=number, tar=tars[number], out=out) for number in missing)
    with LocalPool(workers) as pool:
        results = pool.map(index_shard, tasks, retry=_skip_crashed_image)
        for done, (number, shard) in enumerate(zip(missing, results, strict=True), start=1):
            found[number] = shard
            show(done)
    return [shard for shard in found if shard]


def _skip_crashed_image(task: IndexTask, death: WorkerDied) -> IndexTask:
    """After a worker died: the task with the image that it was opening rejected as `crashed`."""
    if death.at < 0 or death.at in task.crashed:
        raise death
    return replace(task, crashed=task.crashed | {death.at})


def _input_counts(found: Sequence[IndexedShard]) -> InputCounts:
    rejected: Counter[str] = Counter()
    notes = [note for shard in found for note in shard.notes]
    if len(notes) > MAX_NAMES:
        notes[MAX_NAMES:] = [f"there are {len(notes) - MAX_NAMES} more notes on tars: their stats files have them"]
    left_out = BoundedCounter()
    for shard in found:
        rejected.update(shard.rejected)
        for extension, count in shard.left_out.items():
            left_out.add(extension, count)
    has_dotted = any(shard.has_dotted for shard in found)
    if left_out.total():
        notes.append(members_left_out(left_out, has_dotted=has_dotted))
    elif has_dotted:
        notes.append(DOTTED_TAKEN)
    if _keys_may_repeat(found):
        notes.append(_QUALIFIED)
    kept = sum(shard.shard.count for shard in found)
    inputs = kept + rejected.total()
    return InputCounts(inputs=inputs, kept=kept, rejected=dict(sorted(rejected.items())), notes=notes, shards=len(found))


def _keys_may_repeat(found: Sequence[IndexedShard]) -> bool:
    """Whether two shards may share a key, judged by their smallest and largest keys."""
    ranges = sorted((shard.first_key, shard.last_key) for shard in found if shard.shard.count)
    return any(following[0] <= before[1] for before, following in pairwise(ranges))


def _write_manifest(out: Path, *, name: str, found: Sequence[IndexedShard], counts: InputCounts) -> None:
    manifest = {
        "format": FORMAT,
        "kind": KIND,
        "name": name,
        "qualified_keys": _QUALIFIED in counts.notes,
        **count_entries(counts, shards=[each.shard for each in found]),
        "shards": [asdict(each.shard) for each in found],
    }
    publish_text(out / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
