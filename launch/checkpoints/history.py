"""What a run's configuration does not say: which weights it began with, and at which steps it was planned anew.

    RUN/history.json    {"init": {path, digest, …}, "replans": [{"step": 500, "plan_hash": "…", "changes": ["plan.max_tokens was …"]}]}

It is written before the first step that it is about, every checkpoint has a copy in its trainer.json, and config.yaml opens with it as
comments. A replan that no checkpoint has yet is known from here: a run that is killed goes on with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch.checkpoints.checkpoint import write_atomically
from launch.config.schema import ConfigError

HISTORY = "history.json"
MAX_NAMED = 10


@dataclass(frozen=True, slots=True)
class Initial:
    """The weights that a run began with: where they were, their sha256, and how many of the network's tensors they set.

    Of a run, the sha256 is that of its checkpoint's manifest. `not_loaded` are the network's tensors that kept their random start,
    `not_used` those of the file that found no place.
    """

    path: str
    digest: str
    loaded: int
    not_loaded: tuple[str, ...] = ()
    not_used: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors of {self.path} (sha256 {self.digest[:16]})"]
        for names, what in ((self.not_loaded, "kept their random start"), (self.not_used, "of the file were not used")):
            if names:
                more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
                parts.append(f"{len(names)} {what}: {', '.join(names[:MAX_NAMED])}{more}")
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Replan:
    """The plan with this hash began at `step`, after these changes."""

    step: int
    plan_hash: str
    changes: tuple[str, ...]

    def __str__(self) -> str:
        return f"step {self.step}: planned anew, because {'; '.join(self.changes)}"


@dataclass(frozen=True, slots=True)
class History:
    """Of one run, from its start to now."""

    init: Initial | None = None
    replans: tuple[Replan, ...] = ()

    def with_replan(self, new: Replan) -> History:
        """Replans from that step on, which led to nothing that was kept, are forgotten."""
        return replace(self, replans=(*[each for each in self.replans if each.step < new.step], new))

    def lines(self) -> Iterator[str]:
        if self.init is not None:
            yield f"began with {self.init}"
        yield from map(str, self.replans)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> History:
        """The history that `to_json` has written; an empty one of an empty mapping. Raises KeyError, TypeError for anything else."""
        init = content.get("init")
        lists = {name: tuple(init[name]) for name in ("not_loaded", "not_used")} if init else {}
        replans = tuple(Replan(each["step"], each["plan_hash"], tuple(each["changes"])) for each in content.get("replans", ()))
        return cls(init=Initial(**{**init, **lists}) if init else None, replans=replans)


def read(run_dir: Path) -> History:
    """The history of a run, an empty one if there is none. Raises ConfigError if its file is damaged."""
    path = run_dir / HISTORY
    if not path.is_file():
        return History()
    try:
        return History.of_json(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({type(error).__name__}: {error}): delete it; checkpoints hold a copy") from error


def write(run_dir: Path, history: History) -> None:
    if history != History() or (run_dir / HISTORY).exists():
        write_atomically(run_dir / HISTORY, json.dumps(history.to_json(), indent=1, ensure_ascii=False))
