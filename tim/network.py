"""The transition transformer: predicts, for a pack of images at times t, the direction of each to its time r.

TiM, arXiv 2509.04394, §4. Parameter names, order and initialisation match the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tim.attention.sdpa import has_tangent
from tim.layers import (
    Block,
    CaptionEmbedding,
    ClassEmbedding,
    CrossAttention,
    FinalLayer,
    PatchEmbedding,
    SelfAttention,
    TimeEmbedding,
    at_least_float32,
    plain_norm,
)
from tim.model_kinds import NewCondition
from tim.packed import Condition, PackedText, PackedTokens, PackShape, pad
from tim.pretrained.official import read_weights, unnested
from tim.rope import LAYOUTS, rotations

# The published parameters and their defaults; `None` marks required ones. input_size is the size of the published rotary table, which
# this network computes on the fly.
OFFICIAL_PARAMS: dict[str, Any] = {
    "input_size": 32,
    "patch_size": None,
    "in_channels": None,
    "depth": None,
    "hidden_size": None,
    "num_heads": None,
    "encoder_depth": 8,
    "z_dim": 0,
    "projector_dim": 2048,
    "lora_hidden_size": 0,
    "qk_norm": True,
    "new_condition": "t-r",
    "use_new_embed": True,
    "distance_aware": True,
}
TEXT_PARAMS: dict[str, Any] = {"cap_feat_dim": None}
CLASS_PARAMS: dict[str, Any] = {"num_classes": 1000, "class_dropout_prob": 0.1}
NEW_CONDITIONS = get_args(NewCondition)
PROJECTOR = "projector."  # names of the projection for the alignment teacher, which is no part of the sampled network
# Shapes, precisions and gradient modes that the blocks are compiled for, at most: the default of 8 would be exceeded, and then nothing
# is compiled any more.
COMPILED_SHAPES = 64


class TransitionTransformer(nn.Module):
    """Transition network over packs (no padding anywhere), conditioned on captions or, without `cap_feat_dim`, on classes.

    `params` has the published names; build it with `from_official`. `rope` is the rotary layout (see `tim.rope`).
    `classes` is the number of classes (None: captions), `null_class` the id of the null class (None: there is none).
    """

    def __init__(self, params: dict[str, Any], *, rope: str = "rowcol") -> None:
        super().__init__()
        params = _checked(params)
        if rope not in LAYOUTS:
            raise ValueError(f"unknown rotary layout {rope!r}: choose one of {', '.join(LAYOUTS)}")
        width, heads = params["hidden_size"], params["num_heads"]
        self.params = params
        self.rope = rope
        self.head_dim = width // heads
        self.patch_size: int = params["patch_size"]
        self.channels: int = params["in_channels"]
        self.classes: int | None = params.get("num_classes")
        self.null_class = self.classes if params.get("class_dropout_prob") else None
        self.x_embedder = PatchEmbedding(self.channels, patch_size=self.patch_size, width=width)
        self.t_embedder = TimeEmbedding(width)
        self.delta_embedder = TimeEmbedding(width) if params["use_new_embed"] else None
        if self.classes is None:
            self.y_embedder = CaptionEmbedding(params["cap_feat_dim"], width=width)
        else:
            self.y_embedder = ClassEmbedding(self.classes, null=self.null_class is not None, width=width)
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads=heads,
                modulation_rank=modulation_rank(params),
                qk_norm=params["qk_norm"],
                distance_aware=params["distance_aware"],
                captions=self.classes is None,
            )
            for _ in range(params["depth"])
        )
        self.final_layer = FinalLayer(width, out=self.patch_size**2 * self.channels)
        self.projector = _projector(width, hidden=params["projector_dim"], out=params["z_dim"]) if params["z_dim"] else None
        self._checkpoint_every = 0
        self._compile_for: int | None = None
        self._initialise()

    @classmethod
    def from_official(cls, params: dict[str, Any], *, rope: str = "rowcol") -> TransitionTransformer:
        """Build from the keys of a published YAML's `network.params`.

        Raises ValueError naming an unknown, missing or invalid parameter.
        """
        return cls(params, rope=rope)

    def load_official(self, weights: Mapping[str, Any] | str | Path, *, strict: bool = True) -> None:
        """Load weights with the published names, or from a file; both may be nested as in a training checkpoint.

        `projector.*` keys are optional, and ignored if this network has no projector. Raises ValueError listing missing keys, unexpected
        keys and wrong shapes (with `strict=False`: wrong shapes only), and if a file cannot be read.
        """
        given = unnested(weights) if isinstance(weights, Mapping) else read_weights(weights)
        own = self.state_dict()
        given = {k: v for k, v in given.items() if self.projector is not None or not k.startswith(PROJECTOR)}
        missing = [k for k in own if k not in given and not k.startswith(PROJECTOR)]
        unexpected = [k for k in given if k not in own]
        shapes = [
            f"{k} {tuple(given[k].shape)} instead of {tuple(own[k].shape)}" for k in given if k in own and given[k].shape != own[k].shape
        ]
        problems = [f"wrong shapes: {_listed(shapes)}"] if shapes else []
        if strict and missing:
            problems.append(f"missing keys: {_listed(missing)}")
        if strict and unexpected:
            problems.append(f"unexpected keys: {_listed(unexpected)}")
        if problems:
            source = "" if isinstance(weights, Mapping) else f"{weights}: "
            raise ValueError(f"{source}these weights do not fit this network: " + "; ".join(problems))
        super().load_state_dict(given, strict=False)

    def to_official(self) -> dict[str, Tensor]:
        """A copy of the weights on the CPU with the published names, as `load_official` and the published code read them."""
        return {name: value.detach().to("cpu", copy=True) for name, value in self.state_dict().items()}

    def configure_execution(
        self, *, attention: Mapping[torch.dtype, str] | None = None, checkpoint_every: int = 0, compile_for: int | None = None
    ) -> None:
        """Configure speed and memory use. Results do not change.

        attention: the backend of `tim.attention.dispatch` by dtype (others: auto). checkpoint_every: every n-th block keeps only its
        input and is recomputed in the backward pass (1: all, 0: none). compile_for: compile the blocks with `torch.compile`, for packs
        padded to multiples of this number of tokens (without gradient: of a quarter of it). A forward-mode derivative is not compiled.
        """
        assert checkpoint_every >= 0
        for module in self.modules():
            if isinstance(module, (SelfAttention, CrossAttention)):
                module.backends = dict(attention or {})
        self._checkpoint_every = checkpoint_every
        self._compile_for = compile_for
        if compile_for is not None:
            self._compile_blocks()

    def _compile_blocks(self) -> None:
        from tim.attention.compiled import compiled_attention

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_SHAPES)
        for module in self.modules():
            if isinstance(module, (SelfAttention, CrossAttention)):
                module.attend = compiled_attention
            elif isinstance(module, Block):
                module.compile(dynamic=False)

    @overload
    def forward(
        self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition, *, return_alignment: Literal[False] = False
    ) -> PackedTokens: ...
    @overload
    def forward(
        self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition, *, return_alignment: Literal[True]
    ) -> tuple[PackedTokens, Tensor]: ...
    def forward(
        self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition, *, return_alignment: bool = False
    ) -> PackedTokens | tuple[PackedTokens, Tensor]:
        """Network output for every token.

        packed: noisy images; t, r: (B,) the transport's time inputs of start and end; condition: captions, or (B,) class ids.
        Returns a pack with the input's layout, and with `return_alignment` also the projection after block `encoder_depth`, (T, z_dim).
        Raises ValueError if the condition has the wrong type, width or range.
        """
        self._check(condition, images=len(packed.sizes))
        if self._compile_for is None or has_tangent(packed.tokens, t, r):
            tokens, alignment = self._forward(packed, t, r, condition, return_alignment=return_alignment)
        else:
            shape = PackShape.around(packed, condition, full=self._compile_for, whole=torch.is_grad_enabled())
            padded, condition = pad(packed, condition, shape)
            t, r = (F.pad(times, (0, shape.images - len(times))) for times in (t, r))
            tokens, alignment = self._forward(padded, t, r, condition, return_alignment=return_alignment, compiled=True)
            tokens, alignment = tokens[: len(packed.tokens)], None if alignment is None else alignment[: len(packed.tokens)]
        out = packed._replace(tokens=at_least_float32(tokens))
        return out if alignment is None else (out, alignment)

    def _forward(
        self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition, *, return_alignment: bool, compiled: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Output for every token, and the projection. compiled: run the blocks that `configure_execution` compiled."""
        angles = rotations(packed, head_dim=self.head_dim, layout=self.rope)
        delta = self._interval(t, r)
        time = self.t_embedder(t) + delta
        if isinstance(condition, PackedText):
            text = condition._replace(features=plain_norm(self.y_embedder(condition.features)))
        else:
            text, time = None, time + self.y_embedder(condition)
        x = self.x_embedder(packed.tokens)
        alignment, images = None, packed
        if compiled:
            angles, images, text = torch.view_as_real(angles), packed.without_lengths(), text and text.without_lengths()
        for depth, block in enumerate(self.blocks, start=1):
            run = block if compiled or self._compile_for is None else block.forward
            if self._checkpoint_every and depth % self._checkpoint_every == 0 and torch.is_grad_enabled():
                x = checkpoint(run, x, time, delta, text, images, angles, use_reentrant=False, preserve_rng_state=False)
            else:
                x = run(x, time, delta, text, images, angles)
            if return_alignment and depth == self.params["encoder_depth"]:
                assert self.projector is not None, "return_alignment needs a network with z_dim"
                alignment = self.projector(x)
        return self.final_layer(x, time, packed), alignment

    def _interval(self, t: Tensor, r: Tensor) -> Tensor:
        """Embedding of the transition length, (B, D). The last time in `new_condition` has its own embedder."""
        times = {"t": t, "r": r, "t-r": t - r}
        *others, last = self.params["new_condition"].split(",")
        embedding = (self.t_embedder if self.delta_embedder is None else self.delta_embedder)(times[last])
        for name in others:
            embedding = embedding + self.t_embedder(times[name])
        return embedding

    def _check(self, condition: Condition, *, images: int) -> None:
        """Reject a condition that does not fit this network. Class ids on a GPU are not checked, to avoid synchronising."""
        if isinstance(condition, PackedText) != (self.classes is None):
            expected = "captions (PackedText)" if self.classes is None else f"class ids, {_ids(self.classes, self.null_class)}"
            raise ValueError(f"this network is conditioned on {expected}, not on {type(condition).__name__}")
        if isinstance(condition, PackedText):
            count, width, wanted = len(condition.segments.lengths), condition.features.shape[-1], self.params["cap_feat_dim"]
            if width != wanted:
                raise ValueError(f"caption features have width {width}, this network's cap_feat_dim is {wanted}: use its own text encoder")
        else:
            count = len(condition)
            assert self.classes is not None
            check_classes(condition.tolist() if condition.device.type == "cpu" else [], classes=self.classes, null=self.null_class)
        if count != images:
            raise ValueError(f"{count} conditions for {images} images: give one for each")

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
        if patches.bias is not None:
            nn.init.zeros_(patches.bias)
        for embedder in (self.t_embedder, self.y_embedder):
            for module in embedder.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(module.weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            assert isinstance(layer, (Block, FinalLayer))
            nn.init.zeros_(layer.adaLN_modulation.fc2.weight)
        nn.init.zeros_(self.final_layer.linear.weight)


def modulation_rank(params: Mapping[str, Any]) -> int:
    """Hidden width of the blocks' modulation: `lora_hidden_size`, or three quarters of the network's."""
    return params["lora_hidden_size"] or 3 * (params["hidden_size"] // 4)


def check_classes(classes_given: Sequence[int], *, classes: int, null: int | None) -> None:
    """Raise ValueError naming the first id that is neither in [0, `classes`) nor `null`."""
    for given in classes_given:
        if given != null and not 0 <= given < classes:
            raise ValueError(f"class {given}: must be {_ids(classes, null)}")


def _ids(classes: int, null: int | None) -> str:
    return f"from 0 to {classes - 1}" + ("" if null is None else f", or {null} for none")


def _checked(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with defaults filled in. Raises ValueError naming a wrong one."""
    kind, other = (CLASS_PARAMS, TEXT_PARAMS) if params.get("cap_feat_dim") is None else (TEXT_PARAMS, CLASS_PARAMS)
    known = {**OFFICIAL_PARAMS, **kind}
    for key, value in params.items():
        if key in other and value is not None:
            raise ValueError(f"network parameter {key!r} is for class models, cap_feat_dim for text models: give one of them")
        if key not in known and key not in other:
            raise ValueError(f"unknown network parameter {key!r}: known parameters are {', '.join([*known, *other])}")
    filled = {**known, **{key: value for key, value in params.items() if key in known}}
    for key, value in filled.items():
        if value is None:
            raise ValueError(f"network parameter {key!r} is missing")
    if filled["new_condition"] not in NEW_CONDITIONS:
        raise ValueError(f"network parameter new_condition {filled['new_condition']!r}: choose one of {' '.join(NEW_CONDITIONS)}")
    if filled["z_dim"] and not 1 <= filled["encoder_depth"] <= filled["depth"]:
        raise ValueError(f"network parameter encoder_depth {filled['encoder_depth']}: must be from 1 to depth {filled['depth']}")
    if filled.get("num_classes", 1) < 1 or not 0 <= filled.get("class_dropout_prob", 0) <= 1:
        raise ValueError("network parameters num_classes and class_dropout_prob: must be at least 1, and from 0 to 1")
    head_dim, remainder = divmod(filled["hidden_size"], filled["num_heads"])
    if remainder or head_dim % 4:
        raise ValueError(
            f"hidden_size {filled['hidden_size']} over num_heads {filled['num_heads']}: "
            "the head width must be a multiple of 4 (rotary pairs of rows and columns)"
        )
    return filled


def _projector(width: int, *, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))


def _listed(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
