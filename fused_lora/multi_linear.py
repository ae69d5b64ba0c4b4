"""`FusedMultiLoRALinear`: a frozen linear layer with several named adapters, and `route`."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks
from .calls import Backend
from .codes import Format
from .explanation import Explanation
from .frozen import FrozenLinear, check_linear, read_base
from .initial import adapter_dtype_over, initial_values, scaling_of
from .multi import explain_multi, lora_linear_multi
from .quantize import Quantizer
from .quantized_weight import QuantizedWeight, Weight

BASE = "__base__"  # PEFT's name for no adapter
NamedSegments = Sequence[tuple[str, int]]


class _Route(NamedTuple):
    """What `route` says to a layer."""

    given: dict[str, Any]  # which row takes which adapter
    known: Iterable[str]  # adapters of all layers
    thread: int


class FusedMultiLoRALinear(FrozenLinear):
    """y = x W0^T + bias + scaling_i * (D o x) A_i^T B_i^T with each row's own adapter i.

    Args:
        in_features, out_features: K and N.
        lora_dropout: dropout probability in [0, 1) on the adapters' input, in training only; one
            for all, since they share a mask.
        bias: whether the base layer has a bias (frozen).
        device, dtype: of ``weight`` and ``bias``.
        backend: "auto", "triton" or "torch", as for `lora_linear_multi`.

    Attributes:
        weight [N, K], bias [N] or None: see `FrozenLinear`.
        lora_A.<name> [r, K], lora_B.<name> [N, r]: trainable parameters of each adapter.
        r, lora_alpha, use_rslora, scaling: by adapter's name.
    """

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
        check_linear(in_features, out_features, bias, dtype)
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._adopt(base.weight, base.bias, lora_dropout, backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | QuantizedWeight,
        *,
        lora_dropout: float = 0.0,
        backend: Backend = "auto",
        quantize: Format | Quantizer | None = None,
    ) -> FusedMultiLoRALinear:
        """A layer over ``linear``'s own weight and bias: the storage is shared, not copied.

        ``linear``, ``quantize``: as for `FusedLoRALinear.from_linear`, quantised layers included.
        Raises what that does.
        """
        weight, bias = read_base(linear, quantize)
        layer = cls.__new__(cls)
        layer._adopt(weight, bias, lora_dropout, backend)
        return layer.train(linear.training)

    def _adopt(
        self,
        weight: Weight,
        bias: Tensor | None,
        lora_dropout: float,
        backend: Backend,
    ) -> None:
        self._adopt_base(weight, bias, lora_dropout, backend)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self._route: _Route | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is outside of any `route`, too."""
        super().__setstate__(state)
        self._route = None

    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        """Adds an adapter that starts at zero, as `FusedLoRALinear`'s does.

        ``adapter_dtype``: None is float32 over a bf16 or fp16 base, else the base's own.
        Raises TypeError or ValueError, and adds nothing, if an argument is invalid, the name taken
        or not one that a parameter can have.
        """
        check_name("adapter_name", adapter_name)
        if adapter_name in self.lora_A:
            raise ValueError(f"adapter_name: there is an adapter {adapter_name!r} already")
        checks.check_rank(r)
        checks.check_number("lora_alpha", lora_alpha)
        checks.check_flag("use_rslora", use_rslora)
        if adapter_dtype is None:
            adapter_dtype = adapter_dtype_over(self.weight.dtype)
        checks.check_dtype("adapter_dtype", adapter_dtype)
        scaling = scaling_of(lora_alpha, r, use_rslora)
        start = initial_values(True, self.weight, r, scaling)
        factory: dict[str, Any] = {"device": self.weight.device, "dtype": adapter_dtype}
        self.lora_A[adapter_name] = nn.Parameter(start.lora_A.to(**factory))
        self.lora_B[adapter_name] = nn.Parameter(start.lora_B.to(**factory))
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = use_rslora
        self.scaling[adapter_name] = scaling

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. Raises ValueError if there is none of that name."""
        if adapter_name not in self.adapters:
            raise ValueError(f"adapter_name: got {adapter_name!r}, wanted one of {self.adapters}")
        numbers = (self.r, self.lora_alpha, self.use_rslora, self.scaling)
        for by_name in (self.lora_A, self.lora_B, *numbers):
            del by_name[adapter_name]

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
        if self.disabled:
            return self._base(x)
        rows = self._rows(x, adapter_names, adapter_indices, segments)
        if not self.lora_A:  # nothing but "__base__" passed
            return self._base(x)
        options = self._options() | rows
        return lora_linear_multi(x, *self._tensors(), **options)

    def explain(
        self,
        x: Tensor,
        *,
        adapter_names: str | Sequence[str] | None = None,
        adapter_indices: Tensor | Sequence[int] | None = None,
        segments: NamedSegments | None = None,
    ) -> Explanation:
        """Which backend and strategy `forward` takes for these arguments, and why.

        `explain_multi` with the layer's own tensors; raises what that does, computes nothing.
        """
        rows = {} if self.disabled else self._rows(x, adapter_names, adapter_indices, segments)
        if self.disabled or not self.lora_A:
            why = "its adapters are disabled" if self.disabled else "the layer has no adapter"
            return self._explain_base(why)
        options = self._options() | rows
        return explain_multi(x, *self._tensors(), **options)

    def _rows(
        self,
        x: Tensor,
        adapter_names: str | Sequence[str] | None,
        adapter_indices: Tensor | Sequence[int] | None,
        segments: NamedSegments | None,
    ) -> dict[str, Any]:
        """The argument of `lora_linear_multi` that says which row takes which adapter."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, wanted a torch.Tensor")
        given: dict[str, Any] = {
            "adapter_names": adapter_names,
            "adapter_indices": adapter_indices,
            "segments": segments,
        }
        given = {key: value for key, value in given.items() if value is not None}
        elsewhere: Iterable[str] = ()
        if not given and self._route is not None:
            given, elsewhere = self._route.given, self._route.known
        if not (given or self.lora_A):  # no adapter, and nothing that names one
            return {}
        if len(given) != 1:
            raise ValueError(
                "adapters: wanted a call inside fused_lora.route(model, adapter_names=...), or one "
                f"of adapter_names, adapter_indices, segments; got {len(given)} of the three"
            )
        index = dict.fromkeys((BASE, *elsewhere), -1)
        index |= {name: i for i, name in enumerate(self.adapters)}
        return _rows_by_index(x, index, **given)

    def _tensors(self) -> tuple[Weight, list[Tensor], list[Tensor]]:
        names = self.adapters
        return self.weight, _values(self.lora_A, names), _values(self.lora_B, names)

    def _options(self) -> dict[str, Any]:
        return {
            "scalings": [self.scaling[name] for name in self.adapters],
            "bias": self.bias,
            "dropout_p": self.lora_dropout if self.training else 0.0,
            "backend": self.backend,
        }

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


