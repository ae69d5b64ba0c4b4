"""Draws of dropout masks, from torch's generators."""

from __future__ import annotations

import torch
from torch import Tensor

from .calls import Backend
from .dispatch import Decision
from .reference import drawn_mask


def draw_seeds(n: int, device: torch.device, backend: Backend) -> Tensor:
    """Seeds of n dropout masks, from torch's generator for the device, and left there.

    Negative where PyTorch's path on a CPU will take the call: see `reference.keep_mask`. For what
    cannot save the mask itself: registered operators, groups, many adapters. Each begins at 16
    bytes: launches of kernels that read anything else are not known to be alike.
    """
    seeds = torch.randint(2**63 - 1, (1,) if n == 1 else (n, 2), device=device)
    if device.type == "cpu" and backend != "triton":
        seeds = ~seeds
    return seeds if n == 1 else seeds[:, 0]


def draw_seed(device: torch.device, backend: Backend, shard: int = 0) -> Tensor:
    """The seed of one mask: for each part of a logical x (``shard``) another."""
    seed = draw_seeds(1, device, backend)
    return seed + shard if shard else seed  # Philox: neighbouring keys are independent streams


def draw_for(decision: Decision, shard: int | None = None) -> Tensor | None:
    """The seed of a call's dropout mask, or on a CPU the mask [M, K]; None without dropout."""
    call, chosen, _, threshold, _ = decision
    if not threshold:
        return None
    if chosen.backend == "torch" and call.device.type == "cpu" and shard is None:
        return drawn_mask(threshold, call.M, call.K)  # a byte an element is less than x's copy
    return draw_seed(call.device, chosen.backend, shard or 0)
