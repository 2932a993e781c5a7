"""The high-level way to sample: prompts and sizes in, PIL images out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from PIL import Image

from tim import codecs, transports
from tim.model_folder.folder import ModelSpec, load_model
from tim.network import TransitionTransformer, check_classes
from tim.packed import Condition, PackedText
from tim.sampler import sample, time_grid
from tim.text import encoders

T = TypeVar("T")
Prompt: TypeAlias = str | int  # a text, or for a model of classes the number of one


class Generator:
    """A network with its codec and text encoder.

    Every argument of a call may be a list: images of mixed sizes, prompts, steps and seeds share packs of up to `tokens_per_pack` tokens.
    An image depends on its own arguments alone, never on its neighbours in the pack.
    """

    def __init__(
        self, network: TransitionTransformer, spec: ModelSpec, *, device: torch.device | str = "cpu", tokens_per_pack: int = 16384
    ) -> None:
        self.network = network
        self.spec = spec
        self.device = torch.device(device)
        self.tokens_per_pack = tokens_per_pack
        self.transport = transports.make(**spec.transport)
        self.codec = codecs.make(spec.codec["kind"], spec.codec.get("path"), device=self.device)
        self.text = None
        if spec.text is not None:
            self.text = encoders.make(
                spec.text["kind"],
                spec.text.get("path"),
                tokenizer_path=spec.text.get("tokenizer"),
                width=network.params["cap_feat_dim"],
                max_tokens=spec.text["max_tokens"],
                device=self.device,
                precision=spec.text.get("precision", "fp32"),
            )

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> Generator:
        """Load a model folder. Raises ValueError where it is not one."""
        network, spec = load_model(folder, device=device)
        return cls(network, spec, device=device)

    @property
    def stride(self) -> int:
        """Pixels per side of a token: sizes are multiples of it."""
        return self.codec.factor * self.network.patch_size

    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        height: int | Sequence[int],
        width: int | Sequence[int],
        steps: int | Sequence[int] | None = None,
        guidance: float | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        negative: Prompt | Sequence[Prompt] | None = None,
        times: Sequence[float] | None = None,
        interval: tuple[float, float] | None = None,
        stochasticity: float = 0.0,
    ) -> list[Image.Image]:
        """Draw images; steps, guidance and its interval default to the model's own.

        prompt: what to draw, for a class model a class id; negative: what guidance leads away from, by default the empty caption or no
        class. Raises ValueError for lists of different lengths, sizes that are no multiples of `stride`, fewer than one step, a prompt
        that is not of the model's kind and a class that it does not know.
        """
        defaults = self.spec.sampling
        if times is not None and steps is not None:
            raise ValueError(f"{steps} steps and times {list(times)}: give one of them")
        steps = int(defaults["steps"]) if steps is None else steps
        guidance = float(defaults["guidance"]) if guidance is None else guidance
        negative = self._nothing if negative is None else negative
        arguments = {
            "prompt": prompt,
            "height": height,
            "width": width,
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "negative": negative,
        }
        lengths = {len(value) for value in arguments.values() if isinstance(value, Sequence) and not isinstance(value, str)}
        if len(lengths) > 1:
            raise ValueError(f"the lists given have different lengths: {sorted(lengths)}")
        count = lengths.pop() if lengths else 1
        prompts: list[Prompt] = _spread(prompt, count)
        negatives: list[Prompt] = [] if negative is None else _spread(negative, count)
        self.check(prompts + negatives)
        heights, widths = _spread(height, count), _spread(width, count)
        step_counts, scales, seeds = _spread(steps, count), _spread(guidance, count), _spread(seed, count)
        for h, w in zip(heights, widths, strict=True):
            if h < self.stride or w < self.stride or h % self.stride or w % self.stride:
                raise ValueError(f"size {w}x{h}: width and height must be multiples of {self.stride} pixels")

        images: list[Image.Image] = []
        for pack in self._packs(heights, widths):
            noise = [self._noise(heights[i], widths[i], seeds[i]) for i in pack]
            grids = [
                time_grid(step_counts[i], transport=self.transport, pixels=heights[i] * widths[i], shift=defaults["shift"])
                if times is None
                else [float(t) for t in times]
                for i in pack
            ]
            samples = sample(
                self.network,
                noise,
                self._condition([prompts[i] for i in pack]),
                transport=self.transport,
                times=grids,
                guidance=[scales[i] for i in pack],
                null_condition=self._condition([negatives[i] for i in pack]) if negatives else None,
                interval=tuple(defaults["interval"]) if interval is None else interval,
                stochasticity=stochasticity,
                seeds=[seeds[i] for i in pack],
                instantaneous=bool(defaults.get("instantaneous", False)),
            )
            for pixels, evaluations in zip(self.codec.decode(samples.latents), samples.evaluations, strict=True):
                images.append(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()))
                images[-1].info["evaluations"] = evaluations
        return images

    @property
    def _nothing(self) -> Prompt | None:
        """The prompt that asks for nothing in particular: the empty caption, the null class, or None where there is no such class."""
        return "" if self.network.classes is None else self.network.null_class

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError for a prompt that is not of the model's kind, and for a class that it does not know."""
        captions = [prompt for prompt in prompts if isinstance(prompt, str)]
        classes = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if self.network.classes is None and classes:
            raise ValueError(f"prompt {classes[0]}: this model draws what a text says, not classes by number")
        if self.network.classes is not None:
            if captions:
                raise ValueError(f"prompt {captions[0]!r}: this model draws classes by number, from 0 to {self.network.classes - 1}")
            check_classes(classes, classes=self.network.classes, null=self.network.null_class)

    def _condition(self, prompts: Sequence[Prompt]) -> Condition:
        if self.text is None:
            return torch.tensor(prompts, device=self.device)
        return PackedText.from_features(self.text.encode([str(prompt) for prompt in prompts]))

    def _noise(self, height: int, width: int, seed: int) -> torch.Tensor:
        """(C, h, w) drawn on the CPU from the image's own seed, so that every device and pack sees the same."""
        shape = (self.codec.channels, height // self.codec.factor, width // self.codec.factor)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def _packs(self, heights: Sequence[int], widths: Sequence[int]) -> list[list[int]]:
        """Consecutive images up to the token limit; both guidance halves of an image count."""
        packs: list[list[int]] = []
        room = 0
        for i, (h, w) in enumerate(zip(heights, widths, strict=True)):
            tokens = 2 * (h // self.stride) * (w // self.stride)
            if not packs or tokens > room:
                packs.append([])
                room = self.tokens_per_pack
            packs[-1].append(i)
            room -= tokens
        return packs


def _spread(value: T | Sequence[T], count: int) -> list[T]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count  # pyright: ignore[reportReturnType]
