"""What registered operators give instead of None, which their schemas have no place for."""

from __future__ import annotations

import torch
from torch import Tensor


def or_empty(t: Tensor | None, like: Tensor) -> Tensor:
    """t, or no values, in ``like``'s dtype and on its device."""
    return like.new_empty(0) if t is None else t


def like_or_empty(t: Tensor | None, needed: bool, like: Tensor) -> Tensor:
    """A fake's gradient of t, contiguous; as `or_empty` unless it is needed."""
    if t is None or not needed:
        return like.new_empty(0)
    return torch.empty_like(t, memory_format=torch.contiguous_format)
