"""Who looks at a call: autograd, forward AD, torch.func's transforms, dispatch modes, Dynamo."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .quantized_weight import Weight


def is_recorded() -> bool:
    """Whether autograd may want to know of a call: a Function costs 12 us."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def is_observed() -> bool:
    """Whether the call has to be an operator: somebody traces, transforms or watches it."""
    compiling = torch.compiler.is_compiling()
    transformed = torch._C._are_functorch_transforms_active()
    if compiling and transformed:  # Dynamo traces neither an operator's formula nor a Function here
        torch._dynamo.graph_break(msg="fused_lora inside of a torch.func transform")
    return compiling or transformed or _get_current_dispatch_mode() is not None


def has_tangent(t: Tensor) -> bool:
    """Whether forward-mode AD is at work on it."""
    return forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


def is_differentiated(t: Tensor) -> bool:
    """Whether a gradient or a tangent of it is asked for, in any of torch.func's wrappings."""
    functorch = torch._C._functorch
    while True:
        if has_tangent(t) or (t.requires_grad and torch.is_grad_enabled()):
            return True
        if not functorch.is_functorch_wrapped_tensor(t):
            return False
        t = functorch.get_unwrapped(t)


def is_trained(tensor: Tensor) -> bool:
    """Whether an operator has to keep what its gradient needs."""
    # A batched tensor does not say what the transform outside of it differentiates.
    transformed = torch._C._are_functorch_transforms_active()
    return torch.is_grad_enabled() and (tensor.requires_grad or transformed)


def check_frozen(weight: Weight) -> None:
    """ValueError if a derivative with respect to W0 is asked for by other means than autograd's."""
    if torch.compiler.is_compiling():
        return
    parts = (weight,) if isinstance(weight, Tensor) else tuple(weight.parameters())
    if any(map(is_differentiated, parts)):
        raise ValueError(
            "weight: torch.func or forward AD differentiates with respect to it, but LoRA's base "
            "weight is frozen and has no derivative; pass weight.detach()"
        )


def is_constant(number: float) -> bool:
    """False where Dynamo traces a number that changed before: it has no value while tracing."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # 0.25 s to import

    return has_static_value(number)


def fold_scaling(lora_B: Tensor, scaling: float) -> tuple[Tensor, float]:
    """The two for an operator, whose float is a graph's constant: each alpha would recompile."""
    if not torch.compiler.is_compiling() or is_constant(scaling):
        return lora_B, float(scaling)
    return lora_B.to(torch.promote_types(lora_B.dtype, torch.float32)) * scaling, 1.0
