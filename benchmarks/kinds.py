"""The kinds of cases: a plain layer, one over a quantised W0, and many adapters over either.

What belongs to a kind is imported where it is used: `run --base` measures older commits, which may
lack what it needs, and then have no providers of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from oracle import Problem, problem
from oracle import expression as plain_expression
from torch import Tensor

from .providers import CPU_PROVIDERS, PROVIDERS, Provider
from .shapes import PLAIN, Case

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_problem(case: Case, device: torch.device) -> Problem:
    """Random tensors of the case's shapes; x and every A and B are leaves that train."""
    with device:  # drawn there: a GPU is some hundred times as fast at it
        p = problem(
            case.M,
            case.N,
            case.K,
            case.r,
            dtype=DTYPES[case.dtype],
            adapter_dtype=DTYPES[case.adapter_dtype],
            device=device,
            bias=False,
            dropout_p=case.dropout,
        )
        if case.format != PLAIN:
            from .quantized import quantized

            p = quantized(p, case.format)
        if case.kind == "multi":
            from .multi import with_adapters

            p = with_adapters(p, case.rows)
    for tensor in leaves(p):
        tensor.requires_grad_()
    return p


def leaves(p: Problem) -> list[Tensor]:
    """x, and every A and B."""
    pairs = getattr(p, "adapters", [(p.lora_A, p.lora_B)])
    return [p.x, *(tensor for pair in pairs for tensor in pair)]


def expression(p: Problem) -> Callable[[Any], Tensor]:
    """The pure PyTorch expression of the problem's kind."""
    if hasattr(p, "adapters"):
        from .multi import expression

        return expression
    return plain_expression


def providers_of(case: Case) -> tuple[dict[str, Provider], tuple[str, ...]]:
    """Who is measured on such a case, and which of them on a CPU."""
    try:
        if case.kind == "multi":
            from .multi import CPU_MULTI, MULTI

            return MULTI, CPU_MULTI
        if case.kind == "quantised":
            from .quantized import CPU_QUANTIZED, QUANTIZED

            return QUANTIZED, CPU_QUANTIZED
    except ImportError:
        return {}, ()
    return PROVIDERS, CPU_PROVIDERS


def choose(case: Case, names: list[str] | None, device: torch.device) -> list[Provider]:
    """Those of ``names`` that there are for such a case; None: all, or those for a CPU."""
    found, on_cpu = providers_of(case)
    wanted = names if names is not None else found if device.type == "cuda" else on_cpu
    return [found[name] for name in wanted if name in found]
