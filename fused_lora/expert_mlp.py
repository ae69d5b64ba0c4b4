"""A whole mixture of experts as one node of the graph: tokens to experts and back.

    z = x W_up^T (+ adapter), a = act(z), o = a W_down^T (+ adapter), y[t] = sum_j p[t, j] o[t, j]

z and a are in the experts' order, x, o and y in the tokens', and nothing is moved in between. Of a
row of the order z alone is kept for the backward (on PyTorch's path act(gate) too): a is made
again, and o is not needed (see expert_combine.py). What traces or watches operators gets two of
them, with the middle as the graph's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import expert_ops
from .autocast import no_autocast
from .autograd import Codes, as_saved, check_first_derivative, to_save
from .backends import as_gradient
from .calls import Backend
from .expert_backends import Path, backward, project
from .expert_calls import (
    Routing,
    call_of,
    check_indices,
    checked,
    path_of,
    routing_of,
)
from .expert_combine import Passed, combine_backward, dots_of, project_combined
from .expert_middle import Middle
from .expert_stack import Experts, Projection, laid_out
from .observed import check_frozen, is_observed, is_recorded
from .quantized_weight import Weight


class ExpertsMLP(NamedTuple):
    """All of a call but its tensors."""

    path: Path
    routing: Routing
    middle: Middle
    scaling_up: float
    scaling_down: float

    def layers(
        self, dtype: torch.dtype, first: Projection, last: Projection
    ) -> tuple[Experts, Experts]:
        """As the products read them."""
        rows, k = self.routing.groups, self.routing.shape[-1]
        up, down = (Experts.of(layer, dtype, None, rows) for layer in (first, last))
        return up._replace(fan=k, scatters=False), down._replace(gathers=False, fan_g=k)


class LoRAExpertsMLPFunction(torch.autograd.Function):
    """x [T, hidden] and p [T, k] -> y [T, hidden], which is x's dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        p: Tensor,
        up: Weight,
        down: Weight,
        up_A: Tensor | None,
        up_B: Tensor | None,
        down_A: Tensor | None,
        down_B: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        call: ExpertsMLP,
    ) -> Tensor:
        """The weights [E, out, in], the adapters as `ExpertAdapter` has them, biases [E, out].

        Weights of another dtype than x's are cast, here and in the backward.
        """
        needs_x, needs_p, _, _, needs_up_A, needs_up_B, needs_down_A, needs_down_B = (
            ctx.needs_input_grad[:8]
        )
        first = Projection(up, up_bias, up_A, up_B, call.scaling_up)
        last = Projection(down, down_bias, down_A, down_B, call.scaling_down)
        layers = call.layers(x.dtype, first, last)
        y, z, (a, acted), h_up, h_down = _forward(x, p, *layers, up_bias, down_bias, call)
        needs_dz = needs_x or needs_up_A or needs_up_B
        ctx.save_for_backward(
            x if needs_up_A else None,
            p,
            to_save(up),
            to_save(down),
            up_A,
            up_B,
            down_A,
            down_B,
            down_bias if needs_p else None,
            z if needs_dz else None,
            acted if needs_dz else None,
            a if not needs_dz and (needs_p or needs_down_A) else None,
            h_up if needs_up_B else None,
            h_down if needs_down_B else None,
        )
        ctx.call, ctx.codes = call, (Codes.of(up), Codes.of(down))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        check_first_derivative("a fused mixture of experts", "lora_linear_experts")
        x, p, *weights, up_A, up_B, down_A, down_B, down_bias, z, acted, a, h_up, h_down = (
            ctx.saved_tensors
        )
        needs_x, needs_p, _, _, _, _, needs_down_A, _ = ctx.needs_input_grad[:8]
        call: ExpertsMLP = ctx.call
        path, experts = call.path, call.routing.experts
        g = as_gradient(g, path)
        up_weight, down_weight = map(as_saved, weights, ctx.codes)
        first = Projection(up_weight, None, up_A, up_B, call.scaling_up)
        last = Projection(down_weight, down_bias, down_A, down_B, call.scaling_down)
        up, down = call.layers(g.dtype, first, last)
        dx = dA_up = dB_up = None

        def middle(da: Tensor | None, p_rows: Tensor) -> Passed:
            if z is None or da is None:
                dots = dots_of(da, a) if needs_p and da is not None else None
                return Passed(a, dots, None)
            needs = {"need_a": needs_down_A, "need_dots": needs_p}
            return call.middle.passed(path, z, acted, da, p_rows, **needs)

        with no_autocast(g):
            operands = (g, p, down, down_bias, h_down, experts, middle)
            needs_da = z is not None or needs_p
            dz, dp, dA_down, dB_down = combine_backward(
                path, *operands, need_da=needs_da, need_dA=needs_down_A
            )
            if dz is not None:
                dx, dA_up, dB_up = backward(path, dz, x, h_up, up, need_dx=needs_x)
        return dx, dp, None, None, dA_up, dB_up, dA_down, dB_down, None, None, None


def _forward(
    x: Tensor,
    p: Tensor,
    up: Experts,
    down: Experts,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    call: ExpertsMLP,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None], Tensor | None, Tensor | None]:
    """y, z, a with what the middle keeps, and h of both projections."""
    with no_autocast(x):
        z, h_up = project(call.path, x, up, up_bias)
        a, acted = call.middle.forward(call.path, z)
        y, h_down = project_combined(call.path, a, p, down, down_bias)
    return y, z, (a, acted), h_up, h_down


def run_projections(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    first: Projection,
    last: Projection,
    middle: Middle,
    backend: Backend = "auto",
) -> Tensor:
    """y [T, hidden] of x [T, hidden] for a router's choice, top_k_index and top_k_weights [T, k].

    Raises what `lora_linear_experts` does.
    """
    check_indices(x, top_k_index)
    indexed, M = top_k_index.shape, top_k_index.numel()
    cast, first, _, k = checked(x, first, indexed, 0.0, backend)
    a = cast.new_empty(1).expand(*indexed, last.weight.shape[2])  # like it
    _, last, _, _ = checked(a, last, indexed, 0.0, backend)
    of_first, of_last = (layer.weight.shape[0] for layer in (first, last))
    if of_first != of_last:
        got = f"weights of {of_first} and {of_last} experts"
        raise ValueError(f"first, last: got {got}, wanted as many of both")
    routing = routing_of(top_k_index, of_first)
    if is_observed():
        check_frozen(first.weight)
        check_frozen(last.weight)
        z = expert_ops.call(cast, first, routing, backend, fan=k, scatters=False)
        y = expert_ops.call_combine(middle.traced(z), top_k_weights, last, routing, backend)
        return y.to(x.dtype)
    calls = (call_of(cast, first, M, dropout=False), call_of(a, last, M, dropout=False))
    paths = [path_of(call, backend) for call in calls]
    path: Path = "triton" if paths == ["triton", "triton"] else "torch"
    first, last = laid_out(first), laid_out(last)
    how = ExpertsMLP(path, routing, middle, first.scaling, last.scaling)
    if is_recorded():
        apply: Any = LoRAExpertsMLPFunction.apply
        adapters = (first.lora_A, first.lora_B, last.lora_A, last.lora_B)
        tensors = (first.weight, last.weight, *adapters, first.bias, last.bias)
        y = apply(cast, top_k_weights, *tensors, how)
    else:
        layers = how.layers(cast.dtype, first, last)
        y = _forward(cast, top_k_weights, *layers, first.bias, last.bias, how)[0]
    return y.to(x.dtype)
