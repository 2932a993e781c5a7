"""Check that a run can resume from a checkpoint, and restore or replace its plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.checkpoints import checkpoint
from launch.checkpoints.finetuned.base import FrozenBase, check_base
from launch.checkpoints.history import History, Replan
from launch.checkpoints.saving.disk import check_mounted
from launch.checkpoints.saving.mirror import Mirror
from launch.checkpoints.tensor_fragments import Shapes
from launch.config.schema import Config, ConfigError
from pipeline.loading.loader import Loader
from pipeline.planning.plan_changes import PlanChange
from pipeline.planning.planner import Planner

_CONFIG_KEYS = {
    "width": "network.params.hidden_size",
    "diffusion_share": "objective.diffusion_share",
    "consistency_share": "objective.consistency_share",
    "caption_weights": "text.caption_weights",
    "shuffle_tags": "text.shuffle_tags",
}


def find_checkpoint(run_dir: Path, *, mirror: str | None) -> checkpoint.Checkpoint | None:
    """The checkpoint to resume from: the newest local one, else the newest of the mirror, which is copied to the run folder.

    None for a new run. Raises CheckpointError if the run has begun but has no intact checkpoint, ConfigError if the mirror belongs to
    another run, and OSError if it is needed but cannot be reached.
    """
    copies = None if mirror is None else Mirror(mirror, run_dir=run_dir)
    found = problem = None
    try:
        found = checkpoint.newest(run_dir)
    except checkpoint.CheckpointError as error:
        problem = error
    if copies is not None:
        try:
            copies.check_owner()
            found = found or copies.restore()
        except OSError:
            if found is None:
                raise
    if found is None and problem is not None:
        raise problem
    if found is None:
        check_mounted(run_dir)
    return found


def trainer_state(found: checkpoint.Checkpoint, *, config: Config, shapes: Shapes, base: FrozenBase | None = None) -> dict[str, Any]:
    """Trainer state of a checkpoint. base: this run's frozen weights.

    Raises ConfigError if its format, optimizer, frozen weights or network differs from the config's.
    """
    folder = found.folder
    if found.metadata.format != checkpoint.FORMAT:
        remedy = "resume with that version, or start another run; `tim export` can read its weights"
        raise ConfigError(f"{folder} was written by an earlier version, with the optimizer's state in DeepSpeed's format: {remedy}")
    state = checkpoint.read_trainer_state(folder)
    if state["optimizer"] != config.train.optimizer:
        raise ConfigError(
            f"{folder} was written with train.optimizer={state['optimizer']}, not {config.train.optimizer}: resume with the same optimizer"
        )
    saved = found.pieces("weights").shapes
    check_base(state, base, saved=saved, shapes=shapes, folder=folder)
    if saved != shapes:
        raise ConfigError(f"{folder} holds a different network than the config: restore the config, or give another run_dir")
    return state


def restore_plan(
    target: Planner | Loader,
    state: dict[str, Any],
    *,
    planner: Planner,
    recorded: History,
    config: Config,
    folder: Path,
    replan: bool = False,
) -> tuple[History, list[str]]:
    """Restore the plan's position from a checkpoint's trainer `state`. Returns the run's updated history, and log lines.

    If the plan's inputs have changed, a new plan starts at that step if `replan` is set, or if the `recorded` history has this replan (of
    a run that was stopped before its next checkpoint). `target` is the planner itself, or the loader that owns it.

    Raises ConfigError naming the changes and the flag otherwise.
    """
    data, past = state["data"], History.from_json(state.get("history", {}))
    changes = planner.changes_since(data)
    weights = [f"changed since the checkpoint: {change}" for change in planner.loss_weights_since(data)]
    if not changes:
        target.load_state_dict(data)
        return past, weights + ["--replan: no effect, the inputs of the plan have not changed"] * replan
    step = data["step"]
    descriptions = [_describe_change(change, config=config) for change in changes]
    is_recorded = any(each.step == step and each.plan_hash == planner.plan_hash for each in recorded.replans)
    if not (is_recorded or replan):
        remedy = (
            f"restore the settings, or add --replan to resume from step {step} with a new plan (keeps weights, averages, learning rate)"
        )
        raise ConfigError(f"the plan of {folder} differs: {'; '.join(descriptions)}: {remedy}")
    target.replan(data)
    history = past.with_replan(Replan(step=step, plan_hash=planner.plan_hash, changes=tuple(descriptions)))
    notes = [*weights, str(history.replans[-1])]
    if is_recorded and replan:
        notes.append(f"--replan: no effect, the inputs of the plan have not changed since the replan at step {step}")
    return history, notes


def _describe_change(change: PlanChange, *, config: Config) -> str:
    """Describe a change of the plan by its config key."""
    dropout = "text.caption_dropout" if config.condition == "text" else "network.params.class_dropout_prob"
    return f"{ {**_CONFIG_KEYS, 'caption_dropout': dropout}.get(change.key, change.key) } {change.description}"
