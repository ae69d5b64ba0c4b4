"""`lora_linear_experts`: a mixture of experts, each with a frozen weight and an adapter of its own.

The experts of a model are one tensor [E, N, K], and each row of the batch goes to some of them.
Nothing of the weights' size is made: W_e + scaling * B_e A_e of all experts, as PEFT has it, would
be a second copy of them in every forward, kept for the backward, and their whole gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import expert_ops
from .autograd import Codes, as_saved, check_first_derivative, to_save
from .backends import as_gradient, as_matrix
from .calls import Backend
from .dispatch import multiplied_in_fp32, why_torch
from .expert_backends import Path, backward, project, reads_codes
from .expert_calls import (
    Routing,
    call_of,
    check_indices,
    checked,
    path_of,
    routing_of,
)
from .expert_stack import Experts, Projection, laid_out
from .explanation import Explanation, describe_fp32, describe_quantized
from .kernels.dropout import dropout_of
from .observed import check_frozen, is_observed, is_recorded
from .quantized_weight import QuantizedWeight, Weight
from .seeds import draw_seeds


class LoRALinearExpertsFunction(torch.autograd.Function):
    """`LoRALinearFunction` with each row's own expert: x -> y [*indices.shape, N].

    Saves x, h [M, r], the weights and the dropout seed: not x in the experts' order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        threshold: int,
        call: ExpertsCall,
    ) -> Tensor:
        """``seed``: of the dropout mask."""
        needs_x, _, needs_A, needs_B = ctx.needs_input_grad[:4]
        layer = Projection(weight, bias, lora_A, lora_B, call.scaling)
        y, h = _forward(x, call.experts(layer, x.dtype, seed, threshold), bias, call)
        ctx.save_for_backward(
            x if needs_A else None,
            to_save(weight),
            lora_A,
            lora_B,
            h if needs_B else None,
            seed if needs_x or needs_A else None,
        )
        ctx.call, ctx.threshold, ctx.shape = call, threshold, x.shape
        ctx.codes = Codes.of(weight)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        check_first_derivative("lora_linear_experts")
        x, weight, lora_A, lora_B, h, seed = ctx.saved_tensors
        call, needs_x = ctx.call, ctx.needs_input_grad[0]
        layer = Projection(as_saved(weight, ctx.codes), None, lora_A, lora_B, call.scaling)
        dtype = g.dtype if needs_x else layer.weight.dtype  # else nobody reads a cast one
        experts = call.experts(layer, dtype, seed, ctx.threshold)
        g2, x2 = as_gradient(g, call.path), None if x is None else as_matrix(x)
        dx, dA, dB = backward(call.path, g2, x2, h, experts, need_dx=needs_x)
        return None if dx is None else dx.view(ctx.shape), None, dA, dB, *[None] * 4


@dataclass(frozen=True)
class ExpertsCall:
    """A call's decision, and how its rows lie."""

    path: Path
    routing: Routing
    scaling: float
    fan: int

    def experts(
        self, layer: Projection, dtype: torch.dtype, seed: Tensor | None, threshold: int
    ) -> Experts:
        """As the products read it."""
        dropout, rows = dropout_of(seed, threshold), self.routing.groups
        return Experts.of(layer, dtype, dropout, rows)._replace(fan=self.fan)


def _forward(
    x: Tensor, layer: Experts, bias: Tensor | None, call: ExpertsCall
) -> tuple[Tensor, Tensor | None]:
    y, h = project(call.path, as_matrix(x), layer, bias)
    return y.resize_(*call.routing.shape, y.shape[-1]), h  # not view(): see multi_backends.forward


