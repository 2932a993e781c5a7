"""Previews while training: drawn by all ranks together, each its share, from the averaged weights.

The images depend on the weights only: not on the number of ranks, the ZeRO stage, or earlier previews. Training is not affected: its
weights come back bit by bit, and so does the state of torch's random generators.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from launch.checkpoints.export import spec_of
from launch.config.schema import Config
from launch.distributed.heartbeat import HEARTBEAT
from launch.distributed.ranks import Ranks
from launch.engine.ema import ShardedEMA
from launch.engine.engine import Engine
from launch.previews.averaged_weights import NoMemory, averaged_weights
from launch.previews.cells import Cell, cells_of, drawing_order, preview_grid
from launch.previews.decoder import Decoder
from launch.previews.files import begin_preview, has_begun, has_preview, preview_path, preview_settings, unfinished_path, write_preview
from launch.previews.latent_colours import LatentColours
from pipeline.errors import kind_and_line
from tim import Generator
from tim.codecs import Codec
from tim.network import TransitionTransformer

Encode = Callable[[Sequence[str]], list[Tensor]]


class _Turns(NamedTuple):
    """This rank's images by the index of their cell, and how many cells all ranks have drawn. stopped: by a signal; problem: of a rank."""

    drawn: dict[int, Image.Image]
    done: int
    stopped: bool = False
    problem: str = ""


