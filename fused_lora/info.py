"""What `fused-lora info` prints: the machine, the versions, and what a model's layers take."""

from __future__ import annotations

import importlib.metadata
import platform

import torch
from torch import nn

from . import __version__, tables
from .explanation import Explanation
from .functional import explain
from .inject import inject
from .inject_report import InjectReport
from .linear import FusedLoRALinear

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
) -> tuple[InjectReport, dict[tuple[int, int], Explanation]]:
    """What adapting ``model`` would give, and for each shape [N, K] what a call of it takes.

    Reads the model's config only: no weights.
    """
    from transformers import AutoModelForCausalLM

    from .models import load_config

    with torch.device("meta"):
        skeleton: nn.Module = AutoModelForCausalLM.from_config(load_config(model))
        report = inject(skeleton, r, 2 * r, "all-linear")
    here = device()
    calls: dict[tuple[int, int], Explanation] = {}
    for module in skeleton.modules():
        if isinstance(module, FusedLoRALinear):
            N, K = module.weight.shape
            if (N, K) not in calls:
                x, weight = (torch.empty(n, K, dtype=dtype, device=here) for n in (tokens, N))
                A, B = torch.empty(r, K, device=here), torch.empty(N, r, device=here)
                calls[N, K] = explain(x, weight, A, B)
    return report, calls
