"""Autocast: what it makes of a call's tensors, and where it has to be off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOTHING = nullcontext()


def autocast_enabled(t: Tensor) -> bool:
    """Whether autocast is on for tensors on t's device; the meta device has none."""
    kind = "cuda" if t.is_cuda else "cpu" if t.is_cpu else t.device.type  # the last takes 0.5 us
    return kind != "meta" and torch.is_autocast_enabled(kind)


def autocast(x: Tensor, weight: Any, bias: Tensor | None) -> tuple[Any, Any, Any]:
    """The three as autocast would give them to `F.linear`.

    The adapters are not cast: both backends take them in any dtype, so that fp32 adapters get
    fp32 gradients and x needs no fp32 copy.
    """
    if not isinstance(x, Tensor) or not autocast_enabled(x):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: Any) -> Any:
        eligible = isinstance(tensor, Tensor) and tensor.is_floating_point()
        return tensor.to(dtype) if eligible and tensor.dtype != torch.float64 else tensor

    return cast(x), cast(weight), cast(bias)


def no_autocast(t: Tensor) -> AbstractContextManager[object]:
    """A context in which autocast, which has done its work, is off for tensors on t's device."""
    if autocast_enabled(t):
        return torch.autocast(t.device.type, enabled=False)
    return _NOTHING  # entering autocast where it is off already would cost 4 us
