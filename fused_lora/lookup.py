"""Quick looks into modules: an attribute that is a parameter takes nn.Module 0.5 us to find."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameters(module: nn.Module, *names: str) -> list[Any]:
    """``module``'s attributes of these names, which are parameters, if nobody changed that."""
    own = module._parameters
    try:
        return [own[name] for name in names]
    except KeyError:  # quantised, parametrised, pruned, or another tensor in its place
        return [getattr(module, name) for name in names]
