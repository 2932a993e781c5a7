"""The transition transformer: predicts, for a pack of images at times t, the direction that leads each one to its time r.

TiM, arXiv 2509.04394, §4; parameter names, order and initialisation are those of the published checkpoints.
"""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor, nn

from tim.layers import Block, CaptionEmbedding, FinalLayer, PatchEmbedding, TimeEmbedding, at_least_float32, plain_norm
from tim.packed import PackedText, PackedTokens
from tim.rope import LAYOUTS, rotations

# The published parameters and their defaults; `None` marks the required ones. input_size sizes the published rotary table, which
# this network computes on the fly; new_condition and use_new_embed have one supported value each.
OFFICIAL_PARAMS: dict[str, Any] = {
    "input_size": 32,
    "patch_size": None,
    "in_channels": None,
    "depth": None,
    "hidden_size": None,
    "cap_feat_dim": None,
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


class TransitionTransformer(nn.Module):
    """Text-to-image transition network over packs (no padding anywhere).

    `params` holds the published names; build it with `from_official`. `rope` is the rotary layout (see `tim.rope`).
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
        self.x_embedder = PatchEmbedding(self.channels, patch_size=self.patch_size, width=width)
        self.t_embedder = TimeEmbedding(width)
        self.delta_embedder = TimeEmbedding(width)
        self.y_embedder = CaptionEmbedding(params["cap_feat_dim"], width=width)
        rank = params["lora_hidden_size"] or 3 * (width // 4)
        self.blocks = nn.ModuleList(
            Block(width, heads=heads, modulation_rank=rank, qk_norm=params["qk_norm"], distance_aware=params["distance_aware"])
            for _ in range(params["depth"])
        )
        self.final_layer = FinalLayer(width, out=self.patch_size**2 * self.channels)
        self.projector = _projector(width, hidden=params["projector_dim"], out=params["z_dim"]) if params["z_dim"] else None
        self._initialise()

    @classmethod
    def from_official(cls, params: dict[str, Any], *, rope: str = "rowcol") -> TransitionTransformer:
        """Build from the keys of a published YAML's `network.params`.

        Raises ValueError naming the unknown, missing or impossible parameter.
        """
        return cls(params, rope=rope)

    def load_official(self, state_dict: dict[str, Tensor], *, strict: bool = True) -> None:
        """Load weights under the published names. `projector.*` may be absent, or present where this network has none.

        Raises ValueError listing missing keys, unexpected keys and wrong shapes (with `strict=False`: wrong shapes only).
        """
        own = self.state_dict()
        given = {k: v for k, v in state_dict.items() if self.projector is not None or not k.startswith("projector.")}
        missing = [k for k in own if k not in given and not k.startswith("projector.")]
        unexpected = [k for k in given if k not in own]
        shapes = [
            f"{k} {tuple(given[k].shape)} instead of {tuple(own[k].shape)}" for k in given if k in own and given[k].shape != own[k].shape
        ]
        problems = [f"wrong shapes: {_some(shapes)}"] if shapes else []
        if strict and missing:
            problems.append(f"missing keys: {_some(missing)}")
        if strict and unexpected:
            problems.append(f"unexpected keys: {_some(unexpected)}")
        if problems:
            raise ValueError("these weights are not of this network: " + "; ".join(problems))
        super().load_state_dict(given, strict=False)

    @overload
    def forward(
        self, packed: PackedTokens, t: Tensor, r: Tensor, condition: PackedText, *, return_alignment: Literal[False] = False
    ) -> PackedTokens: ...
    @overload
    def forward(
        self, packed: PackedTokens, t: Tensor, r: Tensor, condition: PackedText, *, return_alignment: Literal[True]
    ) -> tuple[PackedTokens, Tensor]: ...
    def forward(
        self, packed: PackedTokens, t: Tensor, r: Tensor, condition: PackedText, *, return_alignment: bool = False
    ) -> PackedTokens | tuple[PackedTokens, Tensor]:
        """Network output for every token.

        packed: noisy images; t, r: (B,) the transport's time inputs of start and end; condition: one caption per image.
        Returns a pack of the input's layout, with `return_alignment` also the projection after block `encoder_depth`, (T, z_dim).
        """
        angles = rotations(packed, head_dim=self.head_dim, layout=self.rope)
        delta = self.delta_embedder(t - r)
        time = self.t_embedder(t) + delta
        text = condition._replace(features=plain_norm(self.y_embedder(condition.features)))
        x = self.x_embedder(packed.tokens)
        alignment = None
        for depth, block in enumerate(self.blocks, start=1):
            x = block(x, time, delta, text, packed, angles)
            if return_alignment and depth == self.params["encoder_depth"]:
                assert self.projector is not None, "return_alignment needs a network with z_dim"
                alignment = self.projector(x)
        out = packed._replace(tokens=at_least_float32(self.final_layer(x, time, packed)))
        return out if alignment is None else (out, alignment)

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
            for module in embedder.mlp.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            assert isinstance(layer, (Block, FinalLayer))
            nn.init.zeros_(layer.adaLN_modulation.fc2.weight)
        nn.init.zeros_(self.final_layer.linear.weight)


def _checked(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with defaults filled in, or a ValueError that names the wrong one."""
    for key in params:
        if key not in OFFICIAL_PARAMS:
            raise ValueError(f"unknown network parameter {key!r}: known are {', '.join(OFFICIAL_PARAMS)}")
    filled = {**OFFICIAL_PARAMS, **params}
    for key, value in filled.items():
        if value is None:
            raise ValueError(f"network parameter {key!r} is missing")
    if filled["new_condition"] != "t-r" or not filled["use_new_embed"]:
        raise ValueError("network parameters new_condition and use_new_embed: only 't-r' and true are supported")
    head_dim, rest = divmod(filled["hidden_size"], filled["num_heads"])
    if rest or head_dim % 4:
        raise ValueError(
            f"hidden_size {filled['hidden_size']} over num_heads {filled['num_heads']}: "
            "the head width must be a multiple of 4 (rotary pairs of rows and columns)"
        )
    return filled


def _projector(width: int, *, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out))


def _some(names: list[str], limit: int = 5) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
