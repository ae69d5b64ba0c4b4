"""PEFT's adapters on a mixture of experts (``target_parameters``), on the fused path.

PEFT wraps the module of all experts once for each projection that has an adapter, and in every call
makes W + scaling * B A of all experts. Here the outermost of these wrappers computes the module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import layer as peft_lora
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import checks, expert_modules
from .calls import Backend
from .expert_modules import (
    explain_experts_module,
    is_taken,
    misfit,
    projections,
    routed,
    run_experts,
)
from .expert_stack import ExpertAdapter
from .explanation import Explanation


class ExpertsState(NamedTuple):
    """A wrapper, as it is now, whose module the fused path can compute."""

    experts: nn.Module
    adapters: dict[str, ExpertAdapter]


class FusedPeftExperts(peft_lora.ParamWrapper):  # type: ignore[misc]  # peft is untyped
    """`peft.tuners.lora.ParamWrapper` of a mixture of experts on the fused path."""

    fused_lora_backend: Backend = "auto"

    def _get_name(self) -> str:
        """In the model's repr."""
        return "FusedPeftExperts"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [T, hidden], and a router's choice: what the module of experts takes and gives."""
        y: Tensor | None = _fused(self, x, routed(*args, **kwargs))
        if y is None:
            y = super().forward(x, *args, **kwargs)
        return y

    def explain(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Explanation:
        """Which backend `forward` takes, and why, or why it is PEFT's own. Computes nothing."""
        found: Any = look(self)
        if not isinstance(found, str):
            found = misfit(found.experts, x, top_k_index, top_k_weights) or found
        if isinstance(found, str):
            reasons = {"fused": f"not taken: {found}", "peft": "taken: PEFT's own forward"}
            return Explanation("torch", "peft", "peft", reasons)
        how = (found.adapters, self.fused_lora_backend)
        return explain_experts_module(found.experts, x, top_k_index, *how)


# By this name PEFT knows what to put another adapter into; pickles go by __qualname__.
FusedPeftExperts.__name__ = "ParamWrapper"


def _fused(layer: FusedPeftExperts, x: Any, choice: tuple[Any, Any] | None) -> Tensor | None:
    """The output, if the fused path takes the call."""
    found = look(layer)
    if isinstance(found, str) or choice is None or misfit(found.experts, x, *choice) is not None:
        return None
    return run_experts(found.experts, x, *choice, found.adapters, layer.fused_lora_backend)


def wrappers(layer: nn.Module) -> Iterator[Any]:
    """The wrapper and those inside of it, down to the module."""
    while isinstance(layer, peft_lora.ParamWrapper):
        yield layer
        layer = layer.base_layer


def obstacle(layer: peft_lora.ParamWrapper) -> str | None:
    """Why PEFT's own forward runs now; None if the fused path takes it."""
    found = look(layer)
    return found if isinstance(found, str) else None


# Of what does not change in a compiled model.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _obstacle(experts: nn.Module) -> str | None:
    return expert_modules.obstacle(experts)


def look(layer: Any) -> ExpertsState | str:
    """What the wrapper's call depends on, or why it is for PEFT's own forward."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return "it is traced by torch.jit"
    if forward_ad._current_level >= 0:
        return "it is differentiated in forward mode"
    chain = list(wrappers(layer))
    experts: Any = chain[-1].base_layer
    why: str | None = _obstacle(experts)
    if why is not None:
        return why
    known = projections(experts)
    if checks.all_are_hooked():
        return "there are hooks on all modules"
    if any(checks.is_hooked(module) for module in (*chain[1:], experts)):
        return "its experts have hooks"
    for name, parameter in experts.named_parameters():
        if parameter.requires_grad and torch.is_grad_enabled():
            return f"its {name} requires a gradient"
    adapters: dict[str, ExpertAdapter] = {}
    for wrapper in chain:
        name = wrapper.parameter_name
        if name not in known or name in adapters:
            return f"it adapts {name}, which is none of {' and '.join(known)}, or twice"
        found = _adapter(wrapper)
        if isinstance(found, str):
            return found
        adapters[name] = found
    return ExpertsState(experts, adapters)


def _adapter(wrapper: Any) -> ExpertAdapter | str:
    """The active adapters' of a wrapper, as one."""
    if wrapper.disable_adapters:
        return "its adapters are disabled"
    if wrapper.merged:
        return "its adapters are merged"
    found: list[ExpertAdapter] = []
    for name in wrapper.active_adapters:
        if name not in wrapper.lora_A:
            continue
        A, B, scaling = wrapper.lora_A[name], wrapper.lora_B[name], wrapper.scaling[name]
        if type(A) is not nn.Linear or type(B) is not nn.Linear or B.bias is not None:
            return f"adapter {name!r} is made of {A} and {B}"
        if checks.is_hooked(A) or checks.is_hooked(B):
            return f"adapter {name!r} has hooks"
        sides, ranks = (A.weight, B.weight), wrapper.r[name] * wrapper.num_experts
        if not all(is_taken(t) and t.ndim == 2 for t in sides):  # sharded, or gathered elsewhere
            return f"adapter {name!r} is made of {type(A.weight).__name__}s of other shapes"
        if len(A.weight) != ranks or B.weight.shape[1] != ranks:
            return f"adapter {name!r} is not of {wrapper.num_experts} experts' ranks"
        number = isinstance(scaling, (int, float)) and not isinstance(scaling, bool)
        if not number or not abs(scaling) < math.inf:
            return f"adapter {name!r} has {scaling!r} for its scaling, not a finite number"
        found.append(ExpertAdapter.of(A.weight, B.weight, wrapper.num_experts, scaling))
    if not found:
        return "none of its adapters is active"
    if len(found) == 1:
        return found[0]
    lora_A = torch.cat([each.lora_A for each in found], dim=1)
    lora_B = torch.cat([each.lora_B * each.scaling for each in found], dim=2)
    return ExpertAdapter(lora_A, lora_B, 1.0)
