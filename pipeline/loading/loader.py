"""Load planned packs as tensors. Worker processes prefetch in plan order; prefetched packs are not part of the state."""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from pipeline.cost import DIFFUSION
from pipeline.loading.feature_reader import FeatureDecoder
from pipeline.loading.pack_reader import DecodePack, Failure, PackReader, ReadPack
from pipeline.loading.pack_workers import PackWorkers
from pipeline.packing.rank_assignment import assign_to_ranks
from pipeline.planned_steps import PlannedSample, Step
from pipeline.storage.shard_reader import ShardCache, ShardFacts, ShardReader

if TYPE_CHECKING:
    from pipeline.corpus.corpus import Corpus
    from pipeline.planning.planner import Planner
    from pipeline.planning.validation_plan import ValidationPlan

logger = logging.getLogger(__name__)

_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Batch:
    """One pack of B images of different sizes in planned order, as pixels and captions or as features.

    `images` are uint8 (3, h, w), in memory (h, w, 3); `noise` float32 (C, h/factor, w/factor); `captions` are "" and `labels` (B,) int64
    −1 if dropped or absent; `kinds` (B,) int64; `uniforms` (B, 2) float64 in (0, 1) for the times; `weights` (B,) float32 of
    the losses: the corpus's `loss_weight`, 0 for an unreadable sample (replaced by a black image of one stride) and for the dummy of an
    empty pack, whose id is "". `tokens` is the
    planned number. `masks` are None or float32 (1, h/factor, w/factor): the share of the loss of each cell, 1 for images without a mask.

    Cached features replace their inputs, all in float32: `latents`, shaped like `noise`, replace images (empty list); `texts`, (M, F)
    each, replace captions (""). `teacher` (T, D) holds the alignment teacher's tokens. `codec_noise`, shaped like `noise`, is for a
    stochastic codec. Images, latents, teacher, masks and noise are on the loader's device, the rest is on the host.
    """

    ids: list[str]
    images: list[Tensor]
    captions: list[str]
    labels: Tensor
    kinds: Tensor
    uniforms: Tensor
    noise: list[Tensor]
    weights: Tensor
    tokens: int
    codec_noise: list[Tensor] | None = None
    latents: list[Tensor] | None = None
    texts: list[Tensor] | None = None
    teacher: Tensor | None = None
    masks: list[Tensor] | None = None


