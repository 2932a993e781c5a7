"""History of a run: its initial weights, and the steps at which it was replanned.

    RUN/history.json    {"init": {path, digest, …}, "replans": [{"step": 500, "plan_hash": "…", "changes": ["plan.max_tokens was …"]}]}

It is written before the first affected step. Every checkpoint has a copy in its trainer.json, and config.yaml starts with it as comments.
A run that is killed before its next checkpoint resumes with the replan recorded here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.config.schema import ConfigError
from pipeline.storage.atomic import publish_text

HISTORY = "history.json"
MAX_NAMED = 10


@dataclass(frozen=True, slots=True)
class Initial:
    """Initial weights of a run: path, sha256, and number of loaded tensors.

    For a run, the sha256 is that of its checkpoint's manifest. `source` is the absolute path of the file or folder. `not_loaded`
    are tensors of the network that stay randomly initialized, `not_used` tensors of the file that the network does not have.
    """

    path: str
    digest: str
    loaded: int
    not_loaded: tuple[str, ...] = ()
    not_used: tuple[str, ...] = ()
    source: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors of {self.path} (sha256 {self.digest[:16]})"]
        for names, what in ((self.not_loaded, "stay randomly initialized"), (self.not_used, "of the file are not used")):
            if names:
                more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
                parts.append(f"{len(names)} {what}: {', '.join(names[:MAX_NAMED])}{more}")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Replan:
    """A new plan, with this hash, from `step` on, because of these changes."""

    step: int
    plan_hash: str
    changes: tuple[str, ...]

    def __str__(self) -> str:
        return f"step {self.step}: replanned, because {'; '.join(self.changes)}"


@dataclass(frozen=True, slots=True)
class History:
    """Initial weights and replans of a run."""

    init: Initial | None = None
    replans: tuple[Replan, ...] = ()

    def with_replan(self, new: Replan) -> History:
        """Add a replan, and drop earlier entries for the same or later steps, which left no checkpoint."""
        return replace(self, replans=(*[each for each in self.replans if each.step < new.step], new))

    def lines(self) -> Iterator[str]:
        if self.init is not None:
            yield f"initialized from {self.init}"
        yield from map(str, self.replans)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> History:
        """Inverse of `to_json`; an empty mapping gives an empty history. Raises KeyError or TypeError for invalid content."""
        init = content.get("init")
        lists = {name: tuple(init[name]) for name in ("not_loaded", "not_used")} if init else {}
        replans = tuple(Replan(each["step"], each["plan_hash"], tuple(each["changes"])) for each in content.get("replans", ()))
        return cls(init=Initial(**{**init, **lists}) if init else None, replans=replans)


def read(run_dir: Path) -> History:
    """Read the history of a run; empty if there is no file. Raises ConfigError if the file is damaged."""
    path = run_dir / HISTORY
    if not path.is_file():
        return History()
    try:
        return History.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}): delete it; checkpoints hold a copy") from error


def write(run_dir: Path, history: History) -> None:
    if history != History() or (run_dir / HISTORY).exists():
        publish_text(run_dir / HISTORY, json.dumps(history.to_json(), indent=1, ensure_ascii=False))
