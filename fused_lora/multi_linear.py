"""`FusedMultiLoRALinear`: a frozen linear layer with several named adapters, and `route`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .dispatch import Backend
from .linear import FusedLoRALinear
from .multi import lora_linear_multi

BASE = "__base__"  # PEFT's name for no adapter
NamedSegments = Sequence[tuple[str, int]]


class FusedMultiLoRALinear(nn.Module):
    """y = x W0^T + bias + scaling_i * (D o x) A_i^T B_i^T with each row's own adapter i.

    Args:
        in_features, out_features: K and N.
        lora_dropout: dropout probability in [0, 1) on the adapters' input, in training only; one
            for all, since they share a mask.
        bias: whether the base layer has a bias (frozen).
        device, dtype: of ``weight`` and ``bias``.
        backend: "auto", "triton" or "torch", as for `lora_linear_multi`.

    Attributes:
        weight [N, K], bias [N] or None: frozen parameters.
        lora_A.<name> [r, K], lora_B.<name> [N, r]: trainable parameters of each adapter.
        r, lora_alpha, scaling: by adapter's name.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> None:
        checks.check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._adopt(base, lora_dropout, backend)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, lora_dropout: float = 0.0, backend: Backend = "auto"
    ) -> FusedMultiLoRALinear:
        """A layer over ``linear``'s own weight and bias: the storage is shared, not copied.

        Raises TypeError unless ``linear`` is exactly an `nn.Linear`.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear: got {type(linear).__name__}, wanted torch.nn.Linear")
        layer = cls.__new__(cls)
        layer._adopt(linear, lora_dropout, backend)
        return layer.train(linear.training)

    def _adopt(self, base: nn.Linear, lora_dropout: float, backend: Backend) -> None:
        super().__init__()
        checks.check_dropout("lora_dropout", lora_dropout)
        checks.check_backend(backend)
        checks.check_dtype("the base weight's dtype", base.weight.dtype)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_dropout = float(lora_dropout)
        self.backend: Backend = backend
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        if base.bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self._route: dict[str, Any] = {}

    def add_adapter(
        self,
        name: str,
        r: int = 8,
        lora_alpha: float = 16,
        *,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """Adds an adapter that starts at zero, as `FusedLoRALinear`'s does.

        ``adapter_dtype``: None is float32 over a bf16 or fp16 base, else the base's own.
        Raises TypeError or ValueError, and adds nothing, if an argument is invalid, the name taken
        or not one that a parameter can have.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: got {type(name).__name__}, wanted a string")
        if not name or "." in name or name == BASE or hasattr(nn.ParameterDict, name):
            raise ValueError(f"name: got {name!r}, which no adapter can be called")
        if name in self.lora_A:
            raise ValueError(f"name: there is an adapter {name!r} already")
        checks.check_rank(r)
        checks.check_number("lora_alpha", lora_alpha)
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(self.weight.dtype, torch.float32)
        checks.check_dtype("adapter_dtype", adapter_dtype)
        factory: dict[str, Any] = {"device": self.weight.device, "dtype": adapter_dtype}
        self.lora_A[name] = nn.Parameter(torch.empty((r, self.in_features), **factory))
        self.lora_B[name] = nn.Parameter(torch.zeros((self.out_features, r), **factory))
        nn.init.kaiming_uniform_(self.lora_A[name], a=math.sqrt(5))
        self.r[name], self.lora_alpha[name] = r, lora_alpha
        self.scaling[name] = FusedLoRALinear.scaling_of(lora_alpha, r, use_rslora)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter. Raises ValueError if there is none of that name."""
        self._index(name)
        for by_name in (self.lora_A, self.lora_B, self.r, self.lora_alpha, self.scaling):
            del by_name[name]

    @property
    def adapters(self) -> list[str]:
        """Their names, in the order of their indices."""
        return list(self.lora_A.keys())

    def forward(
        self,
        x: Tensor,
        *,
        adapter_names: str | Sequence[str] | None = None,
        adapter_indices: Tensor | Sequence[int] | None = None,
        segments: NamedSegments | None = None,
    ) -> Tensor:
        """x [..., in_features] -> y [..., out_features].

        Args:
            adapter_names: of each sample x[i], as in PEFT; or one name for all. "__base__" is none.
            adapter_indices: of each row, as for `lora_linear_multi`, in the order of ``adapters``.
            segments: (name, rows) for each stretch of rows.

        One of the three, or none inside `route`, which then says it. Raises what
        `lora_linear_multi` does.
        """
        given: dict[str, Any] = {
            "adapter_names": adapter_names,
            "adapter_indices": adapter_indices,
            "segments": segments,
        }
        given = {key: value for key, value in given.items() if value is not None} or self._route
        if len(given) != 1:
            raise ValueError(
                f"adapter_names, adapter_indices, segments: got {len(given)} of the three, wanted "
                "one, or a call inside fused_lora.route"
            )
        rows = _rows_by_index(x, self._index, **given)
        if not self.lora_A:  # nothing but "__base__" passed
            return F.linear(x, self.weight, self.bias)
        return lora_linear_multi(
            x,
            self.weight,
            list(self.lora_A.values()),
            list(self.lora_B.values()),
            scalings=list(self.scaling.values()),
            bias=self.bias,
            dropout_p=self.lora_dropout if self.training else 0.0,
            backend=self.backend,
            **rows,
        )

    def _index(self, name: str) -> int:
        if name == BASE:
            return -1
        names = self.adapters
        if name not in names:
            raise ValueError(f"adapter: got {name!r}, wanted one of {[*names, BASE]}")
        return names.index(name)

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}",
            f"bias={self.bias is not None}, r={self.r}",
        ]
        if self.lora_dropout:
            parts.append(f"lora_dropout={self.lora_dropout}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        return ", ".join(parts)


def sample_segments(x: Tensor, indices: Sequence[int]) -> list[tuple[int, int]]:
    """(index, rows) for an adapter's index for each sample x[i], which may have many rows."""
    if x.ndim < 2 or len(indices) != len(x):
        raise ValueError(
            f"adapter_names: got {len(indices)}, wanted one for each sample of x {list(x.shape)}"
        )
    rows = x.shape[1:-1].numel()
    return [(index, rows) for index in indices] if rows else []


