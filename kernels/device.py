"""Cached facts about the device a tensor lives on, and the guard every launch runs under."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

# What one block may take of a multiprocessor's shared memory, in bytes, by compute capability
# (CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability").
SHARED_MEMORY = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
_SMALLEST_SHARED_MEMORY = 101_376  # unknown chips: what every tensor-core GPU since sm_80 has


@dataclass(frozen=True, eq=False)  # compared by identity: hashing the fields costs a call 0.4 us
class DeviceInfo:
    """What the choice of a tile configuration needs to know of a GPU."""

    capability: int  # 90 for sm_90
    num_sms: int
    shared_memory: int  # bytes per block
    name: str = ""  # as the driver gives it: what tuned tables and measured ceilings go by


_NOTHING = nullcontext()

# The interpreter has no GPU. It runs the Hopper configurations; two "SMs" keep the number of
# programs small and still make the split-M reductions split.
INTERPRETED = DeviceInfo(
    capability=90, num_sms=2, shared_memory=SHARED_MEMORY[90], name="interpreter"
)


@functools.cache
def _cuda_info(index: int) -> DeviceInfo:
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    return DeviceInfo(
        capability=capability,
        num_sms=properties.multi_processor_count,
        shared_memory=SHARED_MEMORY.get(capability, _SMALLEST_SHARED_MEMORY),
        name=properties.name,
    )


def device_info(device: torch.device) -> DeviceInfo:
    """Facts about ``device``; for a CPU tensor, those the Triton interpreter pretends to have."""
    if device.type != "cuda":
        return INTERPRETED
    return _cuda_info(torch.cuda.current_device() if device.index is None else device.index)


def has_fp8(device: torch.device) -> bool:
    """Whether kernels can convert to and from e4m3, and multiply in it.

    The interpreter does it wrongly: it loses carries on the way there and NaN on the way back.
    """
    return device.type == "cuda" and device_info(device).capability >= 89


def device_guard(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device current: Triton launches on the current device's stream."""
    index = tensor.get_device()  # -1 on a CPU; `device.type` and `device.index` would cost 0.5 us
    if index < 0 or index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(index)
