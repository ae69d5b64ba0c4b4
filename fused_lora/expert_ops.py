"""The registered operators of mixtures of experts, as ops.py has the single layer's.

The rows' order is among their arguments, as tensors that the graph itself makes: a model's layer
sorts its router's choice once, for all four. What else is made of it, which in eager mode all four
share, each makes again: its pieces, and on PyTorch's path a GPU's answer how many rows an expert
has. Which path runs is decided on real shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .backends import as_gradient
from .calls import Backend
from .differentiable import differentiable
from .expert_backends import Path, backward, project
from .expert_calls import Routing, call_of, path_of
from .expert_combine import Passed, combine_backward, dots_of, project_combined
from .expert_stack import Experts, Projection
from .kernels.dropout import dropout_of
from .kernels.rows import RowGroups
from .observed import fold_scaling, is_trained
from .operators import fake, operator
from .outputs import like_or_empty, or_empty
from .packing import pack, unpack


def _layer(
    like_x: Tensor,  # of its dtype and device
    weight: Sequence[Tensor],
    spec: str,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    groups: Sequence[Tensor],
    scaling: float,
    seed: Tensor | None,
    threshold: int,
    backend: str,
) -> tuple[Path, Experts]:
    order, adapters, offsets = groups
    rows = RowGroups(len(order), order, adapters, offsets, on_host=None)
    layer = Projection(unpack(weight, spec)[0], bias, lora_A, lora_B, scaling)
    call = call_of(like_x, layer, rows.M, dropout=threshold > 0)
    experts = Experts.of(layer, like_x.dtype, dropout_of(seed, threshold), rows)
    return path_of(call, cast(Backend, backend)), experts


@operator("lora_linear_experts")
def lora_linear_experts_op(
    x: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    groups: Sequence[Tensor],
    scaling: float,
    seed: Tensor | None,
    threshold: int,
    fan: int,
    scatters: bool,
    backend: str,
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    """y [M, N] of x [M / fan, K] and h [M, r], empty unless it is needed.

    ``groups``: order, adapters and offsets of `RowGroups`. ``scatters``: as of `Experts`.
    """
    rest = (groups, scaling, seed, threshold, backend)
    path, layer = _layer(x, weight, spec, lora_A, lora_B, bias, *rest)
    y, h = project(path, x, layer._replace(fan=fan, scatters=scatters), bias)
    return y, or_empty(h if need_h else None, x)


@fake(lora_linear_experts_op)
def _(
    x: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    groups: Sequence[Tensor],
    scaling: float,
    seed: Tensor | None,
    threshold: int,
    fan: int,
    scatters: bool,
    backend: str,
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    M, N = groups[0].shape[0], unpack(weight, spec)[0].shape[1]
    return x.new_empty((M, N)), _h(x, M, lora_A, need_h)


def _h(x: Tensor, M: int, lora_A: Tensor | None, need_h: bool) -> Tensor:
    return x.new_empty((M, lora_A.shape[1]) if need_h and lora_A is not None else 0)


@operator("lora_linear_experts_backward")
def lora_linear_experts_backward_op(
    g: Tensor,
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    h: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    groups: Sequence[Tensor],
    scaling: float,
    seed: Tensor | None,
    threshold: int,
    fan: int,
    scatters: bool,
    backend: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [M / fan, K], dA [E, r, K] and dB [E, N, r]; those that are not needed come out empty."""
    rest = (groups, scaling, seed, threshold, backend)
    path, layer = _layer(g, weight, spec, lora_A, lora_B, None, *rest)
    layer = layer._replace(fan=fan, scatters=scatters)
    dx, dA, dB = backward(path, as_gradient(g, path), x, h, layer, need_dx=need_dx)
    return or_empty(dx, g), or_empty(dA, g), or_empty(dB, g)


