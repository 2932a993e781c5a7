"""A diffusers pipeline: the argument names, callbacks and outputs of diffusers, for a model of `tim`.

Its steps are those of diffusers' `FlowMapEulerDiscreteScheduler`, whose formula x_r = x_t − (σ_t − σ_r)·f is OT-FM's transition; a model
with another transport is sampled by `tim.Generator` only. Needs `pip install 'tim[latent]'`.

    pipeline = TransitionPipeline.from_pretrained("models/first").to("cuda")
    image = pipeline("a red fox", height=512, width=768, num_inference_steps=8).images[0]
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, cast

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteScheduler
from torch import Tensor

from tim.model_folder.folder import save_model
from tim.model_kinds import Dtype
from tim.packed import PackedTokens
from tim.pretrained.weight_files import PIPELINE
from tim.sampling.evaluation import Evaluator, Guidance, PreciseNetwork, Prompts
from tim.sampling.generator import Generator, image_of
from tim.sampling.requests import ImageRequest, Prompt
from tim.sampling.sources import model_folder

SCHEDULER = "scheduler"
Streams: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
TENSORS = ("latents", "model_output")  # what a callback may ask for


class TransitionPipeline(DiffusionPipeline):
    """A model of `tim` with the interface of a diffusers pipeline. All images of a call have one size.

    Latents are (B, C, h, w) in float32, in the scale of `tim`'s codecs.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = list(TENSORS)

    def __init__(self, generator: Generator, scheduler: FlowMapEulerDiscreteScheduler | None = None) -> None:
        """Raises ValueError for a model whose transport is not OT-FM."""
        super().__init__()
        if (kind := generator.spec.transport["kind"]) != "ot_fm":
            raise ValueError(f"transport {kind}: diffusers' scheduler takes steps of ot_fm only; use tim.Generator")
        self.generator = generator
        self.register_modules(transformer=generator.network, scheduler=scheduler or FlowMapEulerDiscreteScheduler())
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> TransitionPipeline:
        """Load what `save_pretrained` or `tim export` wrote, in any layout, or a hub repository.

        kwargs: torch_dtype (precision of the network's matrix products), scheduler. Raises ValueError for others.
        """
        dtype, scheduler = kwargs.pop("torch_dtype", None), kwargs.pop("scheduler", None)
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: TransitionPipeline.from_pretrained takes torch_dtype and scheduler")
        folder = model_folder(os.fspath(pretrained_model_name_or_path))
        generator = Generator.from_pretrained(folder, device="cpu", dtype=_dtype(dtype))
        if scheduler is None and (folder / SCHEDULER).is_dir():
            scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(folder / SCHEDULER)
        return cls(generator, scheduler)  # pyright: ignore[reportArgumentType]  (its loader may also return a tuple)

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | os.PathLike[str], **kwargs: Any
    ) -> None:
        """Write a folder in diffusers' layout, with copies of codec and text encoder: complete, or not at all. An older one is replaced.

        Raises ValueError for other arguments.
        """
        if kwargs:
            raise ValueError(f"{', '.join(kwargs)}: TransitionPipeline.save_pretrained takes a folder only")
        folder, generator = Path(save_directory), self.generator
        weights = {name: value.detach().cpu() for name, value in generator.network.state_dict().items()}

        def add_scheduler(partial: Path) -> None:
            self.scheduler.save_pretrained(partial / SCHEDULER)
            index = json.loads((partial / PIPELINE).read_text(encoding="utf-8"))
            index[SCHEDULER] = ["diffusers", type(self.scheduler).__name__]
            (partial / PIPELINE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

        save_model(folder, weights, generator.spec, layout="diffusers", copy_models=True, complete=add_scheduler)

    def to(self, *args: Any, **kwargs: Any) -> TransitionPipeline:
        """Move to a device, with codec and text encoder; a dtype sets the precision of the network's matrix products."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self.generator.to(self.device if device is None else device, dtype=_dtype(dtype))
        return self

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.generator.device

    @property
    def interrupt(self) -> bool:
        """Set it in a callback to stop after this step."""
        return self._interrupt

    @interrupt.setter
    def interrupt(self, value: bool) -> None:
        self._interrupt = value

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Prompt | Sequence[Prompt] | None = None,
        num_images_per_prompt: int = 1,
        generator: Streams = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[TransitionPipeline, int, float, dict[str, Any]], Mapping[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Sample images. Returns `ImagePipelineOutput`, whose `images` are as `output_type` says, or a tuple of them.

        Args:
            sigmas: decreasing times from 1 instead of `num_inference_steps`; the last, 0, is implied.
            generator: one for all images, in order, or one per image; None: torch's own.
            latents: (B, C, h, w) noise instead of drawn one.
            output_type: pil; np: float (B, H, W, 3) in [0, 1]; pt: the same as (B, 3, H, W); latent: (B, C, h, w).
            callback_on_step_end: called as callback(pipeline, step, timestep, tensors) after every step; `latents` in its result replace
                those of the pipeline.

        Raises ValueError, in a sentence, for arguments that do not fit.
        """
        unknown = sorted(set(callback_on_step_end_tensor_inputs) - set(TENSORS))
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs {', '.join(unknown)}: this pipeline has {', '.join(TENSORS)}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}: choose pil, np, pt or latent")
        requests = self._requests(
            prompt,
            negative_prompt,
            num_images_per_prompt,
            height=height,
            width=width,
            steps=num_inference_steps,
            times=None if sigmas is None else (*sigmas, 0.0),
            guidance=guidance_scale,
        )
        state = self._noise(requests, generator, latents)
        evaluate = self._evaluator(requests, state)
        self._interrupt = False
        self.scheduler.set_timesteps(sigmas=self.generator.times_of(requests[0])[:-1], device=self.device)
        for step in cast(Iterable[int], self.progress_bar(range(len(self.scheduler.timesteps)))):  # pyright: ignore
            timestep = self.scheduler.timesteps[step]
            sigma, target = (float(value) for value in self.scheduler.sigmas[step : step + 2])
            output = _predict(evaluate, state, sigma, target)
            state = self.scheduler.step(output, timestep, state, return_dict=False)[0]
            if callback_on_step_end is not None:
                tensors = {"latents": state, "model_output": output}
                given = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                state = (callback_on_step_end(self, step, float(timestep), given) or {}).get("latents", state)
            if self._interrupt:
                break
        images = self._decoded(requests, state, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _requests(
        self, prompt: Prompt | Sequence[Prompt], negative: Prompt | Sequence[Prompt] | None, count: int, **settings: Any
    ) -> list[ImageRequest]:
        """One completed request per image: `count` of each prompt."""
        prompts = [prompt] if isinstance(prompt, (str, int)) else list(prompt)
        negatives = [negative] * len(prompts) if negative is None or isinstance(negative, (str, int)) else list(negative)
        if not prompts or len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for all, or one for each")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"num_images_per_prompt {count!r}: must be a whole number, at least 1")
        pairs = [pair for pair in zip(prompts, negatives, strict=True) for _ in range(count)]
        return [self.generator.check(ImageRequest(prompt, negative=negative, **settings)) for prompt, negative in pairs]

    def _noise(self, requests: Sequence[ImageRequest], generator: Streams, latents: Tensor | None) -> Tensor:
        """(B, C, h, w) in float32. Raises ValueError if `latents` or the generators do not fit."""
        frame, codec = self.generator.frame(requests[0]), self.generator.codec
        shape = (codec.channels, frame.drawn_height // codec.factor, frame.drawn_width // codec.factor)
        if latents is not None:
            if latents.shape != (len(requests), *shape):
                raise ValueError(f"latents of shape {tuple(latents.shape)}: expected {(len(requests), *shape)}")
            return latents.to(self.device, torch.float32)
        streams = [generator] * len(requests) if generator is None or isinstance(generator, torch.Generator) else list(generator)
        if len(streams) != len(requests):
            raise ValueError(f"{len(streams)} generators for {len(requests)} images: give one for all, or one for each")
        drawn = [torch.randn(shape, generator=stream, device="cpu" if stream is None else stream.device) for stream in streams]
        return torch.stack([noise.to(self.device) for noise in drawn])

    def _evaluator(self, requests: Sequence[ImageRequest], state: Tensor) -> Evaluator:
        generator = self.generator
        conditions = generator.conditions(requests)
        precise = PreciseNetwork(generator.network, generator.dtype)
        layout = PackedTokens.from_latents(list(state.double()), generator.network.patch_size)
        scales = [1.0 if request.guidance is None else request.guidance for request in requests]
        intervals = [request.interval or (0.0, 1.0) for request in requests]
        instantaneous = bool(generator.spec.sampling.get("instantaneous", False))
        prompts = Prompts(conditions.condition, conditions.null, None, ())
        rules = Guidance(scales, intervals)
        return Evaluator(precise, layout, prompts, rules, generator.transport, instantaneous, generator.tokens_per_pack)

    def _decoded(self, requests: Sequence[ImageRequest], latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        pixels = self.generator.codec.decode(list(latents))
        cropped = [self.generator.frame(request).crop(image) for request, image in zip(requests, pixels, strict=True)]
        if output_type == "pil":
            return [image_of(image) for image in cropped]
        values = torch.stack(cropped).float().cpu() / 255
        return values if output_type == "pt" else np.ascontiguousarray(values.permute(0, 2, 3, 1).numpy())


def _predict(evaluate: Evaluator, state: Tensor, sigma: float, target: float) -> Tensor:
    """The network's guided output (B, C, h, w) in float32 at σ_t and σ_r."""
    layout, count = evaluate.layout, len(state)
    tokens = PackedTokens.from_latents(list(state.double()), layout.patch_size).tokens
    outputs = evaluate(tokens, [sigma] * count, [target] * count, images=range(count))
    return torch.stack(layout._replace(tokens=outputs).to_latents()).float()


def _dtype(dtype: torch.dtype | None) -> Dtype | None:
    """Precision of the matrix products. Raises ValueError for a dtype that networks are not sampled in."""
    names: dict[torch.dtype | None, Dtype | None] = {None: None, torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    if dtype not in names:
        raise ValueError(f"torch_dtype {dtype}: choose torch.float16, torch.bfloat16 or torch.float32")
    return names[dtype]
