"""DoRA's registered operators, as ops.py has LoRA's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import backends
from .autograd import bias_gradient
from .calls import Backend, checked_call
from .differentiable import differentiable
from .dispatch import Decision, plan, replays_of
from .dora import column_scale, gradients
from .operators import fake, operator
from .outputs import like_or_empty, or_empty
from .packing import pack, unpack


@operator("dora_linear")
def dora_linear_op(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weights: Sequence[Tensor],
    spec: str,
    scaling: float,
    backend: str,
    need_h: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`dora_linear` without dropout, and the norm [N], h [M, r] and z [M, N] for its backward.

    ``weights``: W0 and, if autocast has cast it, the W0 of the norm. h and z come out empty unless
    they are needed.
    """
    W: Any
    W, *exact = unpack(weights, spec)
    of_norm: Any = exact[0] if exact else W
    call = checked_call(x, W, lora_A, lora_B, bias, False)
    chosen = plan(call, cast(Backend, backend), "dora")
    replays = replays_of(x.shape, Decision(call, chosen, scaling, threshold=0))
    norm = backends.dora_norm(of_norm, lora_A, lora_B, scaling, chosen, replays)
    tensors = (x, W, lora_A, lora_B, column_scale(magnitude, norm), bias)
    y, h, z = backends.dora_forward(
        *tensors, scaling, chosen, need_h=need_h, need_z=need_z, replays=replays
    )
    return y, norm, or_empty(h, x), or_empty(z, x)


@fake(dora_linear_op)
def _(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weights: Sequence[Tensor],
    spec: str,
    scaling: float,
    backend: str,
    need_h: bool,
    need_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = unpack(weights, spec)[-1]
    N, r = lora_B.shape
    M = math.prod(x.shape[:-1])
    return (
        x.new_empty((*x.shape[:-1], N)),
        x.new_empty(N, dtype=torch.promote_types(exact.dtype, torch.float32)),
        x.new_empty((M, r) if need_h else 0),
        x.new_empty((M, N) if need_z else 0),
    )


@operator("dora_linear_backward")
def dora_linear_backward_op(
    g: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    h: Tensor | None,
    z: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    scaling: float,
    backend: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [..., K], dA [r, K], dB [N, r] and dm [N]; those that are not needed come out empty."""
    W: Any
    (W,) = unpack(weight, spec)
    like_x = g.new_empty(1).expand(*g.shape[:-1], lora_A.shape[1])
    call = checked_call(like_x, W, lora_A, lora_B, None, False)
    chosen = plan(call, cast(Backend, backend))
    replays = replays_of(like_x.shape, Decision(call, chosen, scaling, threshold=0))
    tensors = (g, x, W, lora_A, lora_B, magnitude, norm, h, z)
    found = gradients(*tensors, scaling, chosen, need_dx=need_dx, replays=replays)
    dx, dA, dB, dm = (or_empty(t, g) for t in found)
    return dx, dA, dB, dm


@fake(dora_linear_backward_op)
def _(
    g: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    h: Tensor | None,
    z: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    scaling: float,
    backend: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = g.new_empty((*g.shape[:-1], lora_A.shape[1]) if need_dx else 0)
    dA, dB = like_or_empty(lora_A, x is not None, g), like_or_empty(lora_B, h is not None, g)
    return dx, dA, dB, like_or_empty(magnitude, z is not None, g)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, lora_A, lora_B, magnitude, _, weights, spec, scaling, backend, need_h, need_z = inputs
    _, norm, h, z = output
    ctx.set_materialize_grads(False)
    weight, ctx.spec = pack(unpack(weights, spec)[0])
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else None,
        lora_A,
        lora_B,
        magnitude,
        norm,
        h if need_h else None,
        z if need_z else None,
        *weight,
    )
    ctx.weights, ctx.scaling, ctx.backend = len(weights), scaling, backend


def _backward(ctx: Any, call: Callable[..., Any], g: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    x, lora_A, lora_B, magnitude, norm, h, z, *weight = ctx.saved_tensors
    needs_x, needs_A, needs_B, needs_m, needs_bias = ctx.needs_input_grad[:5]
    dx, dA, dB, dm = call(
        g,
        x,
        lora_A,
        lora_B,
        magnitude,
        norm,
        h if needs_B else None,
        z if needs_m else None,
        weight,
        ctx.spec,
        ctx.scaling,
        ctx.backend,
        needs_x,
    )
    return (
        dx if needs_x else None,
        dA if needs_A else None,
        dB if needs_B else None,
        dm if needs_m else None,
        bias_gradient(g, needs_bias),
        [None] * ctx.weights,
        *[None] * 5,
    )


DoRALinearOpFunction: Any = differentiable(
    dora_linear_op, dora_linear_backward_op, _setup_context, _backward
)
