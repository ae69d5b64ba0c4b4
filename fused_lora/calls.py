"""`Call`: all of a call that the choice of its kernels depends on, checked once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from . import checks
from .quantized_weight import Layout, QuantizedWeight, Weight
from .tables import Direction

Backend = Literal["auto", "triton", "torch"]


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
    # No subclasses (DTensor, quantised weights of others, ...), no lazily negated z.conj().imag
    plain_tensors: bool
    quantized: Layout | None = None  # W0's, if it is a QuantizedWeight
    direction: Direction = "forward"  # for dx, N and K are the other way round: see `transposed`
    adapter_dtypes: tuple[torch.dtype, ...] = ()  # A's and B's: no choice depends on them


def transposed(call: Call) -> Call:
    """The call as its input gradient sees it. Gradients are not rounded to fp8."""
    layout = call.quantized and replace(call.quantized, activations=None)
    return replace(call, N=call.K, K=call.N, quantized=layout, direction="dx")


def rounds_input(call: Call) -> bool:
    """Whether x is rounded to fp8 before it is multiplied by W0."""
    return call.quantized is not None and call.quantized.activations == "fp8"


def are_plain(t: Tensor) -> bool:
    """Whether kernels may read it: no subclass, and not lazily negated."""
    return type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg()


def _describe(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout: bool,
) -> Call:
    N, K = weight.shape
    quantized = weight.layout if isinstance(weight, QuantizedWeight) else None
    tensors = (x, weight if isinstance(weight, Tensor) else None, lora_A, lora_B, bias)
    return Call(
        M=x.numel() // K if K else x.shape[:-1].numel(),
        N=N,
        K=K,
        r=lora_A.shape[0],
        dtype=x.dtype,
        device=x.device,
        dropout=dropout,
        plain_tensors=all(t is None or are_plain(t) for t in tensors),
        quantized=quantized,
        adapter_dtypes=(lora_A.dtype, lora_B.dtype),
    )


def facts_of(tensor: Weight) -> tuple[object, ...]:
    """All that `checked_call` looks at in a tensor."""
    negated = isinstance(tensor, Tensor) and tensor.is_neg()
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout, type(tensor), negated


_calls: dict[tuple[object, ...], Call] = {}  # a checked call by the facts about its arguments
_MAX_CALLS = 4096


def checked_call(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout: bool,
) -> Call:
    """What the call is, or the TypeError or ValueError of `checks.check_tensors`.

    What was checked once is not checked again: 5 instead of 11 us a call.
    """
    try:
        facts = (facts_of(x), facts_of(weight), facts_of(lora_A), facts_of(lora_B))
        key = (facts, None if bias is None else facts_of(bias), dropout)
        call = _calls.get(key)
    except (AttributeError, RuntimeError):  # not a tensor, or nested ones: the checks say which
        call = None
    if call is None:
        checks.check_tensors(x, weight, lora_A, lora_B, bias)
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        call = _calls[key] = _describe(x, weight, lora_A, lora_B, bias, dropout)
    return call


Operands = tuple[Any, ...]  # x, W0, A and B, or nothing
Matrices = tuple[Tensor, Tensor, Tensor]


def as_values(weight: Weight, dtype: torch.dtype) -> Tensor:
    """W0, or one like the scratch tensor of a quantised one, without data."""
    if isinstance(weight, Tensor):
        return weight
    return torch.empty(weight.shape, dtype=dtype, device="meta")


def as_products(operands: Operands, dtype: torch.dtype) -> tuple[Matrices, Matrices]:
    """x, w and a of y = x w + (x a) b, and of dx's product, whose x is the gradient, contiguous."""
    x, weight, lora_A, lora_B = operands
    weight = as_values(weight, dtype)
    x = x.flatten(0, -2) if x.ndim > 1 else x[None]
    g = torch.empty((len(x), len(weight)), dtype=dtype, device="meta")
    return (x, weight.t(), lora_A.t()), (g, weight, lora_B)
