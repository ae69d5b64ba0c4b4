"""Runs a plan: forward and backward of one call on the backend that was chosen for it.

Both take x and g of any number of dimensions; autocast has done its work before and is off here.
"""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from . import torch_backend
from .dispatch import Plan
from .kernels.dropout import Dropout

_NOTHING = nullcontext()


@functools.cache
def _kernels() -> ModuleType:
    """The kernel path, imported where it is first used: there is a PyTorch without Triton."""
    return importlib.import_module(".triton_backend", __package__)


def _as_matrix(t: Tensor) -> Tensor:
    """[..., C] -> [M, C], a view wherever the strides allow one; sizes of 0 too."""
    if t.ndim == 2:
        return t
    return t.flatten(0, -2) if t.ndim > 1 else t.unsqueeze(0)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for tensors on this device; the meta device has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    if autocast_enabled(device):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING  # entering autocast where it is off already would cost 4 us


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    plan: Plan,
    *,
    need_h: bool,
) -> tuple[Tensor, Tensor | None]:
    """y [..., N] and, if needed, h = scaling * (D o x) A^T [M, r], both in x's dtype."""
    arguments = (_as_matrix(x), weight, lora_A, lora_B, bias, scaling, dropout)
    h: Tensor | None
    with _no_autocast(x.device):
        if plan.backend == "triton":
            y, h = _kernels().forward(*arguments, plan, need_h=need_h)
        else:
            y, h = torch_backend.forward(*arguments)
    if x.ndim != 2:
        # Not view(): autograd refuses changes in place of a view that a Function returns, and a
        # ReLU(inplace=True) may follow.
        y.resize_(*x.shape[:-1], y.shape[-1])
    return y, h if need_h else None


def backward(
    g: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    h: Tensor | None,
    scaling: float,
    dropout: Dropout | None,
    plan: Plan,
    *,
    need_dx: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [..., K], dA and dB for g = dL/dy [..., N]: dA iff x is given, dB iff h is given."""
    x2 = None if x is None else _as_matrix(x)
    arguments = (_as_matrix(g), x2, weight, lora_A, lora_B, h, scaling, dropout)
    with _no_autocast(g.device):
        if plan.backend == "triton":
            if type(g) is not Tensor:  # an unfinished collective: only an operator waits for it
                arguments = (_as_matrix(g.clone()), *arguments[1:])
            dx, dA, dB = _kernels().backward(*arguments, plan, need_dx=need_dx)
        else:
            dx, dA, dB = torch_backend.backward(*arguments, need_dx=need_dx)
    return None if dx is None else dx.view(*g.shape[:-1], dx.shape[-1]), dA, dB