@dataclass(frozen=True, slots=True)
class LoadedStep:
    """A step with the packs of this rank. `images`, `tokens`, `fill` and `ids` cover all ranks; `state` is the plan's after the step."""

    index: int
    images: int
    tokens: int
    fill: float
    batches: list[Batch]
    ids: tuple[str, ...]
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A step whose packs are being read."""

    step: Step
    packs: list[tuple[PlannedSample, ...]]
    state: dict[str, Any]


class Loader:
    """Endless iterator over the steps of a plan, starting at the planner's state.

    Args:
        planner: owned by the loader from now on.
        seed: of times, noise and tags.
        rank, world_size: select the packs to read in each step; every rank gets the same number.
        lockstep: whether ranks wait for each other in every pack (ZeRO-2 and 3) or once a step; the assignment of packs depends on it.
        channels, factor: the codec's latent channels and pixels per latent cell.
        stochastic_codec: whether the codec samples the latents of images.
        teacher: load the alignment teacher's tokens, or images for the teacher if no tokens are cached.
        workers: number of reader processes; 0 reads in this process, which a crashing decoder then ends.
        prefetch: number of steps to read ahead.
        max_bad_fraction: share of samples that may fail or be skipped before reading stops with RuntimeError.
        on_bad_shard: whether a shard that is missing, truncated or does not match its digest stops reading with RuntimeError, or its
            samples are skipped and counted in `samples_skipped`.
        verify: check the digest of each local shard before its first read.
        cache: keeps whole copies of remote shards; with None, only the needed byte ranges are read.
        timeout: seconds without progress after which reading stops with RuntimeError, or the sample being decoded is given up.
        device: target of images and noise; copies to a GPU are asynchronous, from pinned memory.
    """

    def __init__(
        self,
        planner: Planner | ValidationPlan,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        lockstep: bool = False,
        channels: int,
        factor: int,
        stochastic_codec: bool = False,
        teacher: bool = False,
        workers: int = 2,
        prefetch: int = 2,
        max_bad_fraction: float = 0.01,
        on_bad_shard: Literal["error", "skip"] = "error",
        verify: bool = False,
        cache: ShardCache | None = None,
        timeout: float = 300.0,
        device: torch.device | None = None,
    ) -> None:
        if planner.stride % factor:
            raise ValueError(f"plan.stride {planner.stride} is not a multiple of the codec's {factor} pixels per latent cell")
        _check_arguments(rank, world_size, workers=workers, prefetch=prefetch, max_bad_fraction=max_bad_fraction, timeout=timeout)
        self.samples_seen = 0  # by this rank, since this object was made
        self.samples_failed = 0
        self.samples_skipped = 0  # because of bad shards; not counted in samples_failed

        # The plan, and the part of it that this rank reads.
        self._planner = planner
        self._state = planner.state_dict()
        self._rank, self._world_size, self._lockstep = rank, world_size, lockstep

        # Samples to packs: run by the workers.
        reader = _pack_reader(
            planner,
            ShardReader(facts=_facts(planner.corpora), cache=cache, verify=verify),
            geometry={"seed": seed, "stride": planner.stride, "channels": channels, "factor": factor},
            stochastic_codec=stochastic_codec,
            teacher=teacher,
        )
        self._fetch: Callable[[tuple[PlannedSample, ...]], Any] = reader.fetch
        self._decode: DecodePack = reader.decode
        self._workers, self._prefetch, self._timeout = workers, prefetch, timeout
        self._pool: PackWorkers | None = None
        self._ahead: deque[_Ahead] = deque()
        self._iterations = 0

        # Packs to batches, and what may fail on the way.
        self._channels, self._factor, self._device = channels, factor, device
        self._max_bad_fraction, self._on_bad_shard = max_bad_fraction, on_bad_shard
        self._bad_shards: set[str] = set()
        if workers:
            PackWorkers.prepare()

    def __iter__(self) -> Iterator[LoadedStep]:
        """Iterate without end. A new iterator ends the previous one.

        A sample counts as unreadable after a worker died or hung twice while decoding it. Raises RuntimeError if too many samples fail,
        if storage does not respond, or if workers keep dying.
        """
        self.close()
        self._planner.load_state_dict(self._state)
        if self._workers:
            steps_ahead = self._steps_ahead()
            self._pool = PackWorkers(self._fetch, self._decode, workers=self._workers, timeout=self._timeout)
        else:
            steps_ahead = 0
        iteration = self._iterations
        while iteration == self._iterations:
            while len(self._ahead) <= steps_ahead:
                self._plan_next_step()
            ahead = self._ahead.popleft()
            read = self._read(ahead.packs)
            batches = [self._batch(pack, samples=samples) for pack, samples in zip(read, ahead.packs, strict=True)]
            self._state = ahead.state
            self._stop_if_too_many_failed()
            yield LoadedStep(
                index=ahead.step.index,
                images=ahead.step.images,
                tokens=ahead.step.tokens,
                fill=ahead.step.fill,
                batches=batches,
                ids=ahead.step.ids,
                state=ahead.state,
            )

    def read_pack(self, samples: tuple[PlannedSample, ...]) -> Batch:
        """Read one pack in this process; the loader stays where it is. Raises RuntimeError if too many samples fail."""
        batch = self._batch(self._decode(self._fetch(samples)), samples=samples)
        self._stop_if_too_many_failed()
        return batch

    def count_bad(self, samples: int) -> None:
        """Count samples of this rank that were read but cannot be trained on. Raises RuntimeError if too many samples failed."""
        self.samples_failed += samples
        self._stop_if_too_many_failed()

    def state_dict(self) -> dict[str, Any]:
        """The plan's state after the last yielded step; prefetched steps do not count."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the step at which `state` was taken. Raises ValueError if it belongs to another plan."""
        self.close()
        self._planner.load_state_dict(state)
        self._state = state

    def replan(self, state: dict[str, Any]) -> None:
        """Start this plan at the step at which another plan's `state` was taken (`Planner.replan`)."""
        self.close()
        cast("Planner", self._planner).replan(state)
        self._state = self._planner.state_dict()

    def close(self) -> None:
        """End the workers and the current iterator. Iterating again restarts the workers."""
        self._iterations += 1
        self._ahead.clear()
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _plan_next_step(self) -> None:
        step = self._planner.next_step()
        rank_packs = assign_to_ranks(step, ranks=self._world_size, lockstep=self._lockstep)
        packs = [pack.samples for pack in rank_packs[self._rank]]
        self._ahead.append(_Ahead(step=step, packs=packs, state=self._planner.state_dict()))
        if self._pool is not None:
            for samples in packs:
                self._pool.put(samples)

    def _read(self, packs: list[tuple[PlannedSample, ...]]) -> list[ReadPack]:
        if self._pool is None:
            return [self._decode(self._fetch(samples)) for samples in packs]
        try:
            return [self._pool.get() for _ in packs]
        except Exception:
            self.close()
            raise

    def _steps_ahead(self) -> int:
        """Number of steps to read ahead: `prefetch`, or fewer if shared memory is small."""
        if not os.path.isdir(_SHARED_MEMORY):
            return self._prefetch
        stride, cells = self._planner.stride, self._planner.stride // self._factor
        packs = -(-self._planner.plan.max_packs_per_step // self._world_size)
        step_bytes = packs * self._planner.plan.tokens_per_pack * (3 * stride**2 + 4 * self._channels * cells**2)
        filesystem = os.statvfs(_SHARED_MEMORY)
        free = filesystem.f_bavail * filesystem.f_frsize
        possible = free // (2 * step_bytes) - 1  # one more step is being trained; half is left to the other ranks of this machine
        if possible < 0:
            raise RuntimeError(
                f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, worker processes need {2 * step_bytes / 1e6:.0f} MB: "
                "enlarge it (docker run --shm-size), or set loader.workers=0"
            )
        if possible < self._prefetch:
            logger.warning("reading %d steps ahead instead of %d, because %s is small", possible, self._prefetch, _SHARED_MEMORY)
        return min(self._prefetch, possible)

    def _batch(self, pack: ReadPack, *, samples: tuple[PlannedSample, ...]) -> Batch:
        cells = [(self._channels, height // self._factor, width // self._factor) for height, width in pack.sizes]

        def split(flat: Tensor | None, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor] | None:
            if flat is None:
                return None
            parts = self._on_device(flat).split([math.prod(shape) for shape in shapes])
            return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

        weights = torch.tensor([sample.loss_weight for sample in samples] or [0.0])
        for failure in pack.failures:
            weights[failure.position] = 0
            self._note_failure(failure, samples[failure.position])
        self.samples_seen += len(samples)
        return Batch(
            ids=[sample.id for sample in samples] or [""],
            images=[image.permute(2, 0, 1) for image in split(pack.pixels, [(*size, 3) for size in pack.sizes]) or []],
            captions=pack.captions,
            labels=torch.tensor([sample.label for sample in samples] or [-1]),
            kinds=torch.tensor([sample.kind for sample in samples] or [DIFFUSION]),
            uniforms=torch.from_numpy(pack.uniforms),
            noise=split(pack.noise, cells) or [],
            weights=weights,
            tokens=sum(sample.tokens for sample in samples),
            codec_noise=split(pack.codec_noise, cells),
            latents=split(pack.latents, cells),
            texts=None if pack.texts is None else list(pack.texts.split(pack.text_lengths)),
            teacher=None if pack.teacher is None else self._on_device(pack.teacher),
            masks=split(pack.masks, [(1, height, width) for _, height, width in cells]),
        )

    def _on_device(self, flat: Tensor) -> Tensor:
        """Copy all images of a pack at once. To a GPU, copy asynchronously from pinned memory."""
        if self._device is None or self._device.type == "cpu":
            return flat
        return (flat.pin_memory() if self._device.type == "cuda" else flat).to(self._device, non_blocking=True)

    def _note_failure(self, failure: Failure, sample: PlannedSample) -> None:
        """Log and count an unreadable sample, or stop because of its shard. A bad shard is logged once."""
        tar = sample.features_tar or sample.tar
        if not failure.bad_shard:
            self.samples_failed += 1
            logger.warning("skipped sample %s of %s: %s", sample.id, tar, failure.reason)
            return
        if self._on_bad_shard == "error":
            self.close()
            raise RuntimeError(f"sample {sample.id} cannot be read: {failure.reason}")
        self.samples_skipped += 1
        if tar not in self._bad_shards:
            self._bad_shards.add(tar)
            logger.warning("skipping all samples of %s: %s", tar, failure.reason)

    def _stop_if_too_many_failed(self) -> None:
        """Raise RuntimeError if too many samples failed. Applies once enough were seen to allow at least one failure."""
        failed, allowed = self.samples_failed + self.samples_skipped, self._max_bad_fraction * self.samples_seen
        if failed > allowed and (allowed >= 1 or self._max_bad_fraction == 0):
            self.close()
            raise RuntimeError(
                f"{failed} of {self.samples_seen} samples could not be used, more than max_bad_fraction {self._max_bad_fraction:g} "
                "allows: see the warnings above; `tim verify` on the corpus lists all of them"
            )


def _check_arguments(rank: int, world_size: int, *, workers: int, prefetch: int, max_bad_fraction: float, timeout: float) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} ranks")
    if workers < 0 or prefetch < 1:
        raise ValueError(f"loader.workers {workers} must be at least 0, loader.prefetch {prefetch} at least 1")
    if not 0 <= max_bad_fraction <= 1 or timeout <= 0:
        raise ValueError(f"max_bad_fraction {max_bad_fraction} must be between 0 and 1, timeout {timeout} seconds above 0")


def _pack_reader(
    planner: Planner | ValidationPlan, shards: ShardReader, *, geometry: dict[str, int], stochastic_codec: bool, teacher: bool
) -> PackReader:
    """A reader of images and captions, or of features in place of those that the corpora have features of."""
    features = planner.corpora[0].features
    parts = () if features is None else features.parts
    decoder = None
    if features is not None:
        width = features.teacher["width"] if teacher and features.teacher else None
        decoder = FeatureDecoder(**geometry, latents="latents" in parts, empty=features.empty, teacher=width)
    return PackReader(
        **geometry,
        shards=shards,
        pixels="latents" not in parts or (teacher and "teacher" not in parts),
        captions="captions" not in parts,
        features=decoder,
        stochastic_codec=stochastic_codec and "latents" not in parts,
        shuffle_tags=planner.shuffle_tags,
    )


def _facts(corpora: Sequence[Corpus]) -> dict[str, ShardFacts]:
    """Sizes and digests of all shards, from the manifests."""
    facts: dict[str, ShardFacts] = {}
    for corpus in corpora:
        facts |= {shard.path: ShardFacts(shard.bytes, shard.sha256) for shard in corpus.shards}
        facts |= {shard.texts: ShardFacts(shard.texts_bytes, shard.texts_sha256) for shard in corpus.shards if shard.texts}
        if corpus.features is not None:
            facts |= {shard.tar: ShardFacts(shard.bytes, shard.sha256) for shard in corpus.features.shards}
    return facts
