"""The adapters of a model by their paths, as files of PEFT's format have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import checks
from .expert_layer import FusedLoRAExperts, nested
from .linear import FusedLoRALinear
from .modules_to_save import tensors_of
from .multi_linear import FusedMultiLoRALinear
from .multi_model import layers_with
from .paths import own_path
from .sharded import reshard

PREFIX = "base_model.model."
# What a layer's tensors are called, in it and, with what follows, in the files.
TENSORS = {"lora_A": ".weight", "lora_B": ".weight", "lora_magnitude_vector": ""}


def inner(model: Any) -> Any:
    """The model in DistributedDataParallel or DataParallel, or in a compiled one."""
    wrapped = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, wrapped) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrapped) else model._orig_mod
    return model


def adapted_layers(model: Any, adapter_name: str | None = None) -> dict[str, Any]:
    """The adapted layers, with the parameters that they keep, by their paths without wrappers.

    Of a mixture of experts each `ExpertsAdapter`, by the path of its projection's parameter.
    """
    checks.check_module("model", model)
    if isinstance(model, (FusedLoRALinear, FusedMultiLoRALinear)):
        raise ValueError(
            f"model: got a {type(model).__name__} itself, wanted a module that contains some"
        )
    reshard(model)
    if adapter_name is not None:
        found = layers_with(model, adapter_name)
        # Layers that had an adapter before have its dropout; PEFT's format has one for all.
        dropout = max((layer.lora_dropout for layer in found.values()), default=0.0)
        check_one_path(model, found.values())
        return {own_path(p): _named(layer, adapter_name, dropout) for p, layer in found.items()}
    layers: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, FusedLoRALinear):
            layers[own_path(path)] = module
        elif isinstance(module, FusedLoRAExperts):
            layers |= {f"{own_path(path)}.{n}": adapter for n, adapter in module.adapters.items()}
    check_one_path(model, layers.values())
    return layers


def places_of(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Each layer's path in the files."""
    places = {path: path for path in layers}
    for path, module in model.named_modules():
        if isinstance(module, FusedLoRAExperts):
            at = own_path(path)
            wrappers = nested(module.base_layer, list(module.adapters))
            places |= {f"{at}.{name}": at + wrapper for name, wrapper in wrappers.items()}
    return places


def check_one_path(model: nn.Module, adapted: Iterable[nn.Module]) -> None:
    """ValueError if one of the modules is at several paths: on disk an adapter has one."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module in adapted:
        if len(paths[module]) > 1:
            raise ValueError(
                f"model: {' and '.join(paths[module])} are one module, and on disk an adapter is "
                "that of one path"
            )


def adapter_names(model: nn.Module) -> list[str]:
    """Those of `add_adapter`'s."""
    layers = [m for m in model.modules() if isinstance(m, FusedMultiLoRALinear)]
    return list(dict.fromkeys(name for layer in layers for name in layer.adapters))


@dataclass(frozen=True)
class NamedAdapter:
    """One of a layer's several adapters, as a layer that has no other."""

    lora_A: Tensor
    lora_B: Tensor
    lora_alpha: float
    use_rslora: bool
    scaling: float
    lora_dropout: float
    lora_magnitude_vector: Tensor | None = None
    lora_A_init: Tensor | None = None
    lora_B_init: Tensor | None = None
    use_dora: bool = False
    merged: bool = False


def _named(layer: FusedMultiLoRALinear, name: str, lora_dropout: float) -> NamedAdapter:
    A, B = layer.lora_A[name], layer.lora_B[name]
    numbers = (layer.lora_alpha[name], layer.use_rslora[name], layer.scaling[name])
    return NamedAdapter(A, B, *numbers, lora_dropout)


def whole_modules(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of ``modules_to_save``, by their names in the files."""
    return {
        PREFIX + name: tensor
        for path, module in modules.items()
        for name, tensor in tensors_of(own_path(path), module)
    }


def key_of(path: str, name: str) -> str:
    """A layer's tensor's name in the files."""
    return f"{PREFIX}{own_path(path)}.{name}{TENSORS[name]}"
