"""LoRA layers in one fused GPU pass: Triton kernels, their autograd function, a drop-in layer."""

from . import reference
from .autograd import LoRALinearFunction
from .dispatch import Explanation
from .functional import explain, lora_linear
from .inject import InjectReport, inject
from .linear import FusedLoRALinear

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "FusedLoRALinear",
    "InjectReport",
    "LoRALinearFunction",
    "explain",
    "inject",
    "lora_linear",
    "reference",
]
