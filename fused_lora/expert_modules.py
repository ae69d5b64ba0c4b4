"""transformers' modules of experts: what is in them, and what they compute with adapters.

transformers keeps all experts of a layer in one module: ``gate_up_proj`` (or ``up_proj``) and
``down_proj``, each [E, out, in], or [E, in, out] where ``is_transposed`` says so. What the module's
class computes is one function whichever of transformers' implementations runs it, and so is this.
Weights in codes are [E, out, in] in all of them, each a submodule of the parameter's name.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks
from .autocast import autocast_enabled, no_autocast
from .calls import Backend, are_plain
from .codes import Format
from .expert_middle import Middle
from .expert_mlp import run_projections
from .expert_stack import ExpertAdapter, Projection
from .experts import explain_experts
from .explanation import Explanation
from .gated_mlp import activation_of
from .observed import is_observed
from .paths import in_any_layer
from .quantize import Quantizer, quantize
from .quantized_weight import QuantizedWeight, Weight
from .sharded import is_sharded


def projections(experts: Any) -> tuple[str, str]:
    """The names of a module's two."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def in_order(experts: Any) -> list[str]:
    """Their names, in the order that the module has them."""
    return [n for n in (*experts._parameters, *experts._modules) if n in projections(experts)]


def obstacle(experts: Any) -> str | None:
    """Why a module is no such mixture, or has a part that nobody would hear of; None if it is."""
    name = type(experts).__name__
    if not all(hasattr(experts, flag) for flag in ("_is_expert_parallel", "has_gate", "has_bias")):
        return f"a {name} is no mixture of experts (by transformers' experts interface)"
    if getattr(experts, "has_post_expert_norm", False):
        return f"{name} has a norm after each expert"
    if getattr(type(experts).forward, "__code__", None) is not _moe().forward_code:
        return f"the forward of {name} is not the one that transformers gives such classes"
    implementation = _implementation(experts)
    if implementation != "eager":
        function = _moe().functions.get(implementation)
        if not getattr(function, "__module__", "").startswith("transformers."):
            return f"its experts are computed by {implementation!r}, which is not transformers' own"
    act = getattr(experts, "act_fn", None)
    if isinstance(act, nn.Module) and (checks.is_hooked(act) or any(act.parameters())):
        return f"the activation of {name} has hooks or parameters"
    if getattr(act, "inplace", False):  # what it changes is kept for the backward
        return f"the activation of {name} works in place"
    return _weights_obstacle(experts)


def _weights_obstacle(experts: Any) -> str | None:
    known = set()
    for name in projections(experts):
        weight = experts._parameters.get(name)
        if weight is None or weight.ndim != 3 or len(weight) != experts.num_experts:
            return f"its {name} is not one parameter for all experts"
        if weight.dtype not in checks.DTYPES or not is_taken(weight):
            return f"its {name} is a {type(weight).__name__} of {weight.dtype}"
        bias = experts._parameters.get(f"{name}_bias")
        if experts.has_bias and (bias is None or bias.shape != weight_of(experts, name).shape[:2]):
            return f"its {name}_bias is not one for all experts"
        known |= {name, f"{name}_bias"}
    others = sorted((experts._parameters.keys() | experts._buffers.keys()) - known)
    if others:  # scales of codes, ...
        return f"it has {others[0]} too"
    return None


def _middle(experts: Any) -> Middle:
    if not experts.has_gate:
        return Middle(None, experts.act_fn)
    gate = experts._apply_gate
    if torch.compiler.is_compiling():  # which fuses it itself, and traces no import
        return Middle(None, gate)
    usual = getattr(gate, "__func__", None) is _moe().gate
    return Middle(activation_of(experts.act_fn) if usual else None, gate)


class _Moe(NamedTuple):
    """What transformers' interface for experts is made of."""

    gate: object  # act(gate) o up of (gate, up)
    forward_code: object  # of the forward that its classes have
    functions: Mapping[str, object]  # by implementations' names: anybody may add one


@functools.cache
def _moe() -> _Moe:
    from transformers.integrations import moe

    class Bare(nn.Module):
        pass

    decorated = moe.use_experts_implementation(Bare)
    code = decorated.forward.__code__
    return _Moe(moe._default_apply_gate, code, moe.ALL_EXPERTS_FUNCTIONS)


def run_experts(
    experts: Any,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: Mapping[str, ExpertAdapter],
    backend: Backend = "auto",
) -> Tensor:
    """What ``experts(x, top_k_index, top_k_weights)`` is with ``adapters``, by projections' names.

    x [T, hidden], top_k_index and top_k_weights [T, k]. Under autocast only the experts' "eager"
    implementation multiplies in its dtype, as in transformers; the others do in their weights'.
    """
    first, last = (_projection(experts, name, adapters) for name in projections(experts))
    how = (top_k_index, top_k_weights, first, last, _middle(experts), backend)
    with _casting(experts, x):
        return run_projections(_as_cast(experts, x), *how).to(x.dtype)


def _casting(experts: Any, x: Tensor) -> AbstractContextManager[object]:
    return nullcontext() if _implementation(experts) == "eager" else no_autocast(x)


