"""LoRA layers in one fused GPU pass: Triton kernels, their autograd function, a drop-in layer."""

from typing import Any

from . import reference
from .attention import FusedLoRAAttention
from .autograd import LoRALinearFunction
from .dispatch import Explanation
from .functional import dora_linear, explain, lora_linear
from .group import FusedLoRAGroup, LoRALinearGroupFunction, lora_linear_group
from .inject import InjectReport, inject
from .linear import FusedLoRALinear
from .loraplus import lora_plus_param_groups
from .merge import merge_and_unload

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "FusedLoRAAttention",
    "FusedLoRAGroup",
    "FusedLoRALinear",
    "InjectReport",
    "LoRALinearFunction",
    "LoRALinearGroupFunction",
    "dora_linear",
    "explain",
    "inject",
    "load_adapter",
    "lora_linear",
    "lora_linear_group",
    "lora_plus_param_groups",
    "merge_and_unload",
    "reference",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name in ("load_adapter", "save_adapter"):  # they need safetensors, an extra
        from . import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
