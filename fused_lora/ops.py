"""Registered operators, for what traces: torch.compile, torch.export, AOTInductor.

And for what watches operators in eager mode: dispatch modes (selective checkpointing can name them,
a FakeTensorMode runs their fakes) and `torch.func`'s transforms. Other eager calls go to
`LoRALinearFunction` itself, which costs no dispatch. The operators decide their plan when they run,
on real shapes: a graph with a dynamic M holds no decision that one M made. A base weight comes as
`packing.pack` makes it, plain or quantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from . import backends
from .autograd import bias_gradient
from .calls import Backend, checked_call
from .differentiable import differentiable
from .dispatch import Decision, Plan, plan, replays_of
from .kernels.dropout import Dropout, dropout_of
from .operators import fake, operator
from .outputs import like_or_empty, or_empty
from .packing import unpack
from .quantized_weight import Weight

if TYPE_CHECKING:
    from .kernels.replay import Replays


def _plan(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    backend: str,
) -> tuple[Plan, Replays | None]:
    call = checked_call(x, weight, lora_A, lora_B, bias, dropout is not None)
    chosen = plan(call, cast(Backend, backend))
    threshold = 0 if dropout is None else dropout.threshold
    return chosen, replays_of(x.shape, Decision(call, chosen, scaling, threshold))


@operator("lora_linear")
def lora_linear_op(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    scaling: float,
    seed: Tensor | None,
    threshold: int,
    backend: str,
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    """`lora_linear` with the dropout seed given. h [M, r] comes out empty unless it is needed."""
    (W,) = unpack(weight, spec)
    dropout = dropout_of(seed, threshold)
    options = (scaling, dropout)
    chosen, replays = _plan(x, W, lora_A, lora_B, bias, *options, backend)
    y, h = backends.forward(
        x, W, lora_A, lora_B, bias, *options, chosen, need_h=need_h, replays=replays
    )
    return y, or_empty(h, x)


@fake(lora_linear_op)
def _(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    scaling: float,
    seed: Tensor | None,
    threshold: int,
    backend: str,
    need_h: bool,
) -> tuple[Tensor, Tensor]:
    (W,) = unpack(weight, spec)
    y = x.new_empty((*x.shape[:-1], W.shape[0]))
    return y, x.new_empty((math.prod(x.shape[:-1]), lora_A.shape[0]) if need_h else 0)


@operator("lora_linear_backward")
def lora_linear_backward_op(
    g: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    scaling: float,
    seed: Tensor | None,
    threshold: int,
    backend: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., K], dA [r, K] and dB [N, r]; those that are not needed come out empty."""
    (W,) = unpack(weight, spec)
    dropout = dropout_of(seed, threshold)
    # g has y's M and dtype, which with the weights is all that the forward's plan depended on.
    like_x = g.new_empty(1).expand(*g.shape[:-1], W.shape[1])
    options = (scaling, dropout)
    chosen, replays = _plan(like_x, W, lora_A, lora_B, None, *options, backend)
    gradients = backends.backward(
        g, x, W, lora_A, lora_B, h, *options, chosen, need_dx=need_dx, replays=replays
    )
    dx, dA, dB = (or_empty(t, g) for t in gradients)
    return dx, dA, dB


@fake(lora_linear_backward_op)
def _(
    g: Tensor,
    x: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor | None,
    weight: Sequence[Tensor],
    spec: str,
    scaling: float,
    seed: Tensor | None,
    threshold: int,
    backend: str,
    need_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = g.new_empty((*g.shape[:-1], lora_A.shape[1]) if need_dx else 0)
    return dx, like_or_empty(lora_A, x is not None, g), like_or_empty(lora_B, h is not None, g)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, lora_A, lora_B, _, weight, spec, scaling, seed, threshold, backend, need_h = inputs
    needs_A = ctx.needs_input_grad[1]  # PyTorch counts here the tensors of weight one by one
    h = output[1] if need_h else None
    ctx.save_for_backward(x if needs_A else None, lora_A, lora_B, h, seed, *weight)
    ctx.set_materialize_grads(False)
    ctx.spec, ctx.scaling, ctx.threshold, ctx.backend = spec, scaling, threshold, backend


def _backward(ctx: Any, call: Callable[..., Any], g: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    x, lora_A, lora_B, h, seed, *weight = ctx.saved_tensors
    needs_x, needs_A, needs_B, needs_bias = ctx.needs_input_grad[:4]
    dx, dA, dB = call(
        g,
        x,
        lora_A,
        lora_B,
        h if needs_B else None,
        weight,
        ctx.spec,
        ctx.scaling,
        seed,
        ctx.threshold,
        ctx.backend,
        needs_x,
    )
    return (
        dx if needs_x else None,
        dA if needs_A else None,
        dB if needs_B else None,
        bias_gradient(g, needs_bias),
        [None] * len(weight),
        *[None] * 6,
    )


LoRALinearOpFunction: Any = differentiable(
    lora_linear_op, lora_linear_backward_op, _setup_context, _backward
)
