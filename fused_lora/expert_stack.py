"""What the layers of a mixture of experts are made of, and how the products read it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.dropout import Dropout
from .kernels.rows import AdapterStack, RowGroups
from .quantized_weight import Weight


class ExpertAdapter(NamedTuple):
    """Of one projection: A [E, r, in], B [E, out, r], any strides."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    @classmethod
    def of(cls, A: Tensor, B: Tensor, num_experts: int, scaling: float) -> ExpertAdapter:
        """Of PEFT's A [E r, in], expert after expert, and B [out, r E], rank after rank: views."""
        of_A = A.view(num_experts, -1, A.shape[1])
        of_B = B.view(len(B), -1, num_experts).permute(2, 0, 1)
        return cls(of_A, of_B, scaling)


class Projection(NamedTuple):
    """Of all experts, as a caller has it."""

    weight: Weight  # [E, out, in], any strides
    bias: Tensor | None  # [E, out]
    lora_A: Tensor | None = None  # these as of `ExpertAdapter`, or both None
    lora_B: Tensor | None = None
    scaling: float = 1.0


class Experts(NamedTuple):
    """A projection as the products read it, and which rows of the order take which expert."""

    weight: Weight  # [E, N, K]
    lora_A: Tensor | None  # [E, r, K], contiguous
    lora_B: Tensor | None  # [E, N, r], contiguous
    scaling: float
    dropout: Dropout | None
    rows: RowGroups
    fan: int = 1  # how many rows of the order each row of x is
    gathers: bool = True  # whether x has rows of the order, and not positions, for rows
    scatters: bool = True  # whether y has
    fan_g: int = 1  # how many rows of the order each row of y's gradient is

    @classmethod
    def of(
        cls, layer: Projection, dtype: torch.dtype, dropout: Dropout | None, rows: RowGroups
    ) -> Experts:
        """For x's dtype. A weight of another one is cast; codes are of any."""
        weight = layer.weight.to(dtype) if isinstance(layer.weight, Tensor) else layer.weight
        A, B = contiguous(layer.lora_A), contiguous(layer.lora_B)  # once for a pass's launches
        return cls(weight, A, B, float(layer.scaling), dropout, rows)

    @property
    def sizes(self) -> tuple[int, int]:
        """Experts, and rows of the order."""
        return self.weight.shape[0], self.rows.M

    def stack(self) -> AdapterStack | None:
        """The adapters as the kernels take them."""
        if self.lora_A is None or self.lora_B is None:
            return None
        return AdapterStack(self.lora_A, self.lora_B, self.scaling)

    def of_x(self) -> RowGroups:
        """The order that x's rows are found by."""
        return self.rows if self.gathers else self.rows.sorted

    def of_y(self) -> RowGroups:
        """Those of y and of its gradient."""
        return self.rows if self.scatters else self.rows.sorted


def contiguous(stack: Tensor | None) -> Tensor | None:
    """A stack of adapters as the products read it; of PEFT's B a copy."""
    return None if stack is None else stack.contiguous()


def laid_out(layer: Projection) -> Projection:
    """With its adapters as the products read them, of PEFT's strided B a copy.

    On a CPU autograd keeps it for the backward, which else makes another one (5 % of a step of 128
    tokens). On a GPU a copy is faster than the memory is worth, and left to the launches.
    """
    if layer.lora_A is None or layer.lora_A.is_cuda:
        return layer
    return layer._replace(lora_A=contiguous(layer.lora_A), lora_B=contiguous(layer.lora_B))