def _as_cast(experts: Any, x: Tensor) -> Tensor:
    return x if _implementation(experts) == "eager" else x.to(experts.down_proj.dtype)


def _implementation(experts: Any) -> Any:
    """transformers' name of what computes the module."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None) or "eager"


def weight_of(experts: Any, name: str) -> Weight:
    """The weights [E, out, in] of a projection: a view, or a `QuantizedWeight`."""
    weight = getattr(experts, name)
    return weight if isinstance(weight, QuantizedWeight) else plain_weight(experts, name)


def plain_weight(experts: Any, name: str) -> Tensor:
    """The same of a module that transformers made."""
    return as_stack(experts, getattr(experts, name))


def as_stack(experts: Any, weight: Tensor) -> Tensor:
    """A tensor like a projection's weights as [E, out, in], a view."""
    return weight.mT if experts.is_transposed else weight


def parameter_for(experts: Any, weight: Weight) -> Tensor:
    """Memory for other weights of a projection, as the module has its parameter."""
    E, N, K = weight.shape
    shape = (E, K, N) if experts.is_transposed else (E, N, K)
    return torch.empty(shape, dtype=weight.dtype, device=weight.device)


def in_codes(experts: Any, format: Format | Quantizer) -> Any:
    """A module like this one, with its weights in codes and the rest shared.

    Raises what `quantize` does, and ValueError for codes that ask for an x in fp8.
    """
    other = copy.copy(experts)
    vars(other).update({k: v.copy() for k, v in vars(experts).items() if isinstance(v, dict)})
    for name in in_order(experts):
        codes = quantize(plain_weight(experts, name), format)
        checks.check_not_rounding("quantize", codes)
        delattr(other, name)
        setattr(other, name, codes)
    return other


def _projection(experts: Any, name: str, adapters: Mapping[str, ExpertAdapter]) -> Projection:
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    return Projection(weight_of(experts, name), bias, *adapters.get(name, ()))


def routed(*args: Any, **kwargs: Any) -> tuple[Any, Any] | None:
    """A router's choice among the arguments beside x; None if there are others."""
    given = {**dict(zip(("top_k_index", "top_k_weights"), args, strict=False)), **kwargs}
    if len(args) > 2 or given.keys() != {"top_k_index", "top_k_weights"}:
        return None
    return given["top_k_index"], given["top_k_weights"]


def is_taken(t: Tensor) -> bool:
    """Whether a tensor is the kernels' or PyTorch's to read, or an operator's, which looks then."""
    return not is_sharded(t) if is_observed() else are_plain(t)


def misfit(experts: Any, x: Any, index: Any, weights: Any) -> str | None:
    """Why these are not what `run_experts` takes; None if they are."""
    if not all(isinstance(t, Tensor) and is_taken(t) for t in (x, index, weights)):
        return "an argument is not a plain tensor"
    kept = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if kept and any(t.is_inference() for t in (x, index, weights)):
        return "an argument is of inference mode, and could not be kept for a backward pass"
    # Not len(), which an exported graph would keep as a constant.
    matrices, rows = x.ndim == index.ndim == 2, (x.shape[:1], index.shape[:1])
    if not matrices or index.shape != weights.shape or rows[0] != rows[1]:
        got = ", ".join(str(list(t.shape)) for t in (x, index, weights))
        return f"x, top_k_index, top_k_weights: got {got}, wanted [T, hidden], [T, k] and [T, k]"
    if index.dtype != torch.int64 or index.device != x.device:
        return f"top_k_index: got {index.dtype} on {index.device}, wanted int64 on x's device"
    if index.shape[1] == 0:
        return f"top_k_index: got shape {list(index.shape)}, wanted an expert for each token"
    if not weights.is_floating_point() or weights.device != x.device:
        got = f"got {weights.dtype} on {weights.device}"
        return f"top_k_weights: {got}, wanted a floating dtype on x's device"
    weight: Any = experts.down_proj
    if not isinstance(weight, QuantizedWeight) and not is_taken(weight):
        return f"the experts' weights are {type(weight).__name__}s"
    if x.device != weight.device:
        return f"x: is on {x.device}, the experts are on {weight.device}"
    cast = x.dtype in checks.DTYPES and autocast_enabled(x)
    if x.dtype != weight.dtype and not cast:
        return f"x: got {x.dtype}, wanted the experts' dtype, {weight.dtype}"
    return None


def explain_experts_module(
    experts: Any,
    x: Tensor,
    top_k_index: Tensor,
    adapters: Mapping[str, ExpertAdapter],
    backend: Backend,
) -> Explanation:
    """How `run_experts` computes the projection that x goes to."""
    name, _ = projections(experts)
    weight, bias, A, B, scaling = _projection(experts, name, adapters)
    options: Any = {"scaling": scaling, "bias": bias, "backend": backend}
    with _casting(experts, x):
        x = _as_cast(experts, x)
        return explain_experts(x, weight, A, B, expert_indices=top_k_index, **options)


def describe_mixtures(paths: Iterable[str]) -> list[str]:
    """A line for each kind of mixture of experts, for the reports."""
    kinds = Counter(map(in_any_layer, paths))
    return [f"  {kind}: all experts in one autograd node, {n} x" for kind, n in kinds.items()]
