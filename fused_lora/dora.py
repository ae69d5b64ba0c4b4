"""`DoRALinearFunction`, and what it makes of the norm of each row of W0 + scaling * B A.

    y = c o z + bias    z = x W0^T + scaling * x A^T B^T [M, N], c = m / norm [N]
    dm = sum_M g o z / norm, and with g' = c o g the gradients of x, A and B are LoRA's

z is the one [M, N] tensor that this library saves, and only where m trains. Making it again in
backward would be a third product with W0, half as much work again in training; the adapter's r
columns cannot give it. y instead would cost nothing where the next layer keeps it anyway, but gives
no z where c is 0, loses its digits where the bias is large, and must then not be changed in place.
PEFT saves the base's product and the adapter's, and a third for their sum. g' lives during backward
only: the kernels could put c on each tile of g instead, and their products would wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import backends
from .autograd import Codes, as_saved, bias_gradient, check_first_derivative, to_save
from .dispatch import Plan
from .quantized_weight import Weight

if TYPE_CHECKING:
    from .kernels.replay import Replays


def column_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """c = m / norm [N] in the norm's dtype."""
    return (magnitude / norm).to(norm.dtype)


def over_norm(magnitude: Tensor, norm: Tensor) -> Tensor:
    """The same for a norm that is 0 for rows of zeros."""
    return column_scale(magnitude, norm.masked_fill(norm == 0, torch.inf))


def gradients(
    g: Tensor,
    x: Tensor | None,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    h: Tensor | None,
    z: Tensor | None,
    scaling: float,
    plan: Plan,
    *,
    need_dx: bool,
    replays: Replays | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and dm for g = dL/dy: dA iff x is given, dB iff h is given, dm iff z is given."""
    tensors = (g, x, weight, lora_A, lora_B, column_scale(magnitude, norm), h, z)
    dx, dA, dB, dot = backends.dora_backward(
        *tensors, scaling, plan, need_dx=need_dx, replays=replays
    )
    dm = None if dot is None else (dot / norm).to(magnitude.dtype)
    return dx, dA, dB, dm


class DoRALinearFunction(torch.autograd.Function):
    """y = m / norm o (x W0^T + scaling * x A^T B^T) + bias with gradients for x, A, B, m and bias.

    The norm is a constant to the gradient (https://arxiv.org/abs/2402.09353, sec. 4.3). Saves x, h
    [M, r], the weights, and z [M, N] if m trains. Differentiable once. `dora_linear` is the checked
    way in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        bias: Tensor | None,
        scaling: float,
        plan: Plan,
        replays: Replays | None,
    ) -> Tensor:
        """As `LoRALinearFunction`, with magnitude and norm [N]; norm in fp32 or better."""
        needs_x, _, needs_A, needs_B, needs_m = ctx.needs_input_grad[:5]
        y, h, z = backends.dora_forward(
            x,
            weight,
            lora_A,
            lora_B,
            column_scale(magnitude, norm),
            bias,
            scaling,
            plan,
            need_h=needs_B,
            need_z=needs_m,
            replays=replays,
        )
        ctx.save_for_backward(
            x if needs_A else None,
            to_save(weight) if needs_x else None,
            lora_A,
            lora_B,
            magnitude,
            norm,
            h,
            z,
        )
        ctx.quantized = Codes.of(weight) if needs_x else None
        ctx.scaling, ctx.plan, ctx.replays = scaling, plan, replays
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        check_first_derivative("dora_linear")
        x, weight, lora_A, lora_B, magnitude, norm, h, z = ctx.saved_tensors
        dx, dA, dB, dm = gradients(
            g,
            x,
            as_saved(weight, ctx.quantized),
            lora_A,
            lora_B,
            magnitude,
            norm,
            h,
            z,
            ctx.scaling,
            ctx.plan,
            need_dx=ctx.needs_input_grad[0],
            replays=ctx.replays,
        )
        dbias = bias_gradient(g, ctx.needs_input_grad[6])
        return dx, None, dA, dB, dm, None, dbias, None, None, None
