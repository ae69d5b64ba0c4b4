"""The group's registered operators, as ops.py has the single layer's.

Lists take no None: a bias, h_i or gradient that is not there is an empty tensor. The weights come
as `packing.pack` makes them, plain or quantised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from . import backends
from .autograd import bias_gradient
from .calls import Backend, checked_call
from .dispatch import Plan, plan
from .kernels.dropout import Dropout
from .operators import fake, operator, register_autograd
from .outputs import like_or_empty, or_empty
from .packing import unpack
from .quantized_weight import Weight


def dropouts_of(seeds: Tensor | None, thresholds: Sequence[int]) -> list[Dropout | None]:
    """Masks of their own: each member has its own seed."""
    if seeds is None:
        return [None] * len(thresholds)
    return [Dropout(seeds[i : i + 1], t) if t else None for i, t in enumerate(thresholds)]


def plans_of_all(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """The members' plans: on the kernels if every member can take them."""
    if any(p.backend == "torch" for p in plans):
        return (Plan("torch", "library", "library"),) * len(plans)
    return tuple(plans)


def _plans(
    x: Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    thresholds: Sequence[int],
    backend: str,
) -> tuple[Plan, ...]:
    members = zip(weights, lora_As, lora_Bs, thresholds, strict=True)
    return plans_of_all(
        [
            plan(checked_call(x, W, A, B, None, t > 0), cast(Backend, backend), "part")
            for W, A, B, t in members
        ]
    )


def _present(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [t if t.numel() else None for t in tensors]


@operator("lora_linear_group")
def lora_linear_group_op(
    x: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Sequence[Tensor],
    spec: str,
    scalings: Sequence[float],
    seeds: Tensor | None,
    thresholds: Sequence[int],
    backend: str,
    need_h: bool,
) -> list[Tensor]:
    """Every y_i, and the h_i side by side [M, sum r_i], empty unless they are needed."""
    Ws = unpack(weights, spec)
    chosen = _plans(x, Ws, lora_As, lora_Bs, thresholds, backend)
    dropouts = dropouts_of(seeds, thresholds)
    ys, h = backends.forward_group(
        x, Ws, lora_As, lora_Bs, _present(biases), scalings, dropouts, chosen
    )
    return [*ys, or_empty(h if need_h else None, x)]


@fake(lora_linear_group_op)
def _(
    x: Tensor,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    biases: Sequence[Tensor],
    weights: Sequence[Tensor],
    spec: str,
    scalings: Sequence[float],
    seeds: Tensor | None,
    thresholds: Sequence[int],
    backend: str,
    need_h: bool,
) -> list[Tensor]:
    ys = [x.new_empty((*x.shape[:-1], B.shape[0])) for B in lora_Bs]
    ranks = sum(A.shape[0] for A in lora_As)
    return [*ys, x.new_empty((math.prod(x.shape[:-1]), ranks) if need_h else 0)]


@operator("lora_linear_group_backward")
def lora_linear_group_backward_op(
    gs: Sequence[Tensor],
    x: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    h: Tensor | None,
    weights: Sequence[Tensor],
    spec: str,
    scalings: Sequence[float],
    seeds: Tensor | None,
    thresholds: Sequence[int],
    backend: str,
    need_dx: bool,
) -> list[Tensor]:
    """dx, every dA_i and every dB_i; those that are not needed come out empty."""
    n = len(gs)
    Ws = unpack(weights, spec)
    like_x = gs[0].new_empty(1).expand(*gs[0].shape[:-1], lora_As[0].shape[1])
    chosen = _plans(like_x, Ws, lora_As, lora_Bs, thresholds, backend)
    hs = [None] * n if h is None else h.split_with_sizes([len(A) for A in lora_As], dim=1)
    dropouts = dropouts_of(seeds, thresholds)
    dx, dAs, dBs = backends.backward_group(
        gs, x, Ws, lora_As, lora_Bs, hs, scalings, dropouts, chosen, need_dx=need_dx
    )
    if not any(dropouts):  # then they are rows of one matrix; an operator's outputs share nothing
        dAs = [None if dA is None else dA.clone() for dA in dAs]
    return [or_empty(t, gs[0]) for t in (dx, *dAs, *dBs)]


@fake(lora_linear_group_backward_op)
def _(
    gs: Sequence[Tensor],
    x: Tensor | None,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    h: Tensor | None,
    weights: Sequence[Tensor],
    spec: str,
    scalings: Sequence[float],
    seeds: Tensor | None,
    thresholds: Sequence[int],
    backend: str,
    need_dx: bool,
) -> list[Tensor]:
    dx = gs[0].new_empty((*gs[0].shape[:-1], lora_As[0].shape[1]) if need_dx else 0)
    dAs = (like_or_empty(A, x is not None, gs[0]) for A in lora_As)
    return [dx, *dAs, *(like_or_empty(B, h is not None, gs[0]) for B in lora_Bs)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, As, Bs, _, weights, spec, scalings, seeds, thresholds, backend, need_h = inputs
    ctx.save_for_backward(x, output[-1] if need_h else None, seeds, *weights, *As, *Bs)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.scalings, ctx.thresholds, ctx.backend = spec, scalings, thresholds, backend


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    n = len(ctx.scalings)
    x, h, seeds, *tensors = ctx.saved_tensors
    weights, As, Bs = tensors[: -2 * n], tensors[-2 * n : -n], tensors[-n:]
    needs_x, needs_A, needs_B, needs_bias = ctx.needs_input_grad[:4]
    like_y = [(*x.shape[:-1], B.shape[0]) for B in Bs]
    gs = [x.new_zeros(s) if g is None else g for g, s in zip(grads, like_y, strict=False)]
    dx, *others = lora_linear_group_backward_op(
        gs,
        x if any(needs_A) else None,
        As,
        Bs,
        h if any(needs_B) else None,
        weights,
        ctx.spec,
        ctx.scalings,
        seeds,
        ctx.thresholds,
        ctx.backend,
        needs_x,
    )
    return (
        dx if needs_x else None,
        [dA if needs else None for dA, needs in zip(others[:n], needs_A, strict=True)],
        [dB if needs else None for dB, needs in zip(others[n:], needs_B, strict=True)],
        [bias_gradient(g, needs) for g, needs in zip(gs, needs_bias, strict=True)],
        [None] * len(weights),
        *[None] * 6,
    )


register_autograd(lora_linear_group_op, _backward, _setup_context)
