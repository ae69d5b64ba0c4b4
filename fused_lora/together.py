"""`FusedLoRAGroup`: layers that are known to share their input, called together on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from . import checks
from .explanation import Explanation
from .group import call_group, explain_members
from .linear import FusedLoRALinear


def forward_together(modules: Iterable[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """The modules' outputs for the same x [..., in_features]: `lora_linear_group` where it can be.

    Called one by one if any is no `FusedLoRALinear` (any more), is merged, has DoRA or hooks, or
    if they differ in their backend.
    """
    layers: list[Any] = list(modules)
    if _why_alone(layers) is not None:
        return tuple(layer(x) for layer in layers)
    return call_group(x, [layer.arguments() for layer in layers])


def explain_together(modules: Mapping[str, nn.Module], x: Tensor) -> Explanation:
    """Which backend and strategy `forward_together` takes for x, and why."""
    layers: list[Any] = list(modules.values())
    why = _why_alone(layers)
    if why is None:
        return explain_members(x, [layer.arguments() for layer in layers])
    adapted = {name: m for name, m in modules.items() if isinstance(m, FusedLoRALinear)}
    found = {name: layer.explain(x) for name, layer in adapted.items()}
    if len(found) == len(modules) == 1:
        return next(iter(found.values()))
    on_kernels = bool(found) and all(each.backend == "triton" for each in found.values())
    reasons = {"group": f"not taken: {why}"}
    for name in modules:
        reasons[name] = str(found[name]).partition("\n")[0] if name in found else "has no adapter"
    backend: Any = "triton" if on_kernels else "torch"
    return Explanation(backend, "one by one", "one by one", reasons)


def _why_alone(modules: Sequence[nn.Module]) -> str | None:
    if len(modules) == 1:
        return "there is one layer"
    layers = [m for m in modules if type(m) is FusedLoRALinear and not m.merged]
    if len(layers) < len(modules):
        return "not every layer is a FusedLoRALinear that is not merged"
    if len({layer.backend for layer in layers}) > 1:
        return "the layers differ in their backend"
    if any(layer.lora_magnitude_vector is not None for layer in layers):
        return "a layer has DoRA"
    if any(layer.disabled for layer in layers):
        return "a layer's adapter is disabled"
    hooked = checks.all_are_hooked() or any(checks.is_hooked(layer) for layer in layers)
    return "a layer has hooks" if hooked else None


class FusedLoRAGroup(nn.ModuleDict):
    """Layers by name, called together on the input that they share.

        qkv = FusedLoRAGroup({"q_proj": q, "k_proj": k, "v_proj": v})
        q, k, v = qkv(x)

    An `nn.ModuleDict`: the layers are its submodules under their names, with their own parameters,
    so that the state dict is theirs. They stay usable on their own.

    Raises TypeError unless all are `FusedLoRALinear`, ValueError unless there is one and all have
    the same in_features.
    """

    def __init__(self, layers: Mapping[str, FusedLoRALinear]) -> None:
        if not isinstance(layers, Mapping | nn.ModuleDict):
            raise TypeError(f"layers: got {type(layers).__name__}, wanted FusedLoRALinears by name")
        for name, layer in layers.items():
            if not isinstance(layer, FusedLoRALinear):
                raise TypeError(f"{name}: got {type(layer).__name__}, wanted a FusedLoRALinear")
        sizes = {name: layer.in_features for name, layer in layers.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"layers: got in_features {sizes}, wanted one number for all")
        super().__init__(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [..., in_features] -> the outputs [..., out_features_i] in the order of the names."""
        return forward_together(self.values(), x)

    def explain(self, x: Tensor) -> Explanation:
        """Which backend and strategy `forward` takes for x, and why; computes nothing."""
        return explain_together(dict(self.items()), x)
