"""What a call with many adapters is, checked, and which way it goes."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from .adapter_set import AdapterSet, adapter_set
from .autocast import autocast
from .calls import Backend, Call, checked_call, facts_of, rounds_input, transposed
from .checks import check_options
from .cost_model import LAUNCH, ceilings, of_cublas
from .dispatch import plan
from .kernels.device import device_info
from .kernels.dropout import dropout_threshold
from .kernels.sizes import cdiv, padded
from .multi_backends import Adapted, MultiPlan, Strategy
from .multi_rows import Segments, row_groups
from .quantized_weight import QuantizedWeight, Weight
from .sharded import is_distributed

# A piece's product waits for its loads, which the GEMM's K loop does not.
_UNPIPELINED = 3
_TILE_M = 128
_MAX_CALLS = 256
EXPAND_ROWS = 256  # up to here y is nothing beside the weight, and the GEMM cannot fill a GPU


def predicted_extra(call: Call, groups: int) -> dict[Strategy, float]:
    """Cost of adding h B as a fraction of the base GEMM's time; making h costs both the same.

    split    each piece of a tile is r_pad / K of the GEMM, and its loads are waited for; the GEMM
             is a kernel, not cuBLAS's
    expand   one more read and write of y, and one more launch
    """
    device = device_info(call.device)
    flops, bandwidth = ceilings(device)
    gemm = 2 * call.M * call.N * call.K / flops
    if gemm == 0:
        return {"split": 0.0, "expand": 0.0}
    tiles = cdiv(call.M, _TILE_M)
    pieces_per_tile = (tiles + groups) / tiles
    touch_y = 2 * call.dtype.itemsize * call.M * call.N / bandwidth
    adapters = _UNPIPELINED * pieces_per_tile * padded(call.r) / call.K
    return {
        "split": (1 + adapters) / of_cublas(device, "second") - 1,
        "expand": (touch_y + LAUNCH) / gemm,
    }


def _strategy(call: Call, groups: int) -> Strategy:
    if call.M <= EXPAND_ROWS or rounds_input(call):  # split has no x in fp8
        return "expand"
    extra = predicted_extra(call, groups)
    return min(extra, key=extra.__getitem__)


@functools.lru_cache(maxsize=4096)
def plan_multi(call: Call, groups: int, backend: Backend) -> MultiPlan:
    """The decision for a batch with this many adapters in it, "none" being one."""
    chosen = plan(call, backend, "part")
    if chosen.backend == "torch":
        return MultiPlan("torch", "library", "library")
    strategy, strategy_dx = _strategy(call, groups), _strategy(transposed(call), groups)
    return MultiPlan(
        "triton",
        strategy,
        strategy_dx,
        in_loop=chosen.strategy == "in_loop" and strategy == "expand",
        in_loop_dx=chosen.strategy_dx == "in_loop" and strategy_dx == "expand",
    )


class CheckedCall(NamedTuple):
    """A call whose arguments are right, as autocast would have them, and the decision."""

    x: Tensor
    bias: Tensor | None
    layer: Adapted  # without its dropout
    known: AdapterSet
    call: Call
    plan: MultiPlan


def checked(
    x: Tensor,
    weight: Weight,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: float | Sequence[float],
    adapter_indices: Tensor | Sequence[int] | None,
    segments: Segments | None,
    bias: Tensor | None,
    dropout_p: float,
    backend: Backend,
) -> CheckedCall:
    """What the call is; TypeError or ValueError if an argument is wrong."""
    known = adapter_set(lora_As, lora_Bs, scalings)
    check_options(weight, 1.0, dropout_p, backend)
    x, weight, bias = autocast(x, weight, bias)
    if is_distributed():
        from . import layouts

        plain = None if isinstance(weight, QuantizedWeight) else weight
        kinds = [t for i in known.kinds for t in (lora_As[i], lora_Bs[i])]
        if layouts.has_dtensor(x, plain, bias, *kinds):
            raise TypeError("lora_linear_multi: got DTensors, wanted plain tensors")
    call = _checked_call(x, weight, lora_As, lora_Bs, bias, dropout_threshold(dropout_p) > 0, known)
    rows = row_groups(x.shape[:-1], x.device, len(lora_As), adapter_indices, segments)
    layer = Adapted(weight, lora_As, lora_Bs, known.scalings, None, rows, known.layout)
    if backend != "torch" and known.mixed:
        if backend == "triton":
            raise TypeError(f'backend="triton" cannot take this call: {known.mixed}')
        backend = "torch"
    chosen = plan_multi(call, rows.num_groups, backend)
    return CheckedCall(x, bias, layer, known, call, chosen)


def _checked_call(
    x: Tensor,
    weight: Weight,
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    bias: Tensor | None,
    dropout: bool,
    known: AdapterSet,
) -> Call:
    """The call as its largest adapter alone would be; each kind of adapter is checked once."""
    try:
        key = (facts_of(x), facts_of(weight), None if bias is None else facts_of(bias), dropout)
    except (AttributeError, RuntimeError):  # not a tensor, or nested ones: the checks say which
        key = None
    if key in known.calls:
        return known.calls[key]
    calls = []
    for i in known.kinds:
        try:
            calls.append(checked_call(x, weight, lora_As[i], lora_Bs[i], bias, dropout))
        except (TypeError, ValueError) as error:
            message = re.sub(r"\b(lora_[AB])\b", rf"\1s[{i}]", str(error))
            raise type(error)(message) from None
    largest = max(calls, key=lambda call: call.r)
    call = replace(largest, plain_tensors=all(call.plain_tensors for call in calls))
    if len(known.calls) >= _MAX_CALLS:
        known.calls.clear()
    known.calls[key] = call
    return call
