"""LoRA layers fused into their base product: Triton kernels, their autograd function, a layer."""

from . import interrupt as interrupt  # isort: skip  # before all that takes long
from . import flops, reference
from .adapters import load_adapter, save_adapter
from .attention import FusedLoRAAttention
from .autograd import LoRALinearFunction
from .disable import disable_adapter
from .expert_layer import FusedLoRAExperts
from .experts import LoRALinearExpertsFunction, explain_experts, lora_linear_experts
from .explanation import Explanation
from .functional import dora_linear, explain, lora_linear
from .gated import LoRALinearGatedFunction, lora_linear_gated
from .group import LoRALinearGroupFunction, explain_group, lora_linear_group
from .inject import inject
from .inject_report import InjectReport
from .linear import FusedLoRALinear
from .loraplus import lora_plus_param_groups
from .merge import merge_and_unload
from .multi import explain_multi, lora_linear_multi
from .multi_linear import FusedMultiLoRALinear, route
from .multi_model import add_adapter, delete_adapter
from .quantize import (
    quantize_fp4,
    quantize_fp8,
    quantize_int8,
    quantize_mxfp4,
    quantize_nf4,
)
from .quantized_weight import QuantizedWeight
from .schedule import schedule
from .together import FusedLoRAGroup

__version__ = "0.1.0"

flops.install()

__all__ = [
    "Explanation",
    "FusedLoRAAttention",
    "FusedLoRAExperts",
    "FusedLoRAGroup",
    "FusedLoRALinear",
    "FusedMultiLoRALinear",
    "InjectReport",
    "LoRALinearExpertsFunction",
    "LoRALinearFunction",
    "LoRALinearGatedFunction",
    "LoRALinearGroupFunction",
    "QuantizedWeight",
    "add_adapter",
    "delete_adapter",
    "disable_adapter",
    "dora_linear",
    "explain",
    "explain_experts",
    "explain_group",
    "explain_multi",
    "inject",
    "load_adapter",
    "lora_linear",
    "lora_linear_experts",
    "lora_linear_gated",
    "lora_linear_group",
    "lora_linear_multi",
    "lora_plus_param_groups",
    "merge_and_unload",
    "quantize_fp4",
    "quantize_fp8",
    "quantize_int8",
    "quantize_mxfp4",
    "quantize_nf4",
    "reference",
    "route",
    "save_adapter",
    "schedule",
]
