"""From the command line of `tim eval` to its result, in this process or in several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from launch.arguments import parse_scales, parse_steps
from launch.console import Console
from launch.distributed.torchrun import die_with_launcher
from launch.evaluation.job import evaluate, open_for_evaluation
from launch.evaluation.options import EvalOptions
from launch.evaluation.results.compare import compare
from launch.evaluation.results.report import report
from launch.evaluation.scorers import check_names
from launch.evaluation.supplied import compare_features
from launch.evaluation.typed_options import Typed
from launch.sampling.model_source import ModelOptions, say_nothing
from launch.sampling.processes import deliver, result_of_processes, team
from pipeline.corpus.corpus import Corpus

Result = tuple[str, dict[str, Any]]  # text for the screen, JSON
_TEXT = "text"  # key of the text in the result of several processes
_OF_MODELS = (  # options that --real-features has no use for
    *("compare", "corpus", "guidance", "images", "max_pixels", "features", "clip", "save_images"),
    *("recipe", "codec", "text", "tokenizer", "lora", "device", "dtype", "memory_gb", "processes"),
)


def run(typed: Typed, *, arguments: Sequence[str], console: Console) -> None:
    """Evaluate, and print the result. arguments: the same command line, for several processes, whose workers print nothing.

    Raises ValueError, in a sentence, for options that do not fit.
    """
    metrics = _metrics(typed)
    if typed.real_features is not None or typed.generated_features is not None:
        text, data = _of_files(typed, metrics, console=console)
        console.result(text, data=data)
        return
    models, options = _models(typed), _options(typed, metrics)
    if "LOCAL_RANK" in os.environ:
        die_with_launcher()
    elif (processes := typed.processes or _devices(typed)) > 1:
        if typed.device is not None:
            raise ValueError(f"--device {typed.device} is for one process; leave it out, or give --processes 1")
        result = result_of_processes("eval", arguments, processes=processes, console=console)
        console.result(result.pop(_TEXT), data=result)
        return
    done = _evaluate(models, options, console=console)
    if done is not None and not deliver({_TEXT: done[0], **done[1]}):
        console.result(done[0], data=done[1])


def _evaluate(models: Sequence[ModelOptions], options: EvalOptions, *, console: Console) -> Result | None:
    """The result, on the main process; None on the others."""
    with team() as state, ExitStack() as locks:
        is_main = state is None or state.is_main_process
        log = console.line if is_main else say_nothing
        corpus = Corpus.open(options.corpus)  # before models, which take longer
        opened = [open_for_evaluation(model, options, state=state, log=log) for model in models]
        folders = [options.out] if len(models) == 1 else [options.out / name for name in ("a", "b")]
        evaluated = evaluate(opened, folders, options, corpus=corpus, state=state, console=console, locks=locks)
        if not is_main:
            return None
        reports = [report(each, options, console=console) for each in evaluated]
        if len(reports) == 1:
            return reports[0].text, reports[0].data
        text, data = compare(evaluated, reports, options)
        return "\n\n".join([*(each.text for each in reports), text]), {**data, "evaluations": [each.data for each in reports]}


def _of_files(typed: Typed, metrics: Sequence[str], *, console: Console) -> Result:
    if typed.real_features is None or typed.generated_features is None:
        raise ValueError("--real-features and --generated-features: give both")
    if typed.model is not None:
        raise ValueError(f"--real-features {typed.real_features}: needs no model; leave out MODEL")
    for name in _OF_MODELS:
        if getattr(typed, name):
            raise ValueError(f"--real-features {typed.real_features}: needs no model and no corpus; leave out --{name.replace('_', '-')}")
    with console.progress() as report:
        files = typed.real_features, typed.generated_features
        return compare_features(*files, metrics=metrics, resamples=typed.resamples, out=typed.out, report=report)


def _metrics(typed: Typed) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in typed.metrics.split(","))) if typed.metrics is not None else ()
    check_names(names)
    return names


def _models(typed: Typed) -> list[ModelOptions]:
    """One model, or two to compare."""
    if (typed.model is None) == (typed.compare is None):
        given = "neither was given" if typed.model is None else "both were given"
        raise ValueError(f"expected MODEL, or --compare MODEL MODEL: {given} (see `tim eval --help`)")
    paths: Sequence[str] = [typed.model] if typed.model is not None else typed.compare or ()
    if len(paths) > 1 and typed.lora:
        raise ValueError("--lora: would change both models of --compare; merge it into a model folder first, with tim export --merged")
    return [ModelOptions.typed(path, typed) for path in paths]


def _options(typed: Typed, metrics: tuple[str, ...]) -> EvalOptions:
    if typed.corpus is None:
        raise ValueError("--corpus: missing; give the corpus whose images are the real ones, as `tim prepare` wrote it")
    return EvalOptions(
        corpus=typed.corpus,
        out=typed.out,
        steps=tuple(parse_steps(typed.steps)),
        guidances=() if typed.guidance is None else tuple(parse_scales(typed.guidance)),
        images=typed.images,
        seed=typed.seed,
        max_pixels=typed.max_pixels,
        features=tuple(typed.features or ("pixels",)),
        metrics=metrics,
        clip=typed.clip,
        memorised=typed.memorised,
        resamples=typed.resamples,
        save_images=typed.save_images,
    )


def _devices(typed: Typed) -> int:
    """Number of processes by default: one per GPU."""
    import torch

    return 1 if typed.device is not None else max(1, torch.cuda.device_count())
