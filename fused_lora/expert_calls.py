"""What a call of a mixture of experts is, checked, and which way it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .autocast import autocast, autocast_enabled
from .calls import Backend, Call, are_plain
from .dispatch import takes_kernels
from .expert_backends import Path
from .expert_stack import Projection
from .kernels.dropout import dropout_threshold
from .kernels.rows import RowGroups, groups_of_indices
from .multi_rows import INTEGERS
from .quantized_weight import QuantizedWeight


@dataclass(frozen=True)
class Routing:
    """Where each row of a batch goes: made once for all projections of a batch's experts."""

    groups: RowGroups
    shape: torch.Size  # of the indices
    experts: Tensor  # int32 [M]: each row's, -1 for none


def routing_of(expert_indices: Tensor, num_experts: int) -> Routing:
    """The rows' order by expert; an index that is no expert's is none. Waits for no GPU."""
    flat = expert_indices.flatten().long()  # in int8 there is no 200 to compare with
    known = (flat >= 0) & (flat < num_experts)
    experts = torch.where(known, flat.to(torch.int32), -1)
    return Routing(groups_of_indices(experts, num_experts), expert_indices.shape, experts)


class CheckedExperts(NamedTuple):
    """A call whose arguments are right."""

    x: Tensor  # this and the bias as autocast would have them
    layer: Projection
    threshold: int
    fan: int


def checked(
    x: Tensor, layer: Projection, indexed: torch.Size, dropout_p: float, backend: Backend
) -> CheckedExperts:
    """The call, ``indexed`` being the indices' shape; TypeError or ValueError if it is wrong."""
    weight, bias, lora_A, lora_B, scaling = layer
    checks.check_options(weight, scaling, dropout_p, backend)
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and autocast_enabled(x):
        # It is cast where it is used, and kept as it is: this one is without values.
        weight = autocast(x, weight.new_empty(1), None)[1].expand(weight.shape)
    x, _, bias = autocast(x, None, bias)
    checks.check_experts(x, weight, lora_A, lora_B, bias, indexed)
    threshold = dropout_threshold(dropout_p) if lora_A is not None else 0
    fan = 1 if x.shape[:-1] == indexed else indexed[-1]
    return CheckedExperts(x, layer._replace(bias=bias), threshold, fan)


def call_of(x: Tensor, layer: Projection, M: int, *, dropout: bool) -> Call:
    """What the choice of a backend depends on, of a call with M rows of some expert's."""
    weight, bias, lora_A, lora_B, _ = layer
    tensors = [t for t in (x, weight, lora_A, lora_B, bias) if isinstance(t, Tensor)]
    return Call(
        M=M,
        N=weight.shape[1],
        K=weight.shape[2],
        r=1 if lora_A is None else lora_A.shape[1],
        dtype=x.dtype,
        device=x.device,
        dropout=dropout,
        plain_tensors=all(are_plain(t) for t in tensors),
        quantized=weight.layout if isinstance(weight, QuantizedWeight) else None,
    )


def path_of(call: Call, backend: Backend) -> Path:
    """The kernels, if they take it; raises why not if "triton" was asked for."""
    return "triton" if takes_kernels(call, backend) else "torch"


def check_indices(x: object, indices: object) -> None:
    """TypeError or ValueError unless they are integers beside x."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"expert_indices: got {type(indices).__name__}, wanted a torch.Tensor")
    if indices.dtype not in INTEGERS or indices.layout != torch.strided:
        got = f"dtype {indices.dtype}, layout {indices.layout}"
        raise TypeError(f"expert_indices: got {got}, wanted a dense tensor of integers")
    if isinstance(x, Tensor) and indices.device != x.device:
        raise ValueError(f"expert_indices: is on {indices.device}, wanted x's device, {x.device}")
