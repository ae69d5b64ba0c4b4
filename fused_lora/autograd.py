"""`LoRALinearFunction`: forward and backward of a LoRA layer as one node of the graph."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from . import backends
from .dispatch import Plan
from .kernels.dropout import Dropout
from .quantize import QuantizedWeight


def raise_second_derivative() -> NoReturn:
    """The RuntimeError that second derivatives get."""
    raise RuntimeError(
        "lora_linear: its gradients cannot be differentiated again (create_graph=True); "
        "fused_lora.reference.lora_linear's can"
    )


class LoRALinearFunction(torch.autograd.Function):
    """y = x W0^T + bias + scaling * (D o x) A^T B^T with gradients for x, A, B and bias.

    Saves x, h [M, r], the weights and the dropout seed (on a CPU the mask, a byte an element): no
    dropped copy of x, nothing of size [M, N]. Computes the gradients that `needs_input_grad` asks
    for and no others; W0 is frozen and gets none. Differentiable once: backward raises RuntimeError
    under ``create_graph=True``. `lora_linear` is the checked way in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | QuantizedWeight,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        seed: Tensor | None,
        threshold: int,
        plan: Plan,
    ) -> Tensor:
        """x [..., K], weight [N, K], lora_A [r, K], lora_B [N, r], bias [N] or None -> y [..., N].

        ``seed`` (int64, one element, on x's device) and ``threshold`` (p * 2^16) make the dropout
        mask, or on PyTorch's path ``seed`` is the mask [M, K], bool; None is no dropout. ``plan``:
        from `dispatch.plan`.
        """
        dropout = Dropout(seed, threshold) if seed is not None else None
        needs_x, _, needs_A, needs_B = ctx.needs_input_grad[:4]
        y, h = backends.forward(
            x, weight, lora_A, lora_B, bias, scaling, dropout, plan, need_h=needs_B
        )
        ctx.save_for_backward(
            x if needs_A else None,
            weight if needs_x and isinstance(weight, Tensor) else None,
            lora_A,
            lora_B,
            h,
            seed if needs_x or needs_A else None,
        )
        ctx.quantized = weight if needs_x and isinstance(weight, QuantizedWeight) else None
        ctx.scaling, ctx.threshold, ctx.plan = scaling, threshold, plan
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        # `once_differentiable` would let this pass where only A and B depend on the second
        # derivative, and leave their share out of it.
        if torch.is_grad_enabled():
            raise_second_derivative()
        x, weight, lora_A, lora_B, h, seed = ctx.saved_tensors
        dropout = Dropout(seed, ctx.threshold) if seed is not None else None
        dx, dA, dB = backends.backward(
            g,
            x,
            weight if ctx.quantized is None else ctx.quantized,
            lora_A,
            lora_B,
            h,
            ctx.scaling,
            dropout,
            ctx.plan,
            need_dx=ctx.needs_input_grad[0],
        )
        dbias = g.sum_to_size(g.shape[-1:]) if ctx.needs_input_grad[4] else None
        return dx, None, dA, dB, dbias, None, None, None, None