@fake(lora_linear_experts_backward_op)
def _(
    g: Tensor,
    x: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    h: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    groups: Sequence[Tensor],
    scaling: float,
    seed: Tensor | None,
    threshold: int,
    fan: int,
    scatters: bool,
    backend: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    K = unpack(weight, spec)[0].shape[2]
    dx = g.new_empty((groups[0].shape[0] // fan, K) if need_dx else 0)
    return dx, like_or_empty(lora_A, x is not None, g), like_or_empty(lora_B, h is not None, g)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, lora_A, lora_B, _, weight, spec, groups, scaling, seed, *rest, need_h = inputs
    h = output[1] if need_h else None
    x = x if ctx.needs_input_grad[1] else None
    ctx.save_for_backward(x, lora_A, lora_B, h, seed, *groups, *weight)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.scaling, ctx.rest = spec, scaling, rest


def _backward(ctx: Any, call: Callable[..., Any], g: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, lora_A, lora_B, h, seed, *tensors = ctx.saved_tensors
    groups, weight = tensors[:3], tensors[3:]
    needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
    h, rest = h if needs_B else None, (groups, ctx.scaling, seed, *ctx.rest)
    dx, dA, dB = call(g, x, lora_A, lora_B, h, weight, ctx.spec, *rest, needs_x)
    return (
        dx if needs_x else None,
        dA if needs_A else None,
        dB if needs_B else None,
        None,
        [None] * len(weight),
        None,
        [None] * len(groups),
        *[None] * 7,
    )


_ExpertsFunction: Any = differentiable(
    lora_linear_experts_op, lora_linear_experts_backward_op, _setup_context, _backward
)


@operator("lora_experts_combine")
def lora_experts_combine_op(
    a: Tensor,
    p: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    groups: Sequence[Tensor],
    experts: Tensor,
    scaling: float,
    backend: str,
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    """`project_combined` of a [T k, K] and p [T, k]; h is empty unless it is needed."""
    rest = (groups, scaling, None, 0, backend)
    path, layer = _layer(a, weight, spec, lora_A, lora_B, bias, *rest)
    y, h = project_combined(path, a, p, layer._replace(gathers=False, fan_g=p.shape[1]), bias)
    return y, or_empty(h if need_h else None, a)


@fake(lora_experts_combine_op)
def _(
    a: Tensor,
    p: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    groups: Sequence[Tensor],
    experts: Tensor,
    scaling: float,
    backend: str,
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    y = a.new_empty((p.shape[0], unpack(weight, spec)[0].shape[1]))
    return y, _h(a, groups[0].shape[0], lora_A, need_h)


@operator("lora_experts_combine_backward")
def lora_experts_combine_backward_op(
    g: Tensor,
    a: Tensor | None,
    p: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    h: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    groups: Sequence[Tensor],
    experts: Tensor,
    scaling: float,
    backend: str,
    need_da: bool,
    need_dp: bool,
    need_dA: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """da [T k, K], dp [T, k], dA and dB; those that are not needed come out empty."""
    rest = (groups, scaling, None, 0, backend)
    path, layer = _layer(g, weight, spec, lora_A, lora_B, bias, *rest)
    layer = layer._replace(gathers=False, fan_g=p.shape[1])

    def middle(da: Tensor | None, p_rows: Tensor) -> Passed:
        if da is None:
            return Passed(a, None, None)
        dots = dots_of(da, a) if need_dp and a is not None else None
        return Passed(a, dots, (lambda: da.mul_(p_rows)) if need_da else None)

    operands = (as_gradient(g, path), p, layer, bias, h, experts, middle)
    needs_da = need_da or need_dp
    da, dp, dA, dB = combine_backward(path, *operands, need_da=needs_da, need_dA=need_dA)
    return or_empty(da, g), or_empty(dp, g), or_empty(dA, g), or_empty(dB, g)


@fake(lora_experts_combine_backward_op)
def _(
    g: Tensor,
    a: Tensor | None,
    p: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    h: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    groups: Sequence[Tensor],
    experts: Tensor,
    scaling: float,
    backend: str,
    need_da: bool,
    need_dp: bool,
    need_dA: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    K = unpack(weight, spec)[0].shape[2]
    return (
        g.new_empty((groups[0].shape[0], K) if need_da else 0),
        like_or_empty(p, need_dp, g),
        like_or_empty(lora_A, need_dA, g),
        like_or_empty(lora_B, h is not None, g),
    )


def _setup_combine_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    a, p, lora_A, lora_B, bias, weight, spec, groups, experts, scaling, backend, need_h = inputs
    _, needs_p, needs_A = ctx.needs_input_grad[:3]
    a, bias = a if needs_p or needs_A else None, bias if needs_p else None
    h = output[1] if need_h else None
    ctx.save_for_backward(a, p, lora_A, lora_B, bias, h, experts, *groups, *weight)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.scaling, ctx.backend = spec, scaling, backend


def _combine_backward(
    ctx: Any, call: Callable[..., Any], g: Tensor, _: Tensor | None
) -> tuple[Any, ...]:
    a, p, lora_A, lora_B, bias, h, experts, *tensors = ctx.saved_tensors
    groups, weight = tensors[:3], tensors[3:]
    needs_a, needs_p, needs_A, needs_B = ctx.needs_input_grad[:4]
    rest = (groups, experts, ctx.scaling, ctx.backend, needs_a, needs_p, needs_A)
    h = h if needs_B else None
    da, dp, dA, dB = call(g, a, p, lora_A, lora_B, bias, h, weight, ctx.spec, *rest)
    return (
        da if needs_a else None,
        dp if needs_p else None,
        dA if needs_A else None,
        dB if needs_B else None,
        None,
        [None] * len(weight),
        None,
        [None] * len(groups),
        *[None] * 4,
    )


_CombineFunction: Any = differentiable(
    lora_experts_combine_op,
    lora_experts_combine_backward_op,
    _setup_combine_context,
    _combine_backward,
)


def call(
    x: Tensor,
    layer: Projection,
    routing: Routing,
    backend: Backend,
    *,
    fan: int,
    seed: Tensor | None = None,
    threshold: int = 0,
    scatters: bool = True,
) -> Tensor:
    """y [M, N] of x [M / fan, K], as an operator."""
    layer, need_h = _folded(layer)
    compiling = torch.compiler.is_compiling()
    apply: Any = lora_linear_experts_op if compiling else _ExpertsFunction.apply
    numbers = (layer.scaling, seed, threshold, fan, scatters, backend, need_h)
    operands = (x, layer.lora_A, layer.lora_B, layer.bias)
    y: Tensor = apply(*operands, *pack(layer.weight), _groups(routing), *numbers)[0]
    return y


def call_combine(
    a: Tensor, p: Tensor, layer: Projection, routing: Routing, backend: Backend
) -> Tensor:
    """`project_combined`'s y, as an operator."""
    layer, need_h = _folded(layer)
    compiling = torch.compiler.is_compiling()
    apply: Any = lora_experts_combine_op if compiling else _CombineFunction.apply
    rest = (_groups(routing), routing.experts, layer.scaling, backend, need_h)
    y: Tensor = apply(a, p, layer.lora_A, layer.lora_B, layer.bias, *pack(layer.weight), *rest)[0]
    return y


def _folded(layer: Projection) -> tuple[Projection, bool]:
    """With its scaling as the operators take it, and whether h is needed."""
    if layer.lora_B is None:
        return layer._replace(scaling=1.0), False
    lora_B, scaling = fold_scaling(layer.lora_B, layer.scaling)
    return layer._replace(lora_B=lora_B, scaling=scaling), is_trained(lora_B)


def _groups(routing: Routing) -> list[Tensor]:
    order = routing.groups.order
    assert order is not None
    return [order, routing.groups.adapters, routing.groups.offsets]
