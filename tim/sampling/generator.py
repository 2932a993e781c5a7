"""The high-level sampling API: prompts and sizes in, PIL images out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from tim import codecs, transports
from tim.disk_cache import DiskCache
from tim.model_folder.folder import ModelSpec, load_model
from tim.model_kinds import Dtype
from tim.network import TransitionTransformer, check_classes
from tim.packed import Condition, PackedText
from tim.pretrained.lora_files import merge_adapters, read_adapters
from tim.sampling.edits import Edit, Frame, composite, pixels_of, start_of
from tim.sampling.live_view import LiveView, live_view_for
from tim.sampling.noise import initial_noise, stochastic_seed, with_own_generators
from tim.sampling.packs import MOST_TOKENS, default_tokens, sampling_packs, tokens_within
from tim.sampling.requests import ImageRequest, Prompt, PromptMix, Variation, check_prompt, completed, requests_of
from tim.sampling.sampler import Second, Start, sample
from tim.sampling.sources import choose_device, choose_dtype, model_folder
from tim.sampling.times import check_times, time_grid
from tim.text.prompt_encoder import PromptEncoder

Encode = Callable[[Sequence[str]], list[Tensor]]
ROUND = 256  # images whose prompts are encoded together, before the first of them is drawn


@dataclass(frozen=True, slots=True)
class Drawn:
    """A drawn image.

    index: of its request; request: with the model's defaults filled in; evaluations: network forwards, with those for guidance;
    neighbours: number of other images in its pack.
    """

    index: int
    request: ImageRequest
    image: Image.Image
    evaluations: int
    neighbours: int


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a pack, for a callback.

    images: indices of the requests in the pack; step: steps taken, from 1 to `steps`, those of the longest image;
    latents: computes the clean image that each image is heading for, (C, h, w) per image; callable until the callback returns, like
    `previews`. live_view: the generator's.
    """

    images: tuple[int, ...]
    step: int
    steps: int
    latents: Callable[[], list[Tensor]]
    live_view: Callable[[], LiveView]

    def previews(self) -> list[Image.Image]:
        """The images so far, one pixel per cell of the latent, without decoding them."""
        view = self.live_view()
        return [image_of(view.rgb(latent)) for latent in self.latents()]


class Conditions(NamedTuple):
    """What the network is given for images: their prompts, what guidance leads away from, and prompts to mix in."""

    condition: Condition
    null: Condition | None
    second: Second | None


