"""Whether, and with which plan, a run goes on from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.checkpoints import checkpoint
from launch.checkpoints.history import History, Replan
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


def trainer_state(found: checkpoint.Checkpoint, *, config: Config, shapes: Shapes) -> dict[str, Any]:
    """The trainer's part of a checkpoint. Raises ConfigError if it is of another version, optimizer or network than the config's."""
    folder = found.folder
    if found.metadata.format != checkpoint.FORMAT:
        remedy = "go on with that version, or start another run; `tim export` reads its weights"
        raise ConfigError(f"{folder} was written by an earlier version, which left the optimizer's state to DeepSpeed: {remedy}")
    state = checkpoint.read_trainer_state(folder)
    if state["optimizer"] != config.train.optimizer:
        raise ConfigError(f"{folder} was written with train.optimizer={state['optimizer']}, not {config.train.optimizer}: keep it")
    if found.pieces("weights").shapes != shapes:
        raise ConfigError(f"{folder} holds another network than the config describes: go on as before, or give another run_dir")
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
    """Set the plan to where a checkpoint's trainer `state` stands. Returns the run's history now, and what to say about it.

    If the plan's inputs have changed since, it begins anew at that step where `replan` asks for it, or where the `recorded` history says
    that a run which was stopped before its next checkpoint had done so. `target` is the planner itself, or the loader that owns it.

    Raises ConfigError naming what has changed, and the flag, if neither is the case.
    """
    data, past = state["data"], History.of_json(state.get("history", {}))
    changes = planner.changes_since(data)
    if not changes:
        target.load_state_dict(data)
        return past, ["--replan: nothing that the plan depends on has changed: going on with it"] * replan
    step = data["step"]
    said = [_in_words(change, config=config) for change in changes]
    begun = any(each.step == step and each.plan_hash == planner.plan_hash for each in recorded.replans)
    if not (begun or replan):
        remedy = f"go on as before, or add --replan to go on from step {step} with weights, averages and learning rate kept and a new plan"
        raise ConfigError(f"the plan of {folder} was another one: {'; '.join(said)}: {remedy}")
    target.replan(data)
    history = past.with_replan(Replan(step=step, plan_hash=planner.plan_hash, changes=tuple(said)))
    notes = [str(history.replans[-1])]
    if begun and replan:
        notes.append(f"--replan: nothing that the plan depends on has changed since it was planned anew at step {step}: going on with it")
    return history, notes


def _in_words(change: PlanChange, *, config: Config) -> str:
    """A change of the plan under the config's names."""
    dropout = "text.caption_dropout" if config.condition == "text" else "network.params.class_dropout_prob"
    return f"{ {**_CONFIG_KEYS, 'caption_dropout': dropout}.get(change.key, change.key) } {change.said}"
