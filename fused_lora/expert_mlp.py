"""A whole mixture of experts, as transformers has it: tokens to experts and back, adapters on the way.

transformers keeps all experts of a layer in one module: ``gate_up_proj`` (or ``up_proj``) and
``down_proj``, each [E, out, in], or [E, in, out] where ``is_transposed`` says so. What the module's
class computes is one function whichever of transformers' implementations runs it, and so is this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calls import Backend
from .experts import Routing, call_experts, routing_of

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class ExpertAdapter(NamedTuple):
    """Of one projection: A [E, r, in], B [E, out, r], any strides."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def obstacle(experts: nn.Module) -> str | None:
    """Why a module is not such a mixture; None if it is."""
    if not all(hasattr(experts, name) for name in ("_is_expert_parallel", "has_gate", "has_bias")):
        return f"{type(experts).__name__} is not of transformers' experts interface"
    if getattr(experts, "has_post_expert_norm", False):
        return f"{type(experts).__name__} has a norm after each expert"
    return None


def first_projection(experts: Any) -> str:
    """The name of the projection that x goes to."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def run_experts(
    experts: Any,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: dict[str, ExpertAdapter],
    backend: Backend = "auto",
) -> Tensor:
    """What ``experts(x, top_k_index, top_k_weights)`` is with ``adapters``, by projections' names.

    x [T, hidden], top_k_index and top_k_weights [T, k].
    """
    routing = routing_of(top_k_index, experts.num_experts)
    up, down = first_projection(experts), "down_proj"
    made = _project(experts, up, x, adapters, routing, backend, scatters=False)
    acted = experts._apply_gate(made) if experts.has_gate else experts.act_fn(made)
    del made  # autograd keeps what it needs of it
    out = _project(experts, down, acted, adapters, routing, backend, gathers=False)
    return combined(out, top_k_weights).to(x.dtype)


def _project(
    experts: Any,
    name: str,
    x: Tensor,
    adapters: dict[str, ExpertAdapter],
    routing: Routing,
    backend: Backend,
    **rows: bool,
) -> Tensor:
    weight = getattr(experts, name)
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    adapter = adapters.get(name)
    A, B, scaling = adapter or (None, None, 1.0)
    w = weight.mT if experts.is_transposed else weight
    how: Any = {"scaling": scaling, "bias": bias, "backend": backend, **rows}
    return call_experts(x, w, A, B, routing, **how)


def combined(out: Tensor, top_k_weights: Tensor) -> Tensor:
    """sum_j top_k_weights[t, j] * out[t, j], [T, N] of out [T, k, N]."""
    if top_k_weights.dtype != out.dtype:
        return (out * top_k_weights[..., None]).sum(1)
    return torch.bmm(top_k_weights[:, None], out)[:, 0]
