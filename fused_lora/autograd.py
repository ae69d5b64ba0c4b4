"""`LoRALinearFunction` and `lora_linear`, its checked entry point."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, torch_backend
from .dispatch import Backend, Call, Explanation, Plan, describe, explain_call, plan
from .kernels.dropout import Dropout, dropout_threshold


def _as_matrix(t: Tensor) -> Tensor:
    """[..., C] -> [M, C], a view wherever the strides allow one; sizes of 0 too."""
    return t.flatten(0, -2) if t.ndim > 1 else t.unsqueeze(0)


class LoRALinearFunction(torch.autograd.Function):
    """y = x W0^T + bias + scaling * (D o x) A^T B^T with gradients for x, A, B and bias.

    Saves x, h [M, r], the weights and the dropout seed: no mask, no dropped copy of x, nothing of
    size [M, N]. Computes the gradients that `needs_input_grad` asks for and no others; W0 is
    frozen and gets none. Differentiable once: backward raises RuntimeError under
    ``create_graph=True``. `lora_linear` is the checked way in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
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
        mask; None is no dropout. ``plan``: from `dispatch.plan`.
        """
        x2 = _as_matrix(x)
        dropout = Dropout(seed, threshold) if seed is not None else None
        needs_x, _, needs_A, needs_B = ctx.needs_input_grad[:4]
        arguments = (x2, weight, lora_A, lora_B, bias, scaling, dropout)
        h: Tensor | None
        if plan.backend == "triton":
            from . import triton_backend

            y, h = triton_backend.forward(*arguments, plan.strategy, need_h=needs_B)
        else:
            y, h = torch_backend.forward(*arguments)
        ctx.save_for_backward(
            x if needs_A else None,
            weight if needs_x else None,
            lora_A,
            lora_B,
            h if needs_B else None,
            seed if needs_x or needs_A else None,
        )
        ctx.scaling, ctx.threshold, ctx.plan, ctx.x_shape = scaling, threshold, plan, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        # `once_differentiable` would let this pass where only A and B depend on the second
        # derivative, and leave their share out of it.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "lora_linear: its gradients cannot be differentiated again (create_graph=True); "
                "fused_lora.reference.lora_linear can"
            )
        x, weight, lora_A, lora_B, h, seed = ctx.saved_tensors
        needs_x, _, needs_A, _, needs_bias = ctx.needs_input_grad[:5]
        g2 = _as_matrix(g)
        x2 = _as_matrix(x) if needs_A else None
        dropout = Dropout(seed, ctx.threshold) if seed is not None else None
        arguments = (g2, x2, weight, lora_A, lora_B, h, ctx.scaling, dropout)
        if ctx.plan.backend == "triton":
            from . import triton_backend

            dx, dA, dB = triton_backend.backward(*arguments, ctx.plan.strategy_dx, need_dx=needs_x)
        else:
            dx, dA, dB = torch_backend.backward(*arguments, need_dx=needs_x)
        dx = dx.view(ctx.x_shape) if dx is not None else None
        dbias = g2.sum(0) if needs_bias else None
        return dx, None, dA, dB, dbias, None, None, None, None


def _checked_call(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor | None, Call]:
    """x, weight and bias as autocast wants them, and the call they make; raises if it is invalid.

    Under autocast the three are cast as `F.linear`'s would be. The adapters are not: both backends
    take them in any dtype, so that fp32 adapters get fp32 gradients.
    """
    checks.check_backend(backend)
    checks.check_number("scaling", scaling)
    checks.check_dropout("dropout_p", dropout_p)
    if isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (_autocast(tensor, dtype) for tensor in (x, weight, bias))
    checks.check_tensors(x, weight, lora_A, lora_B, bias)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight: requires a gradient, but LoRA's base weight is frozen and gets none; "
            "call weight.requires_grad_(False) or pass weight.detach()"
        )
    dropout = dropout_threshold(dropout_p) > 0
    return x, weight, bias, describe(x, weight, lora_A, lora_B, bias, dropout)


def _autocast(tensor: Any, dtype: torch.dtype) -> Any:
    eligible = isinstance(tensor, Tensor) and tensor.is_floating_point()
    return tensor.to(dtype) if eligible and tensor.dtype != torch.float64 else tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """y = x W0^T + bias + scaling * (D o x) A^T B^T (LoRA, https://arxiv.org/abs/2106.09685).

    Args:
        x: input [..., K], floating point, any strides.
        weight: frozen base weight W0 [N, K] in x's dtype, any strides. Gets no gradient.
        lora_A, lora_B: adapter [r, K] and [N, r], in any floating dtype; they are multiplied in
            x's dtype with fp32 accumulation, as under autocast, and their gradients have their own
            dtype. No copy of x is made for fp32 adapters over a bf16 x.
        scaling: alpha / r (rsLoRA: alpha / sqrt(r)); finite. Not differentiated.
        bias: [N] in x's dtype, or None; trainable if it requires a gradient.
        dropout_p: probability in [0, 1) of dropping an element of the adapter's input, rounded to
            a multiple of 2^-16. Applied whenever it is not 0; the seed comes from torch's generator
            for x's device, and the mask is the same on every backend.
        backend: "triton" (raises if the kernels cannot take the call), "torch", or "auto".

    Returns:
        y [..., N] in x's dtype (under autocast: in the autocast dtype), contiguous.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    x, weight, bias, call = _checked_call(
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, backend
    )
    chosen = plan(call, backend)
    seed = None
    if call.dropout:
        seed = torch.empty(1, dtype=torch.int64, device=x.device).random_()
    y: Tensor = LoRALinearFunction.apply(
        x,
        weight,
        lora_A,
        lora_B,
        bias,
        float(scaling),
        seed,
        dropout_threshold(dropout_p),
        chosen,
    )
    return y


def explain(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Explanation:
    """Which backend and strategy `lora_linear` takes for these arguments, and why not the others.

    Takes and raises what `lora_linear` does; computes nothing. ``print`` the result to read it.
    """
    *_, call = _checked_call(x, weight, lora_A, lora_B, scaling, bias, dropout_p, backend)
    return explain_call(call, backend)