class Generator:
    """A network with its codec and text encoder.

    Images of mixed sizes, prompts, steps, guidance and seeds share packs of up to `tokens_per_pack` tokens, which is also the limit of one
    forward. An image depends only on its own arguments, never on its neighbours in the pack. `dtype` is the precision of the network by
    autocast, `default_dtype` of the device if None; text encoder and codec have their own.
    """

    def __init__(
        self,
        network: TransitionTransformer,
        spec: ModelSpec,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype | None = None,
        tokens_per_pack: int | None = None,
        memory_gb: float | None = None,
        codec: codecs.Codec | None = None,
        encode: Encode | None = None,
        cache: DiskCache | None = None,
    ) -> None:
        """device: None for the GPU if there is one. memory_gb: limit of the activations of the network, in place of
        `tokens_per_pack`, and of the codec.

        codec: that of `spec`, if it is loaded already. encode: features (M, F) of captions; with it no text encoder is loaded. cache: of
        prompt features and of the live view; None for the default one. Raises ValueError if codec or text encoder cannot be loaded.
        """
        self.device = choose_device(device)
        self.network = network.to(self.device).eval()
        self.spec = spec
        self._given_dtype: Dtype | None = dtype
        self.dtype: Dtype = choose_dtype(dtype, device=self.device)
        most = None if memory_gb is None else tokens_within(memory_gb, params=network.params, dtype=self.dtype)
        self.tokens_per_pack = tokens_per_pack or min(default_tokens(self.device), most or MOST_TOKENS)
        self.transport = transports.make(**spec.transport)
        self.codec = codec or codecs.make(
            spec.codec["kind"],
            spec.codec.get("path"),
            channels=spec.codec.get("channels"),
            device=self.device,
            memory_gb=memory_gb,
        )
        if (found := self.codec.channels) != (needed := network.params["in_channels"]):
            raise ValueError(f"codec {spec.codec['kind']}: has {found} channels, the network {needed}: give the codec it was trained with")
        self.cache = DiskCache.default() if cache is None else cache
        self.text = None
        if spec.text is not None and encode is None:
            self.text = PromptEncoder(spec.text, width=network.params["cap_feat_dim"], device=self.device, cache=self.cache)
        self._encode = encode if self.text is None else self.text.encode

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: Dtype | None = None,
        memory_gb: float | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
    ) -> Generator:
        """Load a model folder, the `model/` of a finished run folder, or a hub repository OWNER/NAME.

        loras: LoRA files and their scales, merged into the weights. Raises ValueError if there is no model, or if a LoRA does not fit.
        """
        cache = DiskCache.default()
        network, spec = load_model(model_folder(model), cache=cache)
        for path, scale in loras:
            merge_adapters(network, read_adapters(path), scale=scale, source=path)
        return cls(network, spec, device=device, dtype=dtype, memory_gb=memory_gb, cache=cache)

    def to(self, device: torch.device | str, *, dtype: Dtype | None = None) -> Generator:
        """Move network, codec and text encoder to a device. dtype: None for the one given before, or else the default of the device."""
        before, self.device = self.device, choose_device(device)
        self._given_dtype = dtype or self._given_dtype
        self.dtype = choose_dtype(self._given_dtype, device=self.device)
        if self.tokens_per_pack == default_tokens(before):
            self.tokens_per_pack = default_tokens(self.device)
        self.network.to(self.device)
        self.codec.to(self.device)
        if self.text is not None:
            self.text.to(self.device)
        return self

    @property
    def stride(self) -> int:
        """Pixels per token side. Images of other sizes are drawn at the next multiples of it, and cropped."""
        return self.codec.factor * self.network.patch_size

    def __call__(
        self,
        prompt: Prompt | PromptMix | Sequence[Prompt | PromptMix],
        *,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        steps: int | Sequence[int] | None = None,
        guidance: float | Sequence[float] | None = None,
        seed: int | torch.Generator | Sequence[int | torch.Generator] = 0,
        negative: Prompt | Sequence[Prompt] | None = None,
        times: Sequence[float] | None = None,
        interval: tuple[float, float] | None = None,
        stochasticity: float | Sequence[float] = 0.0,
        variation: Variation | Sequence[Variation | None] | None = None,
        edit: Edit | Sequence[Edit | None] | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> list[Image.Image]:
        """Sample images; the fields of `ImageRequest`, each one value for all images, or a list or one-dimensional NumPy array with one
        per image, except for times and interval. Returns them in order, with the number of network forwards in `info["evaluations"]`.

        Raises ValueError, in a sentence, for lists of different lengths, an argument out of its range, a prompt of the wrong type and an
        unknown class.
        """
        requests = requests_of(
            prompt=prompt,
            height=height,
            width=width,
            steps=steps,
            guidance=guidance,
            seed=seed,
            negative=negative,
            times=times,
            interval=interval,
            stochasticity=stochasticity,
            variation=variation,
            edit=edit,
        )
        images: list[Image.Image | None] = [None] * len(requests)
        for drawn in self.draw(requests, callback=callback):
            drawn.image.info["evaluations"] = drawn.evaluations
            images[drawn.index] = drawn.image
        return [image for image in images if image is not None]

    def draw(self, requests: Sequence[ImageRequest], *, callback: Callable[[Step], None] | None = None) -> Iterator[Drawn]:
        """Sample images, and yield each when it is finished, in an order that suits the packs. Memory does not grow with their number.

        callback: called in every step of every pack. All requests are checked before the first image is drawn. Raises ValueError.
        """
        complete = [self.check(request) for request in requests]
        return self._draw(with_own_generators(complete, [self._shape(request) for request in complete]), callback)

    def check(self, request: ImageRequest) -> ImageRequest:
        """The request with the model's defaults filled in. Raises ValueError if it cannot be drawn."""
        complete = completed(request, defaults=self.spec.sampling, null_prompt=self._null_prompt)
        self.check_prompts(complete.prompts)
        if complete.times is not None:
            check_times(complete.times, transport=self.transport)
        else:
            self.times_of(complete)
        is_pixel, channels = self.spec.codec["kind"] == "pixel", self.codec.channels
        if is_pixel and channels > 4:
            raise ValueError(f"this model draws {channels} channels, more than image files have: sample its latents with tim.sample")
        if complete.edit is not None and is_pixel and channels != 3:
            raise ValueError(f"an image to edit: this model draws {channels} channels; only models of RGB images can start from one")
        if complete.stochasticity and self.spec.transport["kind"] != "ot_fm":
            raise ValueError(f"stochasticity {complete.stochasticity}: only transport ot_fm has stochastic steps; set 0")
        if complete.guidance != 1.0 and complete.negative is None:
            raise ValueError(
                f"guidance {complete.guidance:g}: this model was trained without a null class; set 1, or give a negative class"
            )
        return complete

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError for a prompt of the wrong type (text or class id) and for an unknown class."""
        for prompt in prompts:
            check_prompt(prompt, classes=self.network.classes)
        if self.network.classes is not None:
            classes = [int(prompt) for prompt in prompts]
            check_classes(classes, classes=self.network.classes, null=self.network.null_class)

    @cached_property
    def live_view(self) -> LiveView:
        """Colours of latents without decoding them, fitted to the codec once."""
        return live_view_for(self.codec, self.spec.codec, cache=self.cache)

    def conditions(self, requests: Sequence[ImageRequest]) -> Conditions:
        """The conditions of completed requests, encoded."""
        return self._conditions(requests, self._features(requests))

    def frame(self, request: ImageRequest) -> Frame:
        """Where the image of a completed request lies in the one that is drawn."""
        width, height = request.size
        return Frame.around(width, height, stride=self.stride)

    def _draw(self, requests: Sequence[ImageRequest], callback: Callable[[Step], None] | None) -> Iterator[Drawn]:
        costs = [(request.grid_steps, self._tokens(request)) for request in requests]
        packs = sampling_packs(costs, limit=self.tokens_per_pack)
        for group in _rounds(packs):
            features = self._features([requests[i] for pack in group for i in pack])
            for pack in group:
                yield from self._draw_pack(pack, [requests[i] for i in pack], features, callback)

    def _draw_pack(
        self, indices: list[int], pack: list[ImageRequest], features: dict[Prompt, Tensor], callback: Callable[[Step], None] | None
    ) -> Iterator[Drawn]:
        """Sample the images of one pack. features: those of all its prompts, for a model of captions."""
        frames = [self.frame(request) for request in pack]
        grids = [self.times_of(request) for request in pack]

        def report(step: int, latents: Callable[[], list[Tensor]]) -> None:
            assert callback is not None
            callback(Step(tuple(indices), step + 1, max(map(len, grids)) - 1, latents, lambda: self.live_view))

        conditions = self._conditions(pack, features)
        samples = sample(
            self.network,
            [initial_noise(request, self._shape(request)).to(self.device) for request in pack],
            conditions.condition,
            transport=self.transport,
            times=grids,
            guidance=[1.0 if request.guidance is None else request.guidance for request in pack],
            null_condition=conditions.null,
            second=conditions.second,
            interval=[request.interval or (0.0, 1.0) for request in pack],
            starts=self._starts(pack, frames),
            stochasticity=[request.stochasticity for request in pack],
            seeds=[stochastic_seed(request, self._shape(request)) for request in pack],
            instantaneous=bool(self.spec.sampling.get("instantaneous", False)),
            dtype=self.dtype,
            max_tokens=self.tokens_per_pack,
            callback=None if callback is None else report,
        )
        for k, pixels in enumerate(self.codec.decode(samples.latents)):
            image = frames[k].crop(pixels)
            if (edit := pack[k].edit) is not None:
                image = composite(edit, image)
            yield Drawn(indices[k], pack[k], image_of(image), samples.evaluations[k], len(pack) - 1)

    @property
    def _null_prompt(self) -> Prompt | None:
        """The unconditional prompt: the empty caption, the null class, or None if the model has no null class."""
        return "" if self.network.classes is None else self.network.null_class

    def _features(self, requests: Sequence[ImageRequest]) -> dict[Prompt, Tensor]:
        """Features (M, F) of all prompts, each encoded once; none for a model of classes."""
        if self._encode is None:
            return {}
        prompts = sorted({str(prompt) for request in requests for prompt in request.prompts})
        features = self._encode(prompts)
        if self.text is not None and self.device.type != "cpu":
            self.text.offload()
        return dict(zip(prompts, features, strict=True))

    def _conditions(self, requests: Sequence[ImageRequest], features: dict[Prompt, Tensor]) -> Conditions:
        mixes = [each.prompt if isinstance(each.prompt, PromptMix) else PromptMix(each.prompt, each.prompt, 0.0) for each in requests]
        first, second = [mix.first for mix in mixes], [mix.second for mix in mixes]
        negatives = [request.negative for request in requests]
        is_guided = any(negative is not None for negative in negatives)
        given = [prompt if negative is None else negative for prompt, negative in zip(first, negatives, strict=True)]
        return Conditions(
            self._condition(first, features),
            self._condition(given, features) if is_guided else None,
            Second(self._condition(second, features), [mix.share for mix in mixes]) if any(mix.share for mix in mixes) else None,
        )

    def _condition(self, prompts: Sequence[Prompt], features: dict[Prompt, Tensor]) -> Condition:
        if self._encode is None:
            return torch.tensor(prompts, device=self.device)
        return PackedText.from_features([features[prompt] for prompt in prompts])

    def _starts(self, pack: Sequence[ImageRequest], frames: Sequence[Frame]) -> list[Start | None] | None:
        """The images to start from, encoded; None if there are none."""
        edits = [(request.edit, frame) for request, frame in zip(pack, frames, strict=True)]
        given = [(edit, frame) for edit, frame in edits if edit is not None]
        if not given:
            return None
        latents = iter(self.codec.encode([pixels_of(edit, frame) for edit, frame in given]).means)
        return [None if edit is None else start_of(edit, frame, next(latents)) for edit, frame in edits]

    def _shape(self, request: ImageRequest) -> tuple[int, int, int]:
        """Shape (C, h, w) of a latent."""
        frame = self.frame(request)
        return self.codec.channels, frame.drawn_height // self.codec.factor, frame.drawn_width // self.codec.factor

    def times_of(self, request: ImageRequest) -> list[float]:
        """The sampling times of a completed request, from noise to image."""
        if request.times is not None:
            return [float(t) for t in request.times]
        frame, strength = self.frame(request), 1.0 if request.edit is None else request.edit.strength
        pixels = frame.drawn_height * frame.drawn_width
        return time_grid(request.grid_steps, transport=self.transport, pixels=pixels, shift=self.spec.sampling["shift"], strength=strength)

    def _tokens(self, request: ImageRequest) -> int:
        """Tokens of an image in a forward, with those for guidance and a second prompt."""
        frame = self.frame(request)
        copies = 1 + (request.guidance != 1.0) + isinstance(request.prompt, PromptMix)
        return copies * (frame.drawn_height // self.stride) * (frame.drawn_width // self.stride)


def _rounds(packs: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Packs in groups of up to `ROUND` images, or one pack."""
    group: list[list[int]] = []
    for pack in packs:
        if group and sum(map(len, group)) + len(pack) > ROUND:
            yield group
            group = []
        group.append(pack)
    if group:
        yield group


def image_of(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) → PIL image: RGB, L for one channel, RGBA for four."""
    array: Any = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
