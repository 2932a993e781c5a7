"""The high-level sampling API: prompts and sizes in, PIL images out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image

from tim import codecs, transports
from tim.model_folder.folder import ModelSpec, load_model
from tim.model_kinds import Dtype
from tim.network import TransitionTransformer, check_classes
from tim.packed import Condition, PackedText
from tim.pretrained.lora_files import merge_adapters, read_adapters
from tim.sampler import default_dtype, sample, time_grid
from tim.text import encoders

Prompt: TypeAlias = str | int  # a text, or a class id for a class model


@dataclass(frozen=True, slots=True)
class _Request:
    """The arguments of one image."""

    prompt: Prompt
    height: int
    width: int
    steps: int
    guidance: float
    seed: int
    negative: Prompt | None


class Generator:
    """A network with its codec and text encoder.

    Most arguments of a call may be lists: images of mixed sizes, prompts, steps and seeds share packs of up to `tokens_per_pack` tokens.
    An image depends only on its own arguments, never on its neighbours in the pack. `dtype` is the precision of the network by autocast,
    `default_dtype` of the device if None; text encoder and codec have their own.
    """

    def __init__(
        self,
        network: TransitionTransformer,
        spec: ModelSpec,
        *,
        device: torch.device | str = "cpu",
        dtype: Dtype | None = None,
        tokens_per_pack: int = 16384,
        codec: codecs.Codec | None = None,
        encode: Callable[[Sequence[str]], list[torch.Tensor]] | None = None,
    ) -> None:
        """codec: that of `spec`, if it is loaded already. encode: features (M, F) of captions; with it no text encoder is loaded."""
        self.network = network
        self.spec = spec
        self.device = torch.device(device)
        self.dtype: Dtype = dtype or default_dtype(self.device)
        self.tokens_per_pack = tokens_per_pack
        self.transport = transports.make(**spec.transport)
        self.codec = codec or codecs.make(spec.codec["kind"], spec.codec.get("path"), device=self.device)
        self.text = None
        if spec.text is not None and encode is None:
            self.text = encoders.make(
                spec.text["kind"],
                spec.text.get("path"),
                tokenizer_path=spec.text.get("tokenizer"),
                width=network.params["cap_feat_dim"],
                max_tokens=spec.text["max_tokens"],
                device=self.device,
                precision=spec.text.get("precision", "fp32"),
            )
        self._encode = encode if self.text is None else self.text.encode

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: Dtype | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
    ) -> Generator:
        """Load a model folder. loras: LoRA files and their scales, merged into the weights. Raises ValueError if one does not fit."""
        network, spec = load_model(folder, device=device)
        for path, scale in loras:
            merge_adapters(network, read_adapters(path), scale=scale, source=path)
        return cls(network, spec, device=device, dtype=dtype)

    @property
    def stride(self) -> int:
        """Pixels per token side. Sizes must be multiples of it."""
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
        """Sample images. `steps`, `guidance` and `interval` default to the model's own.

        Args:
            prompt: a text, or a class id for a class model.
            negative: the prompt that guidance moves away from; by default the empty caption or the null class.
            times: a time grid for all images instead of `steps`.
            interval, stochasticity: as in `tim.sampler.sample`.

        Raises ValueError for lists of different lengths, sizes that are not multiples of `stride`, fewer than one step, a prompt of the
        wrong type and an unknown class.
        """
        defaults = self.spec.sampling
        if times is not None and steps is not None:
            raise ValueError(f"{steps} steps and times {list(times)}: give one of them")
        requests = _requests(
            prompt=prompt,
            height=height,
            width=width,
            steps=int(defaults["steps"]) if steps is None else steps,
            guidance=float(defaults["guidance"]) if guidance is None else guidance,
            seed=seed,
            negative=self._null_prompt if negative is None else negative,
        )
        self.check([request.prompt for request in requests] + [request.negative for request in requests if request.negative is not None])
        for request in requests:
            self._check_size(request.width, request.height)

        images: list[Image.Image] = []
        for pack in self._packs(requests):
            samples = sample(
                self.network,
                [self._noise(request.height, request.width, request.seed) for request in pack],
                self._condition([request.prompt for request in pack]),
                transport=self.transport,
                times=[self._time_grid(request) if times is None else [float(t) for t in times] for request in pack],
                guidance=[request.guidance for request in pack],
                null_condition=self._null_condition(pack),
                interval=tuple(defaults["interval"]) if interval is None else interval,
                stochasticity=stochasticity,
                seeds=[request.seed for request in pack],
                instantaneous=bool(defaults.get("instantaneous", False)),
                dtype=self.dtype,
            )
            for pixels, evaluations in zip(self.codec.decode(samples.latents), samples.evaluations, strict=True):
                images.append(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()))
                images[-1].info["evaluations"] = evaluations
        return images

    @property
    def _null_prompt(self) -> Prompt | None:
        """The unconditional prompt: the empty caption, the null class, or None if the model has no null class."""
        return "" if self.network.classes is None else self.network.null_class

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError for a prompt of the wrong type (text or class id) and for an unknown class."""
        captions = [prompt for prompt in prompts if isinstance(prompt, str)]
        classes = [prompt for prompt in prompts if not isinstance(prompt, str)]
        if self.network.classes is None and classes:
            raise ValueError(f"prompt {classes[0]}: this model takes text, not class ids")
        if self.network.classes is not None:
            if captions:
                raise ValueError(f"prompt {captions[0]!r}: this model takes class ids from 0 to {self.network.classes - 1}")
            check_classes(classes, classes=self.network.classes, null=self.network.null_class)

    def _check_size(self, width: int, height: int) -> None:
        if width < self.stride or height < self.stride or width % self.stride or height % self.stride:
            raise ValueError(f"size {width}x{height}: width and height must be multiples of {self.stride} pixels")

    def _condition(self, prompts: Sequence[Prompt]) -> Condition:
        if self._encode is None:
            return torch.tensor(prompts, device=self.device)
        return PackedText.from_features(self._encode([str(prompt) for prompt in prompts]))

    def _null_condition(self, pack: Sequence[_Request]) -> Condition | None:
        negatives = [request.negative for request in pack if request.negative is not None]
        return self._condition(negatives) if negatives else None

    def _noise(self, height: int, width: int, seed: int) -> torch.Tensor:
        """(C, h, w), drawn on the CPU from the image's own seed: the same on every device and in every pack."""
        shape = (self.codec.channels, height // self.codec.factor, width // self.codec.factor)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)

    def _time_grid(self, request: _Request) -> list[float]:
        pixels = request.height * request.width
        return time_grid(request.steps, transport=self.transport, pixels=pixels, shift=self.spec.sampling["shift"])

    def _packs(self, requests: Sequence[_Request]) -> list[list[_Request]]:
        """Group consecutive images up to the token limit. An image counts twice, for the two halves of guidance."""
        packs: list[list[_Request]] = []
        room = 0
        for request in requests:
            tokens = 2 * (request.height // self.stride) * (request.width // self.stride)
            if not packs or tokens > room:
                packs.append([])
                room = self.tokens_per_pack
            packs[-1].append(request)
            room -= tokens
        return packs


def _requests(**arguments: Any) -> list[_Request]:
    """One request per image: lists give a value to each image, other arguments hold for all. Raises ValueError for unequal lengths."""
    lists = {name: value for name, value in arguments.items() if isinstance(value, Sequence) and not isinstance(value, str)}
    lengths = {len(values) for values in lists.values()}
    if len(lengths) > 1:
        raise ValueError(f"the lists have different lengths: {sorted(lengths)}")
    count = lengths.pop() if lengths else 1
    return [_Request(**{**arguments, **{name: values[i] for name, values in lists.items()}}) for i in range(count)]