def lora_linear_experts(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *,
    expert_indices: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """y = x W_e^T + bias_e + scaling * (D o x) A_e^T B_e^T, with e the expert of each row.

    A layer of a mixture of experts, as by `lora_linear` for each of them. Nothing waits for a GPU
    that runs the kernels; PyTorch's path does, for how many rows each expert has.

    Args:
        x: [*I, K] for expert_indices [*I]; or [*I[:-1], K], where each row goes to all experts
            that I's last dimension lists for it (a router's top k), and D is one mask for them.
        weight: frozen base weights [E, N, K] in x's dtype, any strides; transformers' layers with
            ``is_transposed`` pass theirs as ``weight.mT``. Or a `QuantizedWeight` [E, N, K], of
            which tiles of values are there at a time; on a GPU, where its experts have many rows,
            all of them, in a scratch tensor that the call drops again.
        lora_A, lora_B: the experts' adapters [E, r, K] and [E, N, r], in any floating dtype, or
            both None: the frozen layer. Not contiguous ones are copied.
        expert_indices: integers [*I] on x's device. Any but 0 to E - 1 is no expert, and its row of
            y zeros, as expert parallelism has it for the experts of others.
        scaling, dropout_p, backend: as for `lora_linear`.
        bias: frozen, [E, N] in x's dtype.

    Returns:
        y [*I, N] in x's dtype (under autocast: in the autocast dtype), contiguous. The gradient of
        an expert's adapter without rows is zero.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, shape, dtype, device or range.
        RuntimeError: ``backend="triton"`` where the kernels cannot run.
    """
    check_indices(x, expert_indices)
    layer = Projection(weight, bias, lora_A, lora_B, scaling)
    x, layer, threshold, fan = checked(x, layer, expert_indices.shape, dropout_p, backend)
    routing = routing_of(expert_indices, weight.shape[0])
    seed = draw_seeds(1, x.device, backend) if threshold else None
    if is_observed():
        check_frozen(weight)
        dropout: Any = {"seed": seed, "threshold": threshold}
        y2 = expert_ops.call(as_matrix(x), layer, routing, backend, fan=fan, **dropout)
        return y2.view(*expert_indices.shape, y2.shape[1])
    call = call_of(x, layer, expert_indices.numel(), dropout=threshold > 0)
    decided = ExpertsCall(path_of(call, backend), routing, float(scaling), fan)
    layer = laid_out(layer)
    if not is_recorded():
        return _forward(x, decided.experts(layer, x.dtype, seed, threshold), layer.bias, decided)[0]
    apply: Any = LoRALinearExpertsFunction.apply
    operands = (x, weight, layer.lora_A, layer.lora_B, layer.bias)
    y: Tensor = apply(*operands, seed, threshold, decided)
    return y


def explain_experts(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    *,
    expert_indices: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: Backend = "auto",
) -> Explanation:
    """Which backend `lora_linear_experts` takes for these arguments, and why not the other.

    Takes and raises what it does; computes nothing.
    """
    check_indices(x, expert_indices)
    layer = Projection(weight, bias, lora_A, lora_B, scaling)
    found = checked(x, layer, expert_indices.shape, dropout_p, backend)
    rows = expert_indices.numel()
    call = call_of(found.x, found.layer, rows, dropout=found.threshold > 0)
    path = path_of(call, backend)
    if path == "torch":
        reasons = {
            "triton": f"not taken: {why_torch(call, backend)}",
            "library": "taken: rows of some experts at a time, F.grouped_mm or a product for each",
        }
        if multiplied_in_fp32(replace(call, M=-(-rows // weight.shape[0]))):  # an expert's rows
            reasons["fp32"] = describe_fp32(call.dtype)
        chosen = Explanation("torch", "library", "library", reasons)
    else:
        reasons = {
            "torch": "not taken: the kernels take this call",
            "split": "taken: h of all experts, then one launch for all, which gathers and scatters",
        }
        chosen = Explanation("triton", "split", "split", reasons)
    if isinstance(weight, QuantizedWeight):
        in_loop = reads_codes(weight, rows, found.x)
        reasons["quantised W0"] = describe_quantized(call, path, in_loop)
    return chosen
