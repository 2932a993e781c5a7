"""Packs of a plan as a `torch.utils.data.IterableDataset`, for training loops of other people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.corpus.corpus import Corpus
from pipeline.loading.loader import Batch, Loader
from pipeline.packing.rank_assignment import assign_to_ranks
from pipeline.planning.config import PlanConfig
from pipeline.planning.planner import Planner
from pipeline.streams.corpus_view import CorpusView

Source = str | Path | Corpus | CorpusView

FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch(Batch):
    """One pack of a step, and its place in the plan.

    `step` counts from 0. `step_images` are the planned images of the step on all ranks: divide sums over images by it. `is_last` marks the
    last pack of this rank in the step: the optimizer's turn. `state` is what `PackedDataset.load_state_dict` takes to continue after this
    pack.
    """

    step: int
    step_images: int
    is_last: bool
    state: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        """Lists of tensors travel between processes as one tensor each, because every tensor costs a file descriptor."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return _unpickle, ({name: _join(value, name) if _is_list_of_tensors(value) else value for name, value in values.items()},)


class PackedDataset(IterableDataset[PackedBatch]):
    """The endless, seeded, resumable stream of one rank's packs. Use it with `DataLoader(dataset, batch_size=None)`.

    The stream is the same for any number of DataLoader workers: each worker plans all steps, which reads no image, and reads and decodes
    every n-th pack. All ranks get equally many packs of each step, at nearly equal cost.

    To save a position, keep the `state` of the last batch that was trained; it is exact for any number of workers, also with torch's own
    DataLoader. Or save `StatefulDataLoader.state_dict()` (torchdata), which asks every worker for its `state_dict()`. Ranks share one
    state. Taken between two steps, it also continues with another number of ranks.

    Every iterator begins where the last loaded state stands, or at the first step; so iterate once, and stop after as many steps as wanted.
    Without workers, `state_dict()` follows the iterator.

    Args:
        corpora: folders or URLs of corpora, or open ones.
        plan: limits of images, packs and steps; `stride` is required.
        seed: of order, captions, flips, times and noise.
        rank, world_size: which packs of each step are read.
        lockstep: whether ranks wait for each other in every pack (a gradient reduction per backward pass), or once a step.
        channels, factor: of `noise`: channels, and pixels per cell. The default is noise of the image's own shape.
        width: the network's width, for the cost of attention.
        diffusion_share, consistency_share: shares of images with r = t and with r = 0; plain diffusion has r = t alone.
        caption_dropout: share of images whose caption or class is dropped.

    Raises ValueError, in one line, if a corpus cannot be opened or the plan is impossible.
    """

    def __init__(
        self,
        corpora: Source | Sequence[Source],
        *,
        plan: PlanConfig,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        lockstep: bool = False,
        channels: int = 3,
        factor: int = 1,
        width: int = 1152,
        diffusion_share: float = 1.0,
        consistency_share: float = 0.0,
        caption_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sources = [corpora] if isinstance(corpora, Source) else corpora
        self._corpora = [Corpus.open(source) if isinstance(source, str | Path) else source for source in sources]
        self._plan: dict[str, Any] = {
            "plan": plan,
            "seed": seed,
            "width": width,
            "diffusion_share": diffusion_share,
            "consistency_share": consistency_share,
            "caption_dropout": caption_dropout,
        }
        self._reading: dict[str, Any] = {
            "seed": seed, "rank": rank, "world_size": world_size, "lockstep": lockstep, "channels": channels, "factor": factor,
        }  # fmt: skip
        self._rank = rank
        self._world_size = world_size
        self._lockstep = lockstep
        planner = self._open()
        self._reader(planner)
        self._start = self._state = self._position(planner.state_dict(), packs=0)

    def __iter__(self) -> Iterator[PackedBatch]:
        """Endless. Raises RuntimeError if too many samples cannot be read, as `Loader` does."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        start = self._state = self._start
        if start["workers"] not in (1, workers):
            raise ValueError(f"the state was saved by one of {start['workers']} workers, and there are {workers}: use as many")
        skip = worker if start["workers"] == 1 else start["skip"]
        planner = self._open()
        reader = self._reader(planner)
        planner.load_state_dict(start["plan"])
        first = start["packs"]
        while True:
            before = planner.state_dict()
            step = planner.next_step()
            after = planner.state_dict()
            packs = assign_to_ranks(step, ranks=self._world_size, lockstep=self._lockstep)[self._rank]
            for number, pack in enumerate(packs[first:], start=first + 1):
                if skip:
                    skip -= 1
                    continue
                batch = reader.read_pack(pack.samples)
                is_last = number == len(packs)
                state = self._position(after, packs=0) if is_last else self._position(before, packs=number)
                skip = workers - 1
                self._state = {**state, "workers": workers, "skip": skip}
                values = {field.name: getattr(batch, field.name) for field in fields(batch)}
                yield PackedBatch(**values, step=step.index, step_images=step.images, is_last=is_last, state=state)
            first = 0

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands after the pack that it gave last: JSON-able, below 100 kB."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin every later iterator after the pack at which `state` was taken.

        Raises ValueError if it is of another format, of another plan, or taken within a step of another number of ranks.
        """
        if state.get("format") != FORMAT:
            raise ValueError(f"the saved position is of format {state.get('format')!r}, this version of tim reads format {FORMAT}")
        ranks = [self._world_size, self._lockstep]
        if (state["packs"] or state["skip"]) and list(state["ranks"]) != ranks:
            raise ValueError(f"the state was saved within a step of {state['ranks'][0]} ranks, and there are {ranks[0]}: use as many")
        self._open().load_state_dict(state["plan"])
        self._start = self._state = dict(state)

    def _open(self) -> Planner:
        return Planner(self._corpora, **self._plan)

    def _reader(self, planner: Planner) -> Loader:
        return Loader(planner, workers=0, **self._reading)

    def _position(self, plan: dict[str, Any], *, packs: int) -> dict[str, Any]:
        """After so many of this rank's packs of the plan's next step, for any number of workers.

        `skip` packs of a worker's own state belong to the other `workers`.
        """
        return {"format": FORMAT, "plan": plan, "packs": packs, "ranks": [self._world_size, self._lockstep], "workers": 1, "skip": 0}


class _Joined(NamedTuple):
    """Tensors one after the other in `flat`, and the shape of each."""

    flat: Tensor
    shapes: list[torch.Size]


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)


def _join(tensors: list[Tensor], name: str) -> _Joined:
    """Images lie in memory row by row with their channels together, and stay so."""
    laid_out = [tensor.permute(1, 2, 0) if name == "images" else tensor for tensor in tensors]
    return _Joined(torch.cat([tensor.reshape(-1) for tensor in laid_out]), [tensor.shape for tensor in laid_out])


def _unpickle(values: dict[str, Any]) -> PackedBatch:
    for name, value in values.items():
        if isinstance(value, _Joined):
            parts = value.flat.split([shape.numel() for shape in value.shapes])
            tensors = [part.view(shape) for part, shape in zip(parts, value.shapes, strict=True)]
            values[name] = [tensor.permute(2, 0, 1) for tensor in tensors] if name == "images" else tensors
    return PackedBatch(**values)