@dataclass(slots=True)
class Previews:
    """Draws the previews of a run. `draw_if_due` must be called by all ranks.

    codec, encode: those of the training; None: they are loaded for a preview, and dropped again, or for the prompts once.
    show: receives each grid and its step on rank 0, also one that an earlier process has drawn.
    """

    config: Config
    engine: Engine
    ema: ShardedEMA
    ranks: Ranks
    codec: Codec | None
    encode: Encode | None
    log: Callable[[str], None] = lambda line: None
    show: Callable[[Image.Image, int], None] = lambda image, step: None
    _cells: list[Cell] = field(default_factory=list)
    _features: dict[str, Tensor] = field(default_factory=dict)  # of the prompts and the empty caption
    _pace: float = 0.0  # seconds per unit of cost of the most expensive image so far: of a small one, little of the time is its cost
    _most: int = 0  # its cost

    def __post_init__(self) -> None:
        self._cells = cells_of(self.config.preview)

    def prepare(self) -> None:
        """Encode the prompts, on rank 0 for all ranks. Must be called once, by all ranks. Raises ValueError if there is no text encoder."""
        texts = sorted({cell.prompt for cell in self._cells if isinstance(cell.prompt, str)})
        if texts:
            with self._same_random_state():
                features = self.ranks.run_on_rank0(lambda: [each.cpu() for each in self._encoder()([*texts, ""])])
            self._features = dict(zip([*texts, ""], features, strict=True))

    def draw_if_due(self, step: int, *, stopping: Callable[[], bool]) -> bool:
        """Draw the preview of this step if there is to be one and it does not exist. Returns whether training time has passed.

        stopping: whether a signal asks this rank to stop, which ends the preview without a result. A failure is a warning.
        """
        is_due = step and (step % self.config.preview.every == 0 or step == self.config.train.steps)
        if not self._cells or not is_due:
            return False
        HEARTBEAT.section("preview")
        drawn, begun = self.ranks.broadcast(self._left_by_earlier_process(step))
        if drawn:
            if self.ranks.is_main:
                self._show_file(self._path(step), step=step)
        elif begun:
            self.log(f"warning: no preview of step {step}: the run ended while it was drawn; to try again, remove {self._unfinished(step)}")
        else:
            with self._same_random_state(), self._begun(step):
                self._draw_and_publish(step, stopping=stopping)
        return True

    def _draw_and_publish(self, step: int, *, stopping: Callable[[], bool]) -> None:
        started = time.monotonic()
        try:
            drawn, left_out = self._draw(step, started, stopping=stopping)
        except _Failed as failure:
            self.log(f"warning: no preview of step {step}: {failure}; the run goes on")
            return
        finally:
            if self.ranks.device.type == "cuda":
                torch.cuda.empty_cache()  # the copy of the weights
        if self.ranks.is_main and left_out is not None:
            self._publish(drawn, step=step, seconds=time.monotonic() - started, left_out=left_out)

    # Drawing

    def _draw(self, step: int, started: float, *, stopping: Callable[[], bool]) -> tuple[dict[int, Image.Image], int | None]:
        """Images by the index of their cell, on rank 0, and the number of those left out for lack of time; None: stopped by a signal.

        Raises _Failed on all ranks.
        """
        spec, precision, device = spec_of(self.config, step=step), self.config.train.precision, self.ranks.device
        decoder = Decoder(self._load_codec(spec.codec))
        encode = None if spec.text is None else self._encoded
        try:
            with averaged_weights(self.engine, self.ema.average, ranks=self.ranks) as network:
                assert isinstance(network, TransitionTransformer)
                # One forward per step on all ranks: under ZeRO 3 they evaluate together.
                options: dict[str, Any] = {"device": device, "dtype": precision, "tokens_per_pack": sys.maxsize}
                generator = Generator(network, spec, codec=decoder, encode=encode, **options)
                turns = self._take_turns(generator, decoder, started, stopping=stopping)
        except NoMemory as error:
            raise _Failed(str(error)) from error
        if turns.problem:  # not before all ranks have their weights back
            raise _Failed(turns.problem)
        gathered = self.ranks.gather_on_rank0(turns.drawn)
        images = {index: image for of_rank in gathered for index, image in of_rank.items()}
        return images, None if turns.stopped else len(self._cells) - turns.done

    def _take_turns(self, generator: Generator, decoder: Decoder, started: float, *, stopping: Callable[[], bool]) -> _Turns:
        """Draw one image per rank and turn while there is time. An error of the network is raised under ZeRO 3, on one rank only."""
        ranks, order = self.ranks, drawing_order(self._cells)
        budget = 60 * self.config.preview.minutes
        drawn: dict[int, Image.Image] = {}
        for first in range(0, len(order), ranks.size):
            turn = order[first : first + ranks.size]
            cost = max(self._cells[index].cost for index in turn)
            is_late = first > 0 and time.monotonic() - started + self._pace * cost > budget
            late, stopped = ranks.sum(torch.tensor([is_late, stopping()], dtype=torch.float32)).tolist()
            if late or stopped:
                return _Turns(drawn, first, stopped=stopped > 0)
            before = time.monotonic()
            mine = turn[ranks.rank] if ranks.rank < len(turn) else None
            try:
                image = self._draw_cell(generator, mine, steps=max(self._cells[index].steps for index in turn))
                if mine is not None and image is not None:
                    drawn[mine] = image
            except Exception as error:
                if self.engine.stage == 3:  # the other ranks wait for this one's layers
                    raise
                decoder.problem = kind_and_line(error)
            if problem := self._first_problem(decoder.problem):
                return _Turns(drawn, first, problem=problem)
            if cost >= self._most:
                self._most, self._pace = cost, (time.monotonic() - before) / cost
        return _Turns(drawn, len(order))

    def _draw_cell(self, generator: Generator, index: int | None, *, steps: int) -> Image.Image | None:
        """Draw a cell; None: nothing. Under ZeRO 3 every rank evaluates the network `steps` times, on one token if it has less to do."""
        section = self.config.preview
        image, evaluated = None, 0
        if index is not None:
            cell = self._cells[index]
            settings = {"steps": cell.steps, "guidance": section.guidance, "seed": section.seed}
            image = generator(cell.prompt, height=cell.height, width=cell.width, **settings)[0]
            evaluated = cell.steps
        if self.engine.stage == 3 and evaluated < steps:
            side = generator.stride
            generator(self._cells[0].prompt, height=side, width=side, steps=steps - evaluated, guidance=1.0)
        return image

    def _load_codec(self, description: Mapping[str, Any]) -> Codec:
        """The codec, loaded if the training does not have it; colours of latents if it cannot be. Raises _Failed on all ranks."""
        codec, problem = self.codec, ""
        if codec is None:
            from tim import codecs

            try:
                codec = codecs.make(
                    description["kind"],
                    description.get("path"),
                    channels=description.get("channels"),
                    device=self.ranks.device,
                    memory_gb=self.config.codec.memory_gb,
                )
            except Exception as error:
                problem = kind_and_line(error)
        first = self._first_problem(problem)
        if not first:
            assert codec is not None
            return codec
        colours = LatentColours.of(self.config)
        if self._first_problem("" if colours is not None else first):
            raise _Failed(first)
        assert colours is not None
        self.log(f"warning: {first}: the preview shows colours of latents, not decoded images")
        return colours

    def _encoder(self) -> Encode:
        if self.encode is not None:
            return self.encode
        from tim.text import encoders

        section = self.config.text
        return encoders.make(
            section.kind,
            section.path,
            tokenizer_path=section.tokenizer,
            width=self.config.network.params.cap_feat_dim,
            max_tokens=section.max_tokens,
            device=self.ranks.device,
            precision=section.precision,
        ).encode

    def _encoded(self, captions: Sequence[str]) -> list[Tensor]:
        return [self._features[caption].to(self.ranks.device) for caption in captions]

    def _same_random_state(self) -> AbstractContextManager[None]:
        """Restore torch's random state at the end: an encoder that is loaded, or dropout, draws from it."""
        return torch.random.fork_rng(devices=[self.ranks.device] if self.ranks.device.type == "cuda" else [])

    # Results

    def _publish(self, drawn: dict[int, Image.Image], *, step: int, seconds: float, left_out: int) -> None:
        """Write the grid and show it, on rank 0. A failure, such as a full disk, is a warning."""
        path = self._path(step)
        if left_out:
            why = f"preview.minutes={self.config.preview.minutes:g} is over: give fewer prompts, sizes or steps, or more minutes"
            self.log(f"warning: preview of step {step}: {left_out} of {len(self._cells)} images left out, {why}")
        try:
            image = preview_grid(self._cells, drawn)
            self.show(image, step)
            write_preview(path, image, settings=self._settings(step))
        except Exception as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else kind_and_line(error)
            self.log(f"warning: the preview of step {step} was not written: {path}: {why}; the run goes on")
        else:
            self.log(f"preview of step {step}: {len(drawn)} image{'s' * (len(drawn) != 1)} in {seconds:.1f} s: {path}")

    def _show_file(self, path: Path, *, step: int) -> None:
        try:
            with Image.open(path) as image:
                self.show(image.convert("RGB"), step)
        except Exception as error:
            self.log(f"warning: {path} cannot be read: {kind_and_line(error)}; remove it")

    # Files

    def _left_by_earlier_process(self, step: int) -> tuple[bool, bool]:
        """On rank 0: whether the preview of a step exists, and whether the run ended while it was drawn."""
        if not self.ranks.is_main:
            return False, False
        settings = self._settings(step)
        return has_preview(self._path(step), settings=settings), has_begun(self._unfinished(step), settings=settings)

    @contextmanager
    def _begun(self, step: int) -> Iterator[None]:
        """Leave a file on rank 0 that remains if an error, or a kill, ends the run meanwhile: it would end it again after a restart."""
        if not self.ranks.is_main:
            yield
            return
        path, failed = self._unfinished(step), False
        with suppress(OSError, ValueError):  # a full disk: the preview itself says so
            begin_preview(path, settings=self._settings(step))
        try:
            yield
        except Exception:
            failed = True
            raise
        finally:
            if not failed:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _settings(self, step: int) -> dict[str, Any]:
        return preview_settings(self.config.preview, step=step)

    def _unfinished(self, step: int) -> Path:
        assert self.config.run_dir is not None
        return unfinished_path(self.config.run_dir, step)

    def _path(self, step: int) -> Path:
        assert self.config.run_dir is not None
        return preview_path(self.config.run_dir, step)

    def _first_problem(self, problem: str) -> str:
        """The problem of the first rank that has one, on all ranks; "" if none has."""
        return next((found for found in self.ranks.gather(problem) if found), "")


class _Failed(Exception):
    """A preview failed on a rank. Raised on all ranks; the message is one line."""
