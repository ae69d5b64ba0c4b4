"""`Arguments`: what a layer passes on."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .dispatch import Backend
from .quantize import QuantizedWeight


class Arguments(NamedTuple):
    """What a layer passes to `lora_linear` besides x."""

    weight: Tensor | QuantizedWeight
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
        codes = [] if isinstance(self.weight, Tensor) else list(self.weight.parameters())
        return [*codes, *(t for t in self if isinstance(t, Tensor))]

    def same(self, other: Arguments) -> bool:
        """The same tensors (not equal ones) and the same numbers."""
        return all(
            a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
            for a, b in zip(self, other, strict=True)
        )