def check_name(argument: str, name: object) -> None:
    """Raises TypeError or ValueError unless an adapter can have this name."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: got {type(name).__name__}, wanted a string")
    if not name or "." in name or name == BASE or hasattr(nn.ParameterDict(), name):
        raise ValueError(
            f"{argument}: got {name!r}, which no adapter can be called: wanted a name without a "
            f"dot, not {BASE!r} and no attribute of nn.ParameterDict"
        )


def _values(adapters: nn.ParameterDict, names: list[str]) -> list[Tensor]:
    """In the order of the names; a ParameterDict takes 0.5 us to look one up."""
    parameters: dict[str, Any] = adapters._parameters
    if list(parameters) == names:
        return list(parameters.values())
    return [adapters[name] for name in names]  # put in by hand, or parametrised


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
    index: Mapping[str, int],
    *,
    adapter_names: str | Sequence[str] | None = None,
    adapter_indices: Tensor | Sequence[int] | None = None,
    segments: NamedSegments | None = None,
) -> dict[str, Any]:
    if adapter_indices is not None:
        return {"adapter_indices": adapter_indices}
    names = _checked_names(index, adapter_names, segments)
    if isinstance(adapter_names, str):
        rows = x.shape[:-1].numel()
        return {"segments": [(index[adapter_names], rows)] if rows else []}
    if adapter_names is not None:
        return {"segments": sample_segments(x, [index[name] for name in names])}
    assert segments is not None
    return {"segments": [(index[name], rows) for name, rows in segments]}


def _checked_names(
    known: Collection[str],
    adapter_names: str | Sequence[str] | None,
    segments: NamedSegments | None,
) -> Sequence[str]:
    """The names that one of the two arguments gives; TypeError or ValueError for any other."""
    argument, names = "adapter_names", adapter_names
    if adapter_names is None:
        argument = "segments"
        if not isinstance(segments, (list, tuple)):
            raise TypeError(f"segments: got {type(segments).__name__}, wanted a list of pairs")
        for i, segment in enumerate(segments):
            if not isinstance(segment, (list, tuple)) or len(segment) != 2:
                raise TypeError(f"segments[{i}]: got {segment!r}, wanted (adapter's name, rows)")
        names = [name for name, _ in segments]
    elif isinstance(adapter_names, str):
        names = [adapter_names]
    if not isinstance(names, (list, tuple)):
        got = type(names).__name__
        raise TypeError(f"adapter_names: got {got}, wanted a name or a list of names")
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"{argument}: got {name!r}, wanted one of {list(known)}")
    return names


_entering = threading.Lock()


@contextmanager
def route(
    model: nn.Module,
    *,
    adapter_names: str | Sequence[str] | None = None,
    adapter_indices: Tensor | Sequence[int] | None = None,
    segments: NamedSegments | None = None,
) -> Iterator[None]:
    """Inside, every `FusedMultiLoRALinear` of ``model`` is called as with this argument.

    For models whose forward passes x alone; entered outside of a compiled function. As in PEFT, an
    adapter that a layer does not have is none there, if another layer has it. The backward pass may
    be outside, unless activation checkpointing runs the forward again in it. One thread's at a
    time: calls of other threads follow it too (a generation, a checkpoint's second forward). A
    generation by beams repeats each sample ``num_beams`` times: so does ``adapter_names`` for it.

        with route(model, segments=[("german", 700), ("french", 324)]):
            loss = model(packed).loss

    Raises TypeError: an argument is of the wrong type. ValueError: not one of the three is given,
    no layer has an adapter of a name, or ``adapter_indices`` is given and the layers do not have
    the same adapters in the same order. RuntimeError: another thread is inside `route` with one of
    the layers.
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
    checks.check_module("model", model)
    layers = [module for module in model.modules() if isinstance(module, FusedMultiLoRALinear)]
    if not layers:
        raise ValueError(
            "model: has no FusedMultiLoRALinear; wanted one with fused_lora.add_adapter's adapters"
        )
    orders = {tuple(layer.adapters): None for layer in layers}
    if adapter_indices is not None and len(orders) > 1:
        raise ValueError(
            f"adapter_indices: the layers' adapters differ, {' and '.join(map(str, orders))}; "
            "wanted adapter_names or segments"
        )
    known = dict.fromkeys(name for order in orders for name in order)
    if adapter_indices is None:
        _checked_names({BASE: None, **known}, adapter_names, segments)
    elif not isinstance(adapter_indices, (Tensor, list, tuple)):
        got = type(adapter_indices).__name__
        raise TypeError(f"adapter_indices: got {got}, wanted a tensor or a list of integers")
    entered = _Route(given, known, threading.get_ident())
    with _entering:
        before = [layer._route for layer in layers]
        if any(outer is not None and outer.thread != entered.thread for outer in before):
            raise RuntimeError(
                "model: another thread is inside route with it, and either would get the other's "
                "adapters; wanted one at a time, or adapter_names at each layer's call"
            )
        for layer in layers:
            layer._route = entered
    try:
        yield
    finally:
        for layer, routed in zip(layers, before, strict=True):
            layer._route = routed
