"""`Arguments`: what a layer passes on."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .calls import Backend
from .quantized_weight import Weight


class Arguments(NamedTuple):
    """What a layer passes to `lora_linear` besides x."""

    weight: Weight
    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    bias: Tensor | None
    dropout_p: float
    backend: Backend

    def options(self) -> dict[str, Any]:
        """What `lora_linear`, `dora_linear` and `explain` take by name."""
        return {
            "scaling": self.scaling,
            "bias": self.bias,
            "dropout_p": self.dropout_p,
            "backend": self.backend,
        }

    def tensors(self) -> list[Tensor]:
        W, bias = self.weight, self.bias
        tensors: list[Tensor] = [W] if isinstance(W, Tensor) else [*W.parameters()]
        tensors += (self.lora_A, self.lora_B) if bias is None else (self.lora_A, self.lora_B, bias)
        return tensors

    def same(self, other: Arguments) -> bool:
        """The same tensors (not equal ones) and the same numbers."""
        return (
            self.weight is other.weight
            and self.lora_A is other.lora_A
            and self.lora_B is other.lora_B
            and self.scaling == other.scaling
            and self.bias is other.bias
            and self[5:] == other[5:]
        )
