"""Over which codes of W0 an adapter was trained: said in its file, compared when it is loaded.

PEFT's format has no place for it, safetensors' metadata has, and PEFT does not look there.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .expert_layer import FusedLoRAExperts
from .linear import FusedLoRALinear
from .multi_linear import FusedMultiLoRALinear
from .paths import own_path
from .quantized_weight import QuantizedWeight

_KEY = "fused_lora.trained_over"  # JSON: layer's path -> `_describe`; of the layers in codes


def metadata(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, str]:
    """What a file of the adapters of ``layers``, by path, says besides their tensors."""
    return {"format": "pt", _KEY: json.dumps(_codes(model, layers), sort_keys=True)}


def warn_if_other(weights: Path, model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Warns once if a file says that an adapter learnt over other codes than ``model`` has.

    Not if it learnt over plain weights: codes under it are asked for.
    """
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        text = (file.metadata() or {}).get(_KEY)
    try:
        before = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return  # the tensors are whole, and nothing hangs on it but a warning
    if not isinstance(before, dict):
        return
    now = _codes(model, layers)
    others = [p for p in layers if _is_described(before.get(p)) and before[p] != now.get(p)]
    if others:
        formats = ", ".join(
            sorted({before[p].partition(",")[0] for p in layers if _is_described(before.get(p))})
        )
        path, more = others[0], f" ({len(others)} layers differ)" * (len(others) > 1)
        warnings.warn(
            f"fused_lora: the adapter of {path} was trained over W0 in {before[path]}, and is over "
            f"{now.get(path, 'unquantised weights')} here{more}: the results differ from those it "
            "was trained for by what the codes round. `quantize` of load_adapter makes codes; it "
            f"was trained over {formats}",
            stacklevel=4,
        )


def _codes(model: nn.Module, layers: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        at = own_path(path)
        if isinstance(module, FusedLoRAExperts):
            for name, weight in module.weights().items():
                if isinstance(weight, QuantizedWeight):
                    found[f"{at}.{name}"] = _describe(weight)
        elif isinstance(module, (FusedLoRALinear, FusedMultiLoRALinear)):
            residual = getattr(module, "lora_A_init", None) is not None
            if isinstance(module.weight, QuantizedWeight):
                found[at] = _describe(module.weight) + " of a residual" * residual
    return {path: codes for path, codes in found.items() if path in layers}


def _is_described(text: object) -> bool:
    """Whether a file's text could be `_describe`'s, and not something else for the terminal."""
    return isinstance(text, str) and re.fullmatch(r"[a-z0-9_ ,]{1,100}", text) is not None


def _describe(weight: QuantizedWeight) -> str:
    layout = weight.layout
    rows, columns = (str(side or "all") for side in layout.block)
    text = f"{layout.format}, a scale for {rows} x {columns} values"
    text += ", double_quant" * (layout.nested and layout.format != "mxfp4")
    return text + f", x in {layout.activations}" * (layout.activations is not None)
