"""Tensors that are spread over processes (DTensors: FSDP2, tensor parallel), between steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether there can be DTensors: their module takes 0.35 s to import."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor; importing their module takes 0.35 s."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor's values; of a DTensor's every process has to ask for them."""
    if not is_sharded(tensor):
        return tensor
    spread: Any = tensor
    values: Tensor = spread.full_tensor()
    return values


def writes_files() -> bool:
    """Whether this process writes what all have in full."""
    return not is_distributed() or torch.distributed.get_rank() == 0


def reshard(model: nn.Module) -> None:
    """Lets go of what FSDP2 has gathered: until then a parameter is not what it keeps."""
    if is_distributed():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Puts ``value`` there; a DTensor gets its shards of what the first process has."""
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        spread: Any = parameter
        value = value.to(device=parameter.device, dtype=parameter.dtype)
        value = distribute_tensor(value, spread.device_mesh, spread.placements)
    parameter.copy_(value)
