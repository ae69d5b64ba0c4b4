"""The registered operators of `lora_linear_multi`, as ops.py has the single layer's.

Which rows take which adapter is an argument like any other, so that a graph holds no lengths: a
tensor of indices, or segments in one list, (index, rows) after (index, rows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from . import multi_backends
from .autograd import bias_gradient
from .calls import Backend
from .kernels.dropout import dropout_of
from .multi_backends import Adapted, MultiPlan
from .multi_dispatch import checked
from .operators import fake, operator, register_autograd
from .outputs import like_or_empty, or_empty
from .packing import unpack
from .quantized_weight import Weight


def _decided(
    x: Tensor,
    weight: Weight,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    indices: Tensor | None,
    segments: Sequence[int],
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    backend: str,
) -> tuple[Adapted, MultiPlan]:
    pairs = None
    if indices is None:
        pairs = list(zip(segments[0::2], segments[1::2], strict=True))
    found = checked(
        x,
        weight,
        list(lora_As),
        list(lora_Bs),
        list(scalings),
        indices,
        pairs,
        bias,
        threshold / 2**16,
        cast(Backend, backend),
    )
    dropout = dropout_of(seed, threshold)
    return found.layer._replace(dropout=dropout), found.plan


# What is uploaded for a batch is kept, which memory of a CUDA graph must not be.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@operator("lora_linear_multi", tags=_TAGS)
def lora_linear_multi_op(
    x: Tensor,
    weights: Sequence[Tensor],
    spec: str,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    bias: Tensor | None,
    scalings: Sequence[float],
    indices: Tensor | None,
    segments: Sequence[int],
    seed: Tensor | None,
    threshold: int,
    backend: str,
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    """`lora_linear_multi` with the dropout seed given, and h [M, max r], empty unless needed.

    ``weights``, ``spec``: W0 as `packing.pack` has it.
    """
    weight = unpack(weights, spec)[0]
    layer, chosen = _decided(
        x, weight, lora_As, lora_Bs, scalings, indices, segments, bias, seed, threshold, backend
    )
    y, h = multi_backends.forward(x, layer, bias, chosen, need_h=need_h)
    return y, or_empty(h, x)


@fake(lora_linear_multi_op)
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    spec: str,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    bias: Tensor | None,
    scalings: Sequence[float],
    indices: Tensor | None,
    segments: Sequence[int],
    seed: Tensor | None,
    threshold: int,
    backend: str,
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], lora_Bs[0].shape[0]))
    rank = max(A.shape[0] for A in lora_As)
    return y, x.new_empty((math.prod(x.shape[:-1]), rank) if need_h else 0)


@operator("lora_linear_multi_backward", tags=_TAGS)
def lora_linear_multi_backward_op(
    g: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    spec: str,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    h: Tensor | None,
    scalings: Sequence[float],
    indices: Tensor | None,
    segments: Sequence[int],
    seed: Tensor | None,
    threshold: int,
    backend: str,
    need_dx: bool,
) -> list[Tensor]:
    """dx [..., K], every dA and every dB; those that are not needed come out empty."""
    weight = unpack(weights, spec)[0]
    # g has y's M and dtype, which with the weights is all that the forward's plan depended on.
    like_x = g.new_empty(1).expand(*g.shape[:-1], lora_As[0].shape[1])
    layer, chosen = _decided(
        like_x,
        weight,
        lora_As,
        lora_Bs,
        scalings,
        indices,
        segments,
        None,
        seed,
        threshold,
        backend,
    )
    dx, dAs, dBs = multi_backends.backward(g, x, layer, h, chosen, need_dx=need_dx)
    # Parts of one tensor on the kernels; an operator's outputs share nothing.
    grads = [None if t is None else t.clone() for t in (*dAs, *dBs)]
    return [or_empty(t, g) for t in (dx, *grads)]


@fake(lora_linear_multi_backward_op)
def _(
    g: Tensor,
    x: Tensor | None,
    weights: Sequence[Tensor],
    spec: str,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    h: Tensor | None,
    scalings: Sequence[float],
    indices: Tensor | None,
    segments: Sequence[int],
    seed: Tensor | None,
    threshold: int,
    backend: str,
    need_dx: bool,
) -> list[Tensor]:
    dx = g.new_empty((*g.shape[:-1], lora_As[0].shape[1]) if need_dx else 0)
    dAs = (like_or_empty(A, x is not None, g) for A in lora_As)
    return [dx, *dAs, *(like_or_empty(B, h is not None, g) for B in lora_Bs)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weights, spec, As, Bs, _, scalings, indices, segments, seed, threshold, backend, need_h = (
        inputs
    )
    x = x if any(A.requires_grad for A in As) else None  # needs_input_grad is flat here
    ctx.save_for_backward(x, output[1] if need_h else None, indices, seed, *weights, *As, *Bs)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.scalings, ctx.segments = spec, scalings, segments
    ctx.threshold, ctx.backend = threshold, backend


def _backward(ctx: Any, g: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    n = len(ctx.scalings)
    x, h, indices, seed, *tensors = ctx.saved_tensors
    weights, As, Bs = tensors[: -2 * n], tensors[-2 * n : -n], tensors[-n:]
    needs_x, _, _, needs_A, needs_B, needs_bias = ctx.needs_input_grad[:6]
    dx, *grads = lora_linear_multi_backward_op(
        g,
        x,
        weights,
        ctx.spec,
        As,
        Bs,
        h if any(needs_B) else None,
        ctx.scalings,
        indices,
        ctx.segments,
        seed,
        ctx.threshold,
        ctx.backend,
        needs_x,
    )
    return (
        dx if needs_x else None,
        [None] * len(weights),
        None,
        [dA if needs else None for dA, needs in zip(grads[:n], needs_A, strict=True)],
        [dB if needs else None for dB, needs in zip(grads[n:], needs_B, strict=True)],
        bias_gradient(g, needs_bias),
        *[None] * 2,
        None if ctx.segments else [],  # as the operator's arguments are nested
        *[None] * 4,
    )


register_autograd(lora_linear_multi_op, _backward, _setup_context)
