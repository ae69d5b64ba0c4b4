"""`FrozenLinear`: the frozen layer that adapters are over."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import checks, foreign
from .calls import Backend
from .codes import Format
from .explanation import Explanation
from .functional import base_linear
from .quantize import Quantizer, quantize
from .quantized_weight import QuantizedWeight, Weight
from .switch import Switchable


class FrozenLinear(Switchable):
    """y = x W0^T + bias, both frozen: what `FusedLoRALinear` and `FusedMultiLoRALinear` share.

    Attributes:
        weight [N, K], bias [N] or None: frozen parameters, named as in `nn.Linear`. The weight may
            be a `QuantizedWeight`, which has its own keys in the state dict.
        lora_dropout, backend: as the adapters' layers take them.
        disabled: how many `disable_adapter` blocks the layer is in.
    """

    weight: nn.Parameter | QuantizedWeight
    bias: nn.Parameter | None

    def _adopt_base(
        self,
        weight: Weight,
        bias: Tensor | None,
        lora_dropout: float,
        backend: Backend,
    ) -> None:
        """In place of ``__init__``: the storage is shared, the parameters are new objects."""
        super().__init__()
        checks.check_dropout("lora_dropout", lora_dropout)
        checks.check_backend(backend)
        checks.check_dtype("the base weight's dtype", weight.dtype)
        self.out_features, self.in_features = weight.shape
        self.lora_dropout = float(lora_dropout)
        self.backend: Backend = backend
        if isinstance(weight, QuantizedWeight):
            self.weight = weight
        else:
            self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias.detach(), requires_grad=False)

    def _base(self, x: Tensor) -> Tensor:
        return base_linear(x, self.weight, self.bias)

    def _explain_base(self, why: str) -> Explanation:
        reasons = {"library": f"taken: F.linear, as {why}"}
        if isinstance(self.weight, QuantizedWeight):
            how = "turned into values once, in a scratch tensor"
            reasons["quantised W0"] = f"{self.weight.layout.format}, {how}"
        return Explanation("torch", "library", "library", reasons)


def check_linear(
    in_features: object, out_features: object, bias: object, dtype: torch.dtype | None
) -> None:
    """TypeError or ValueError for what makes no frozen `nn.Linear`."""
    checks.check_integer("in_features", in_features, 0)
    checks.check_integer("out_features", out_features, 0)
    checks.check_flag("bias", bias)
    checks.check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)


def read_base(
    linear: nn.Linear | QuantizedWeight, format: Format | Quantizer | None
) -> tuple[Weight, Tensor | None]:
    """A layer's weight, in codes if that is asked for or it is, and its bias.

    Raises TypeError for what is no linear layer, ValueError for the codes of experts, or if
    ``format`` is asked of codes.
    """
    if isinstance(linear, QuantizedWeight):
        if len(linear.shape) != 2:
            raise ValueError(f"linear: got a weight {list(linear.shape)}, wanted one [N, K]")
        weight, bias = linear, None
    elif type(linear) is nn.Linear and not foreign.is_quantized(linear):
        return linear.weight if format is None else quantize(linear.weight, format), linear.bias
    else:
        weight, bias = foreign.read(linear), linear.bias
    if format is not None:
        raise ValueError(
            f"quantize: got {format!r}, but the weight is in {weight.layout.format} codes already, "
            "which are taken as they are; wanted None"
        )
    return weight, bias