def _rows_by_index(
    x: Tensor,
    index: Any,
    *,
    adapter_names: str | Sequence[str] | None = None,
    adapter_indices: Tensor | Sequence[int] | None = None,
    segments: NamedSegments | None = None,
) -> dict[str, Any]:
    if isinstance(adapter_names, str):
        rows = x.shape[:-1].numel()
        return {"segments": [(index(adapter_names), rows)] if rows else []}
    if adapter_names is not None:
        return {"segments": sample_segments(x, [index(name) for name in adapter_names])}
    if segments is not None:
        return {"segments": [(index(name), rows) for name, rows in segments]}
    return {"adapter_indices": adapter_indices}


@contextmanager
def route(
    model: nn.Module,
    *,
    adapter_names: str | Sequence[str] | None = None,
    adapter_indices: Tensor | Sequence[int] | None = None,
    segments: NamedSegments | None = None,
) -> Iterator[None]:
    """Inside, every `FusedMultiLoRALinear` of ``model`` is called as with this argument.

    For models whose forward passes x alone. The backward pass may be outside, unless activation
    checkpointing runs the forward again in it.

        with route(model, segments=[("german", 700), ("french", 324)]):
            loss = model(packed).loss
    """
    given = {
        "adapter_names": adapter_names,
        "adapter_indices": adapter_indices,
        "segments": segments,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            f"adapter_names, adapter_indices, segments: got {len(given)} of the three, wanted one"
        )
    layers = [module for module in model.modules() if isinstance(module, FusedMultiLoRALinear)]
    if not layers:
        raise ValueError("model: has no FusedMultiLoRALinear")
    before = [layer._route for layer in layers]
    for layer in layers:
        layer._route = given
    try:
        yield
    finally:
        for layer, routed in zip(layers, before, strict=True):
            layer._route = routed
