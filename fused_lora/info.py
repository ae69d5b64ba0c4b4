"""What `fused-lora info` prints: the machine, the versions, and what a model's layers take."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from torch import nn

from . import __version__, tables
from .expert_layer import FusedLoRAExperts
from .expert_modules import projections, weight_of
from .experts import explain_experts
from .explanation import Explanation
from .functional import explain
from .inject import inject
from .inject_report import InjectReport
from .linear import FusedLoRALinear
from .matching import mixtures_of_experts

PACKAGES = ("torch", "triton", "peft", "transformers", "accelerate", "safetensors")


def device() -> torch.device:
    """The device that a model would run on here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> dict[str, str]:
    """Names and versions, each a line to print."""
    lines = {"fused-lora": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            lines[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines[package] = "not installed"
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        lines["GPU"] = (
            f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, "
            f"{p.total_memory / 2**30:.0f} GiB"
        )
        lines["tuned table"] = (
            f"{len(tables.table(p.name))} choices; own: {tables.user_path(p.name)}"
        )
    else:
        lines["GPU"] = "none: calls take the PyTorch path"
    return lines


def layers(
    model: str, r: int, tokens: int, dtype: torch.dtype
) -> tuple[InjectReport, dict[tuple[int, ...], Explanation]]:
    """What adapting ``model`` would give, and for each shape of a weight what a call of it takes.

    [N, K], or [E, N, K] of experts, as many of them for each row as the config says. Reads the
    model's config only: no weights.
    """
    from transformers import AutoModelForCausalLM

    from .models import load_config

    with torch.device("meta"):
        skeleton: nn.Module = AutoModelForCausalLM.from_config(load_config(model))
        experts = [
            f"{path}.{name}"
            for path in mixtures_of_experts(skeleton)
            for name in projections(skeleton.get_submodule(path))
        ]
        report = inject(skeleton, r, 2 * r, "all-linear", target_parameters=experts)
    here = device()
    calls: dict[tuple[int, ...], Explanation] = {}
    for module in skeleton.modules():
        if isinstance(module, FusedLoRAExperts):
            for name in module.adapters:
                E, N, K = shape = tuple(weight_of(module.base_layer, name).shape)
                if shape not in calls:
                    x = torch.empty(tokens, K, dtype=dtype, device=here)
                    weight = x.new_empty(1).expand(shape)  # nobody reads its values
                    A, B = torch.empty(E, r, K, device=here), torch.empty(E, N, r, device=here)
                    top_k = getattr(module.base_layer.config, "num_experts_per_tok", 1)
                    index = torch.zeros(tokens, top_k, dtype=torch.int64, device=here)
                    calls[shape] = explain_experts(x, weight, A, B, expert_indices=index)
        if isinstance(module, FusedLoRALinear):
            N, K = module.weight.shape
            if (N, K) not in calls:
                x, weight = (torch.empty(n, K, dtype=dtype, device=here) for n in (tokens, N))
                A, B = torch.empty(r, K, device=here), torch.empty(N, r, device=here)
                calls[N, K] = explain(x, weight, A, B)
    return report, calls
