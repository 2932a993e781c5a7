"""The transition objective: train the network to map x_t to x_r for any r ≤ t (TiM, arXiv 2509.04394, §4).

The planner assigns each image a kind: r = t (plain flow matching), r = 0 (directly to the image) or r < t (in between). For r < t the
target contains df/dt, the network's own total derivative along the path: a central difference of two evaluations that run as one pack,
or the exact derivative by forward-mode differentiation.

Legend: B images, T tokens of a pack, p patch size, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tim.layers import autocast
from tim.model_kinds import Derivative, Dtype, Weighting
from tim.packed import Condition, PackedTokens, join, select
from tim.transports import Transport

DIFFUSION, CONSISTENCY, TRANSITION = 0, 1, 2  # r = t, r = 0, r < t: the planner's codes for `kinds`
DERIVATIVES, PRECISIONS, WEIGHTINGS = get_args(Derivative), get_args(Dtype), get_args(Weighting)
# Smallest that are not mostly rounding noise; 0.005 as published.
EPSILONS: Mapping[str, float] = {"fp32": 0.005, "fp16": 0.02, "bf16": 0.05}
MIN_NORM = 1e-2  # norm of a pixel's channels below which the cosine term fades

Network = Callable[[PackedTokens, Tensor, Tensor, Condition], PackedTokens]


class AlignedNetwork(Protocol):
    """A network that also returns the projection for the alignment teacher, (T, z_dim)."""

    def __call__(
        self, packed: PackedTokens, t: Tensor, r: Tensor, condition: Condition, /, *, return_alignment: bool
    ) -> tuple[PackedTokens, Tensor]: ...


class Losses(NamedTuple):
    """Losses of a pack.

    loss: scalar Σ weight·loss over the pack's images, to be divided by the step's planned image count; raw: (B,) detached squared error
    plus cosine term per image, before weighting, a mean over the trained part of a masked image; alignment: (B,) detached distance from the
    alignment teacher, 0 without one; repeated: whether the derivative overflowed and was repeated in float32.
    """

    loss: Tensor
    raw: Tensor
    alignment: Tensor
    repeated: bool = False


class Guide(NamedTuple):
    """Model guidance: the averaged network's output for r = t enters the target, so that the trained network needs no guidance when
    sampling (TiM, §5; 0.75 is the published weight, a guidance scale of 1.75).

    If t is in the closed `interval` (shares of the transport's start), v in f* becomes
    w_gt·v + w_cond·F(x_t, t, t | c) + (1 − w_gt − w_cond)·F(x_t, t, t | ∅). null_condition: ∅ for each image of the pack.
    """

    network: Network
    null_condition: Condition
    w_gt: float = 1.0
    w_cond: float = 0.75
    interval: tuple[float, float] = (0.3, 0.8)


class Mask(NamedTuple):
    """Loss masks of a pack. cells: (T, p·p), the share of the loss of each cell of a token; shares: (B,) their mean over each image."""

    cells: Tensor
    shares: Tensor

    @classmethod
    def of(cls, masks: Sequence[Tensor], packed: PackedTokens) -> Mask:
        """Masks (1, h, w) of the images of a pack."""
        cells = PackedTokens.from_latents(masks, packed.patch_size).tokens
        return cls(cells, packed.mean_per_image(cells.mean(-1)))

    def mean(self, packed: PackedTokens, masked: Tensor) -> Tensor:
        """Mean over the trained part of each image of values that are multiplied with the mask, (T,) → (B,); 0 without such a part."""
        return packed.mean_per_image(masked) / self.shares.clamp(min=torch.finfo(self.shares.dtype).tiny)


class TransitionObjective:
    """Loss of one pack. Has no state.

    Args:
        transport: see `tim.transports`.
        derivative: method for df/dt, `finite-difference` or `jvp` (exact; needs unsharded weights and attention with a forward-mode
            derivative).
        derivative_precision: `fp32`, or `fp16` or `bf16` by autocast. An overflow in fp16 is detected, and the pack repeated in fp32.
        epsilon: half the interval of the central difference; None: `EPSILONS` of the precision.
        weighting: `tangent` weights r < t images by (1 + tan t − tan r)^−½, `none` by 1.
        shift: side in pixels of the square whose times are not shifted; None disables the shift.
        pixels_per_cell: the codec's factor.
        alignment: weight of the distance from the alignment teacher.
        equal_forwards: run the difference's forward on one token if a pack has no r < t images, because under ZeRO-3 ranks wait for each
            other in every forward.
        agree: whether a statement holds on any rank. Asked about an overflow, if ranks must run equally many forwards.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        patch_size: int,
        derivative: str = "finite-difference",
        derivative_precision: str = "fp32",
        epsilon: float | None = None,
        weighting: str = "tangent",
        shift: int | None = 1024,
        pixels_per_cell: int = 1,
        alignment: float = 1.0,
        equal_forwards: bool = True,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        choices = {
            "derivative": (derivative, DERIVATIVES),
            "derivative_precision": (derivative_precision, PRECISIONS),
            "weighting": (weighting, WEIGHTINGS),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
        epsilon = EPSILONS[derivative_precision] if epsilon is None else epsilon
        if not 0 < epsilon < 0.5:
            raise ValueError(f"epsilon {epsilon}: must be between 0 and 0.5")
        self.transport = transport
        self.patch_size = patch_size
        self.derivative = derivative
        self.derivative_precision: Dtype = cast(Dtype, derivative_precision)
        self.epsilon = epsilon
        self.weighting = weighting
        self.shift = shift
        self.pixels_per_cell = pixels_per_cell
        self.alignment = alignment
        self.equal_forwards = equal_forwards
        self.agree = agree

    def __call__(
        self,
        network: Network,
        latents: Sequence[Tensor],
        condition: Condition,
        *,
        noise: Sequence[Tensor],
        kinds: Tensor,
        uniforms: Tensor,
        weights: Tensor,
        masks: Sequence[Tensor] | None = None,
        derivative_network: Network | None = None,
        guide: Guide | None = None,
        teacher: Tensor | None = None,
    ) -> Losses:
        """Loss of one pack.

        latents, noise: B tensors (C, h, w) of equal shapes; kinds: (B,) on the CPU; uniforms: (B, 2) in (0, 1) on the CPU, the times'
        draws; weights: (B,), 0 for a missing sample; masks: B tensors (1, h, w), the share of the loss of each latent cell;
        derivative_network: evaluates the derivative (default: `network`); guide: model guidance of the target; teacher: (T, z_dim) tokens
        to align the network's projection with (REPA, arXiv 2410.06940).
        """
        t, r = self.draw_times(uniforms, kinds, latents)
        return self.at_times(
            network,
            latents,
            condition,
            noise=noise,
            t=t,
            r=r,
            weights=weights,
            masks=masks,
            derivative_network=derivative_network,
            guide=guide,
            teacher=teacher,
        )

    def draw_times(self, uniforms: Tensor, kinds: Tensor, latents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Times t and r, (B,) float64 on the CPU: the larger and the smaller of two draws, with r replaced according to the kind."""
        times = self.transport.draw_times(uniforms)
        if self.shift is not None:
            cells = torch.tensor([latent.shape[-2] * latent.shape[-1] for latent in latents])
            times = self.transport.shift(times, pixels=(cells * self.pixels_per_cell**2)[:, None], reference=self.shift)
        r, t = times.sort(dim=1).values.unbind(1)
        r = torch.where(kinds == DIFFUSION, t, torch.where(kinds == CONSISTENCY, torch.full_like(r, self.transport.end), r))
        return t, r

    def at_times(
        self,
        network: Network,
        latents: Sequence[Tensor],
        condition: Condition,
        *,
        noise: Sequence[Tensor],
        t: Tensor,
        r: Tensor,
        weights: Tensor,
        masks: Sequence[Tensor] | None = None,
        derivative_network: Network | None = None,
        guide: Guide | None = None,
        teacher: Tensor | None = None,
    ) -> Losses:
        """Loss of one pack at given times t and r, (B,) float64 on the CPU. Raises ValueError if r > t.

        A mask multiplies the loss of each cell and is not made up for: the rest of the image counts as much as without a mask.
        """
        if (r > t).any():
            index = int((r > t).nonzero()[0])
            raise ValueError(
                f"image {index}: r = {float(r[index]):.4f} is later than t = {float(t[index]):.4f}; a transition goes from t to r ≤ t"
            )
        device = latents[0].device
        clean = PackedTokens.from_latents(latents, self.patch_size)
        noise_tokens = PackedTokens.from_latents(noise, self.patch_size).tokens
        derivative, repeated = self.path_derivative(derivative_network or network, clean, noise_tokens, condition, t=t, r=r)

        t_tokens, r_tokens = (clean.per_token(time.to(device, non_blocking=True))[:, None] for time in (t, r))
        noisy = clean._replace(tokens=self.transport.mix(clean.tokens, noise_tokens, t_tokens))
        target = self.transport.target(clean.tokens, noise_tokens, t_tokens, r_tokens, derivative)
        if guide is not None:
            target = target + self._guidance(guide, noisy, self.transport.ideal(clean.tokens, noise_tokens, t_tokens), condition, t=t)

        inputs = noisy, self._time_input(t, clean), self._time_input(r, clean), condition
        mask = None if masks is None else Mask.of(masks, clean)
        if teacher is None:
            out, misaligned = network(*inputs), torch.zeros(len(t), device=device)
        else:
            out, projection = cast(AlignedNetwork, network)(*inputs, return_alignment=True)
            distances = 1 - F.cosine_similarity(projection.float(), teacher.float(), dim=-1)
            misaligned = out.mean_per_image(distances) if mask is None else mask.mean(out, distances * mask.cells.mean(-1))

        raw = self.distance(out, target, mask)
        errors = (
            self.time_weight(t, r).to(device, torch.float32, non_blocking=True) * raw / (raw.detach() + 1e-5) + self.alignment * misaligned
        )
        if mask is not None:
            errors = mask.shares * errors
        return Losses((weights.to(device, non_blocking=True) * errors).sum(), raw.detach(), misaligned.detach(), repeated)

    def distance(self, out: PackedTokens, target: Tensor, mask: Mask | None = None) -> Tensor:
        """(B,) mean squared error plus mean over pixels of 1 − cosine over channels (TiM, eq. 12 ff.). target: (T, p·p·C). With a mask,
        means over the trained part.

        In the cosine, vectors shorter than `MIN_NORM` count in proportion to their norm: a new network outputs zero, where the cosine is
        undefined and its gradient unbounded.
        """
        squared = (out.tokens - target).square()
        pixels = (len(target), out.patch_size**2, -1)
        predicted, expected = out.tokens.view(pixels), target.view(pixels)
        norms = predicted.norm(dim=-1).clamp(min=MIN_NORM) * expected.norm(dim=-1).clamp(min=MIN_NORM)
        cosine = (predicted * expected).sum(-1) / norms
        if mask is None:
            return out.mean_per_image(squared.mean(-1) + 1 - cosine.mean(-1))
        squared = (squared.view(pixels) * mask.cells[:, :, None]).flatten(1)
        return mask.mean(out, squared.mean(-1) + mask.cells.mean(-1) - (cosine * mask.cells).mean(-1))

    def time_weight(self, t: Tensor, r: Tensor) -> Tensor:
        """(B,) weight of each image, from the length of its transition."""
        if self.weighting == "none":
            return torch.ones_like(t)
        return torch.where(r == t, torch.ones_like(t), (1 + self.transport.tangent(t) - self.transport.tangent(r)).rsqrt())

    def _guidance(self, guide: Guide, noisy: PackedTokens, ideal: Tensor, condition: Condition, *, t: Tensor) -> Tensor:
        """Change of the target by model guidance, (T, p·p·C). Both evaluations of the guide run as one pack."""
        shares = t / self.transport.start
        guided = ((guide.interval[0] <= shares) & (shares <= guide.interval[1])).nonzero()[:, 0].tolist()
        zeros = torch.zeros_like(ideal)
        if not guided:
            return zeros
        both, rows = guided + guided, noisy.rows(guided)
        times = self._time_input(t[both], noisy)
        with torch.no_grad():
            conditions = join([select(condition, guided), select(guide.null_condition, guided)])
            conditional, unconditional = guide.network(noisy.select(both), times, times, conditions).tokens.chunk(2)
        w_null = 1 - guide.w_gt - guide.w_cond
        change = (guide.w_gt - 1) * ideal.index_select(0, rows) + guide.w_cond * conditional + w_null * unconditional
        return zeros.index_copy(0, rows, change.to(ideal.dtype))

    def path_derivative(
        self, network: Network, clean: PackedTokens, noise_tokens: Tensor, condition: Condition, *, t: Tensor, r: Tensor
    ) -> tuple[Tensor, bool]:
        """df/dt along the path at fixed r, (T, p·p·C), zero for r = t, and whether it was repeated in float32 after an overflow.

        Only r < t images are evaluated, without gradient. With `equal_forwards`, a pack without such images evaluates one token, so that
        every rank runs the same number of forwards.
        """
        moving = (r < t).nonzero()[:, 0].tolist()
        zeros = torch.zeros_like(clean.tokens)
        if moving:
            chosen, differentiate = moving, self._exact_rate if self.derivative == "jvp" else self._central_difference
            part, noise_part = clean.select(moving), clean._replace(tokens=noise_tokens).select(moving).tokens
        elif self.derivative == "finite-difference" and self.equal_forwards:
            chosen, differentiate = [0], self._central_difference
            part, noise_part = clean.select([0]).first_token(), noise_tokens[:1]
        else:
            return zeros, False

        def evaluate(precision: Dtype) -> Tensor:
            with torch.no_grad(), autocast(zeros.device, precision):
                return differentiate(network, part, noise_part, select(condition, chosen), t=t[chosen], r=r[chosen])

        rate, repeated = evaluate(self.derivative_precision), False
        if self.derivative_precision == "fp16" and self.agree(not bool(torch.isfinite(rate).all())):
            rate, repeated = evaluate("fp32"), True
        return (zeros.index_copy(0, clean.rows(moving), rate.to(zeros.dtype)) if moving else zeros), repeated

    def _central_difference(
        self, network: Network, clean: PackedTokens, noise_tokens: Tensor, condition: Condition, *, t: Tensor, r: Tensor
    ) -> Tensor:
        """(f(later) − f(earlier)) / (later − earlier), evaluated as one pack. The interval is shorter at the ends of the time range."""
        earlier, later = self.transport.around(t, self.epsilon)
        both = [*range(len(t))] * 2
        pair, times = clean.select(both), torch.cat([later, earlier])
        mixed = self.transport.mix(
            pair.tokens, noise_tokens.repeat(2, 1), pair.per_token(times.to(pair.tokens.device, non_blocking=True))[:, None]
        )
        out = network(pair._replace(tokens=mixed), self._time_input(times, pair), self._time_input(r[both], pair), select(condition, both))
        ahead, behind = out.tokens.chunk(2)
        interval = clean.per_token((later - earlier).to(clean.tokens.device, clean.tokens.dtype, non_blocking=True))[:, None]
        return (ahead - behind) / interval

    def _exact_rate(
        self, network: Network, clean: PackedTokens, noise_tokens: Tensor, condition: Condition, *, t: Tensor, r: Tensor
    ) -> Tensor:
        """The derivative by forward-mode differentiation of one evaluation."""
        ends = self._time_input(r, clean)

        def output(times: Tensor) -> Tensor:
            mixed = self.transport.mix(clean.tokens, noise_tokens, clean.per_token(times)[:, None])
            return network(clean._replace(tokens=mixed), self._time_input(times, clean), ends, condition).tokens

        times = t.to(clean.tokens.device)
        return torch.func.jvp(output, (times,), (torch.ones_like(times),))[1]

    def _time_input(self, t: Tensor, packed: PackedTokens) -> Tensor:
        """(B,) the network's input for times, computed in float64."""
        return self.transport.time_input(t).to(packed.tokens.device, packed.tokens.dtype, non_blocking=True)
