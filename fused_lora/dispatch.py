"""Which backend and strategy a call takes, and why not the others."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import checks
from .kernels.configs import MAX_RANK, choose_config, padded, ship
from .kernels.device import DeviceInfo, device_info

Backend = Literal["auto", "triton", "torch"]
Strategy = Literal["one_pass", "split", "library"]

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# The model's constants, for an H100: bf16 rate of a good GEMM and memory bandwidth. Their ratio
# makes one more read of x cost 194 / N of a GEMM's time (design estimate, not yet measured here).
_FLOPS = 650e12
_BYTES = 3.35e12
_LAUNCH = 4e-6  # seconds that a second, dependent launch adds


@dataclass(frozen=True)
class Call:
    """All that the choice depends on; hashable, so that a shape is decided once."""

    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype
    device: torch.device
    dropout: bool
    plain_tensors: bool  # no subclasses (DTensor, quantised weights, ...)


@dataclass(frozen=True)
class Plan:
    """The decision for one call."""

    backend: Literal["triton", "torch"]
    strategy: Strategy  # of the forward; always "library" on the torch backend
    strategy_dx: Strategy  # of the input gradient, whose N is the forward's K


@dataclass(frozen=True)
class Explanation:
    """What `fused_lora.explain` returns; ``print`` it to read it."""

    backend: Literal["triton", "torch"]
    strategy: Strategy
    strategy_dx: Strategy
    reasons: dict[str, str]  # backend or strategy -> why it is taken or not

    def __str__(self) -> str:
        head = f"backend {self.backend}, forward {self.strategy}, dx {self.strategy_dx}"
        return "\n".join([head, *(f"  {name}: {why}" for name, why in self.reasons.items())])


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernel_obstacle(call: Call) -> Exception | None:
    """Why the Triton kernels cannot take this call, as the exception to raise; None if they can."""
    if not TRITON_INSTALLED:
        return RuntimeError("triton is not installed")
    if not call.plain_tensors:
        return TypeError("an argument is a tensor subclass; the kernels take plain tensors")
    if call.device.type == "cpu" and not _interpreting():
        return RuntimeError("the tensors are on the CPU and TRITON_INTERPRET=1 is not set")
    if call.device.type not in ("cpu", "cuda"):
        return RuntimeError(f"the tensors are on {call.device}, wanted a CUDA device")
    if call.device.type == "cuda" and torch.version.hip:
        return RuntimeError("ROCm GPUs are untested")
    if call.device.type == "cuda" and device_info(call.device).capability < 80:
        return RuntimeError("the GPU is older than compute capability 8.0")
    if call.dtype == torch.float64:
        return TypeError("x: got dtype torch.float64, wanted bfloat16, float16 or float32")
    if call.dtype == torch.bfloat16 and call.device.type == "cpu":
        return RuntimeError(
            "x: got dtype torch.bfloat16 under TRITON_INTERPRET=1, where Triton's dot returns "
            "garbage; wanted float16 or float32"
        )
    if call.r > MAX_RANK:
        return ValueError(f"lora_A: got r = {call.r}, wanted at most {MAX_RANK}")
    if max(call.M, call.N, call.K) >= 2**31 - 2**10:
        return ValueError(f"x, weight: got M, N, K = {call.M}, {call.N}, {call.K}, wanted < 2^31")
    return None


def predicted_extra(call: Call, device: DeviceInfo) -> dict[Strategy, float]:
    """Cost of the adapter as a fraction of the base GEMM's time, by the design's model.

    one_pass  the tensor cores also multiply by A: r_pad / BLOCK_N
    split     one more read of x and one more launch
    library   the same, and one more read and write of y and a third launch

    A strategy that cannot take the call is left out. Every constant is an H100's.
    """
    itemsize = call.dtype.itemsize
    gemm = 2 * call.M * call.N * call.K / _FLOPS
    if gemm == 0:
        return {"split": 0.0, "library": 0.0}
    read_x = itemsize * call.M * call.K / _BYTES
    touch_y = 2 * itemsize * call.M * call.N / _BYTES
    extra: dict[Strategy, float] = {
        "split": (read_x + _LAUNCH) / gemm,
        "library": (read_x + touch_y + 2 * _LAUNCH) / gemm,
    }
    if ship("one_pass", call.r, itemsize, call.dropout, device):
        tile = choose_config("one_pass", call.M, call.N, call.r, itemsize, False, device)
        extra["one_pass"] = padded(call.r) / tile.BLOCK_N
    return extra


def _kernel_strategy(call: Call) -> Strategy:
    extra = predicted_extra(call, device_info(call.device))
    # "library" is the torch backend's: it is the bound to beat, not a choice of the kernels.
    return min((s for s in extra if s != "library"), key=extra.__getitem__)


def _transposed(call: Call) -> Call:
    return Call(**{**vars(call), "N": call.K, "K": call.N})


def _auto_avoids_kernels(call: Call) -> str | None:
    """Why "auto" leaves a call that the kernels could take to PyTorch."""
    if call.device.type == "cpu":
        return 'the tensors are on the CPU; the interpreter is there to check backend="triton"'
    if call.dtype == torch.float32:
        return "the kernels' fp32 product is exact, without tensor cores, and cuBLAS's is faster"
    return None


@functools.lru_cache(maxsize=4096)
def plan(call: Call, backend: Backend) -> Plan:
    """The decision for ``call``; raises the obstacle if "triton" was asked for and stands."""
    obstacle = kernel_obstacle(call) if backend != "torch" else None
    if backend == "triton" and obstacle is not None:
        raise type(obstacle)(f'backend="triton" cannot take this call: {obstacle}')
    if backend == "torch" or obstacle or (backend == "auto" and _auto_avoids_kernels(call)):
        return Plan("torch", "library", "library")
    return Plan("triton", _kernel_strategy(call), _kernel_strategy(_transposed(call)))


def _describe(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, dropout: bool
) -> Call:
    N, K = weight.shape
    tensors = (x, weight, lora_A, lora_B, bias)
    return Call(
        M=x.numel() // K if K else x.shape[:-1].numel(),
        N=N,
        K=K,
        r=lora_A.shape[0],
        dtype=x.dtype,
        device=x.device,
        dropout=dropout,
        plain_tensors=all(
            t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors
        ),
    )


def _facts(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout, type(tensor)


_calls: dict[tuple[object, ...], Call] = {}  # a checked call by the facts about its arguments
_MAX_CALLS = 4096


def checked_call(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None, dropout: bool
) -> Call:
    """What the call is, or the TypeError or ValueError of `checks.check_tensors`.

    What was checked once is not checked again: 5 instead of 11 us a call.
    """
    try:
        facts = (_facts(x), _facts(weight), _facts(lora_A), _facts(lora_B))
        key = (facts, None if bias is None else _facts(bias), dropout)
        call = _calls.get(key)
    except AttributeError:  # not a tensor: the checks say which
        call = None
    if call is None:
        checks.check_tensors(x, weight, lora_A, lora_B, bias)
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        call = _calls[key] = _describe(x, weight, lora_A, lora_B, bias, dropout)
    return call


def explain_call(call: Call, backend: Backend) -> Explanation:
    """The plan with the reason for and against every backend and strategy."""
    chosen = plan(call, backend)
    reasons: dict[str, str] = {}
    if chosen.backend == "torch":
        asked = 'backend="torch" was asked for' if backend == "torch" else None
        why = asked or kernel_obstacle(call) or _auto_avoids_kernels(call)
        reasons["triton"] = f"not taken: {why}"
        reasons["library"] = "taken: F.linear, then addmm_ in place on its own output"
        return Explanation(chosen.backend, chosen.strategy, chosen.strategy_dx, reasons)
    extra = predicted_extra(call, device_info(call.device))
    reasons["torch"] = "not taken: the kernels take this call"
    for strategy in ("one_pass", "split", "library"):
        verdict = "taken" if strategy == chosen.strategy else "not taken"
        if strategy in extra:
            reasons[strategy] = (
                f"{verdict}: predicted extra cost over the base GEMM {extra[strategy]:.1%} "
                "(H100 model, not a measurement)"
            )
        elif call.dropout:
            reasons[strategy] = f"{verdict}: it would draw each dropout decision once per tile"
        else:
            reasons[strategy] = f"{verdict}: h's accumulator for r = {call.r} does not fit a tile"
    return Explanation(chosen.backend, chosen.strategy, chosen.strategy_dx, reasons)
