"""Check a run without a step: configuration, plan, files, shards, weights, models and memory. Nothing is written.

A configuration without a corpus, such as a shipped recipe, is checked as far as it goes; what is left to give is listed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from launch.checkpoints import checkpoint
from launch.checkpoints.run_folder import CONFIG, changes_on_resume
from launch.config.schema import Config
from launch.distributed.device import training_device
from launch.distributed.ranks import Ranks
from launch.engine.optimizers import check_available
from launch.estimate.estimate import Setting, Situation, setting_of, work_of
from launch.estimate.initial_header import check_initial
from launch.hardware.devices import Device
from launch.text_tables import count
from launch.training.build import execution, make_loader
from launch.training.checks import cached_parts, check_models
from launch.training.planning import make_planner
from pipeline.errors import one_line
from tim import codecs

Status = Literal["ok", "problem", "not given"]
UNLIMITED = 1e18


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was checked. detail: what was found, or what is wrong and what to do."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class DryRun:
    """Result of the checks. memory: of a step on a rank, None if it could not be estimated."""

    checks: tuple[Check, ...]
    memory: Setting | None

    @property
    def ok(self) -> bool:
        return not any(check.status == "problem" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        memory = self.memory
        facts = None if memory is None else {"peak": memory.memory.peak, "parts": dict(memory.memory.parts), "fits": memory.fits}
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks], "memory": facts}

    def lines(self) -> Iterator[str]:
        width = max(len(check.name) for check in self.checks)
        for check in self.checks:
            yield f"{check.status:9}  {check.name:{width}}  {check.detail}"
        missing = [check.name for check in self.checks if check.status == "not given"]
        problems = sum(check.status == "problem" for check in self.checks)
        given = f"; to give before training: {', '.join(missing)}" if missing else ""
        yield (f"{problems} problem{'s' if problems > 1 else ''}" if problems else "no problem found") + given


def dry_run(config: Config, *, ranks: int = 1) -> DryRun:
    """Check a run of so many ranks."""
    device = training_device()
    checks = [
        _check("config", lambda: f"{config.train.steps:,} steps, ZeRO {config.train.zero}, {config.train.precision}"),
        _run_folder(config),
        _check("execution", lambda: _execution(config, device)),
        *_models(config),
        *_data(config, ranks=ranks),
        _check("train.init", lambda: check_initial(config)),
    ]
    memory, check = _memory(config, device, ranks=ranks)
    return DryRun((*checks, check), memory)


def _check(name: str, action: Callable[[], str]) -> Check:
    """Run a check. What a user can put right is a problem with one line; other errors are raised."""
    try:
        return Check(name, "ok", action())
    except (ValueError, OSError, RuntimeError) as error:
        return Check(name, "problem", one_line(error, limit=500))


def _run_folder(config: Config) -> Check:
    run_dir = config.run_dir
    if run_dir is None:
        return Check("run_dir", "not given", "give it in the file, or as run_dir=PATH on the command line")

    def look() -> str:
        if run_dir.exists() and not run_dir.is_dir():
            raise ValueError(f"run_dir {run_dir} is a file; give a folder")
        parent = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"run_dir {run_dir}: {parent} is not writable; give another folder")
        if not (run_dir / CONFIG).is_file():
            return f"{run_dir}: a new run"
        changes, found = changes_on_resume(run_dir, config), checkpoint.newest(run_dir)
        at = "from the start, there is no checkpoint" if found is None else f"from step {found.metadata.step}"
        return f"{run_dir}: resumes {at}{'; changed: ' + '; '.join(changes) if changes else ''}"

    return _check("run_dir", look)


def _execution(config: Config, device: torch.device) -> str:
    check_available(config.train.optimizer)
    execution(config.train, device, tokens_per_pack=config.plan.tokens_per_pack)
    return f"{config.train.optimizer}, attention {config.train.attention} on {device.type}"


def _models(config: Config) -> Iterator[Check]:
    """Codec, text encoder and teacher. Without a corpus it is not known which features are cached."""
    paths = {
        "codec.path": config.codec.path if config.codec.kind != "pixel" else "",
        "text.path": config.text.path if config.condition == "text" and config.text.kind != "lookup" else "",
        "objective.alignment.path": "" if config.objective.alignment is None else config.objective.alignment.path,
    }
    missing = [key for key, path in paths.items() if path is None]
    if not config.corpus and missing:
        yield from (Check(key, "not given", "needed unless `tim encode` has cached its features") for key in missing)
        return
    yield _check("models", lambda: check_models(config) or "codec, text encoder and teacher are there")


def _data(config: Config, *, ranks: int) -> Iterator[Check]:
    """Corpora, one planned step, and one of its packs as a rank reads it."""
    if not config.corpus:
        yield Check("corpus", "not given", "give it in the file, or as corpus=PATH on the command line")
        return
    try:
        planner = make_planner(config)
        state = planner.state_dict()
        step = planner.next_step()
        planner.load_state_dict(state)
    except (ValueError, OSError) as error:
        yield Check("plan", "problem", one_line(error, limit=500))
        return
    images = f"{count(step.images, 'image')} in {count(len(step.packs), 'pack')}, {step.fill:.0%} full"
    yield Check("plan", "ok", f"{count(len(planner.shards), 'shard')}, first step: {images}")

    def read() -> str:
        with_models = "latents" not in cached_parts(config)
        loader = make_loader(
            config.model_copy(update={"loader": config.loader.model_copy(update={"workers": 0, "prefetch": 1, "cache": None})}),
            planner,
            ranks=Ranks(rank=0, size=len(step.packs), device=torch.device("cpu")),
            geometry=codecs.geometry(config.codec.kind, config.codec.path, channels=config.codec.channels),
            stochastic_codec=with_models and codecs.is_stochastic(config.codec.kind),
        )
        try:
            loaded = next(iter(loader))
        finally:
            loader.close()
        ids = [id for batch in loaded.batches for id in batch.ids if id]
        bad = loader.samples_failed + loader.samples_skipped
        if bad:
            raise ValueError(f"{bad} of {len(ids)} images of the first pack cannot be read: run `tim verify` on the corpus")
        return f"read {len(ids)} images of the first step"

    yield _check("shards", read)


def _memory(config: Config, device: torch.device, *, ranks: int) -> tuple[Setting | None, Check]:
    """Estimate of a step's memory, against the GPU of this machine if it has one."""
    size = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else UNLIMITED
    situation = Situation(ranks=ranks, device=Device(title=device.type, memory=size, bf16=1.0, fp32=1.0), quick=True)
    try:
        work = work_of(config.model_copy(update={"corpus": ()}), situation)
        setting, cached = (setting_of(config, replace(situation, cached=each), work=work) for each in (False, True))
    except (ValueError, OSError) as error:
        return None, Check("memory", "problem", one_line(error, limit=500))
    said = f"about {setting.memory.peak / 1e9:,.1f} GB on each of {ranks} rank{'s' if ranks > 1 else ''}"
    if not config.corpus and cached.memory.peak < 0.98 * setting.memory.peak:
        said += f", {cached.memory.peak / 1e9:,.1f} GB with features of `tim encode`"
    if setting.fits or (cached.fits and not config.corpus):
        return setting, Check("memory", "ok", f"{said}; `tim estimate` says more")
    return setting, Check("memory", "problem", f"{said}, the GPU has {size / 1e9:,.1f}: `tim estimate` says what to change")
