"""Argument checks: every invalid call ends here, before anything is launched or changed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .observed import is_constant
from .quantized_weight import QuantizedWeight, Weight

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("auto", "triton", "torch")


def check_module(name: str, value: object) -> None:
    """Raises TypeError unless value is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a torch.nn.Module")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless value is True or False: "no" would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r}, wanted True or False")


def check_integer(name: str, value: object, least: int) -> None:
    """Raises TypeError or ValueError unless value is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, wanted an integer of at least {least}")
    if value < least:
        raise ValueError(f"{name}: got {value}, wanted at least {least}")


def check_rank(r: object, name: str = "r") -> None:
    """Raises TypeError or ValueError unless r is an integer of at least 1."""
    check_integer(name, r, 1)


def _check_real(name: str, value: object) -> None:
    if type(value) is float:  # the usual case: an abstract class's check is 0.3 us
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number")


def check_number(name: str, value: object) -> None:
    """Raises TypeError or ValueError unless value is a finite real number."""
    _check_real(name, value)
    # NumPy's fp32 would take the limits as fp32 too, which overflow; an int can be too large.
    number: Any = value if isinstance(value, (float, int)) else float(value)  # type: ignore[arg-type]
    if not -sys.float_info.max <= number <= sys.float_info.max:
        raise ValueError(f"{name}: got {value}, wanted a finite number")


def check_dropout(name: str, p: object) -> None:
    """Raises TypeError or ValueError unless p is a probability in [0, 1)."""
    _check_real(name, p)
    if not 0.0 <= p < 1.0:  # type: ignore[operator]  # so NaN is refused too
        raise ValueError(f"{name}: got {p}, wanted a probability in [0, 1)")


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # accelerate's hooks replace it
    )


def all_are_hooked() -> bool:
    """Whether there are hooks on every module, which a fused layer's parts would not run."""
    return bool(nn.modules.module._has_any_global_hook())  # type: ignore[no-untyped-call]


def check_unhooked(name: str, module: nn.Module) -> None:
    """ValueError if the module, which is to be replaced, has hooks that nobody would run then."""
    if is_hooked(module):
        raise ValueError(
            f"{name}: has hooks (weight_norm's, pruning's, accelerate's, ...) or a forward of its "
            "own, which the layer in its place would not run; remove them, or exclude it"
        )


def check_backend(backend: object) -> None:
    """Raises ValueError unless backend is one of "auto", "triton" and "torch"."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wanted one of {', '.join(BACKENDS)}")


def check_options(weight: Weight, scaling: float, dropout_p: float, backend: object) -> None:
    """TypeError or ValueError for what `check_tensors` does not look at."""
    check_backend(backend)
    if not torch.compiler.is_compiling() or is_constant(scaling):
        check_number("scaling", scaling)
    check_dropout("dropout_p", dropout_p)
    if torch.is_grad_enabled() and getattr(weight, "requires_grad", False):
        raise ValueError(
            "weight: requires a gradient, but LoRA's base weight is frozen and gets none; "
            "call weight.requires_grad_(False) or pass weight.detach()"
        )


def check_dtype(name: str, dtype: object) -> None:
    """Raises TypeError unless dtype is one that a LoRA layer computes in."""
    if dtype not in DTYPES:
        wanted = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{name}: got {dtype}, wanted one of {wanted}")


def check_tensors(
    x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
) -> None:
    """Raises TypeError or ValueError unless types, shapes, dtypes and devices fit together."""
    tensors: dict[str, Any] = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
    if bias is not None:
        tensors["bias"] = bias
    _check_kinds(tensors, x)
    _check_shape("weight", weight, "[out_features, in_features]", (None, None))
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x: got shape {list(x.shape)}, wanted [..., {K}] to fit weight {[N, K]}")
    _check_shape("lora_A", lora_A, f"[r, {K}] to fit weight {[N, K]}", (None, K))
    r = lora_A.shape[0]
    if r == 0:
        raise ValueError(f"lora_A: got shape {list(lora_A.shape)} (r = 0), wanted r of at least 1")
    _check_shape("lora_B", lora_B, f"[{N}, {r}] to fit weight {[N, K]} and lora_A", (N, r))
    if not isinstance(weight, QuantizedWeight) and weight.dtype != x.dtype:
        raise TypeError(f"weight: got dtype {weight.dtype}, wanted x's dtype, {x.dtype}")
    if bias is not None:
        _check_shape("bias", bias, f"[{N}] to fit weight {[N, K]}", (N,))
        if bias.dtype != x.dtype:
            raise TypeError(f"bias: got dtype {bias.dtype}, wanted x's dtype, {x.dtype}")


def _check_kinds(tensors: Mapping[str, Any], x: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, QuantizedWeight):  # which checked itself
            _check_kind(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name}: is on {tensor.device}, wanted x's device, {x.device}")


def _check_kind(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a torch.Tensor")
    check_dtype(f"{name}'s dtype", tensor.dtype)
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: got layout {layout}, wanted a dense tensor")


def check_experts(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    bias: Tensor | None,
    indexed: torch.Size,
) -> None:
    """`check_tensors` of a stack of experts; ``indexed``: the shape of the rows' indices."""
    if (lora_A is None) != (lora_B is None):
        given = "lora_A" if lora_B is None else "lora_B"
        raise ValueError(f"lora_A, lora_B: got {given} alone, wanted both, or None for both")
    named: dict[str, Any] = {
        "x": x,
        "weight": weight,
        "lora_A": lora_A,
        "lora_B": lora_B,
        "bias": bias,
    }
    optional = ("lora_A", "lora_B", "bias")
    _check_kinds({k: t for k, t in named.items() if t is not None or k not in optional}, x)
    _check_shape("weight", weight, "[experts, out_features, in_features]", (None, None, None))
    E, N, K = weight.shape
    fits = f"to fit weight {[E, N, K]}"
    if E == 0:
        raise ValueError(f"weight: got shape {[E, N, K]}, wanted at least one expert")
    rows = list(indexed)
    if list(x.shape) not in ([*rows, K], [*rows[:-1], K]) or (not rows and x.ndim != 1):
        either = f"{[*rows, K]}" + (f" or {[*rows[:-1], K]}" if rows else "")
        wanted = f"{either} to fit weight {[E, N, K]} and expert_indices {rows}"
        raise ValueError(f"x: got shape {list(x.shape)}, wanted {wanted}")
    if x.ndim == len(rows) and rows[-1] == 0:
        raise ValueError(f"expert_indices: got shape {rows}, wanted an expert for each row of x")
    if isinstance(weight, QuantizedWeight):
        check_not_rounding("weight", weight)
    elif weight.dtype != x.dtype:
        raise TypeError(f"weight: got dtype {weight.dtype}, wanted x's dtype, {x.dtype}")
    if lora_A is not None and lora_B is not None:
        _check_shape("lora_A", lora_A, f"[{E}, r, {K}] {fits}", (E, None, K))
        r = lora_A.shape[1]
        if r == 0:
            got = f"got shape {list(lora_A.shape)} (r = 0)"
            raise ValueError(f"lora_A: {got}, wanted r of at least 1")
        _check_shape("lora_B", lora_B, f"[{E}, {N}, {r}] {fits} and lora_A", (E, N, r))
    if bias is not None:
        _check_shape("bias", bias, f"[{E}, {N}] {fits}", (E, N))
        if bias.dtype != x.dtype:
            raise TypeError(f"bias: got dtype {bias.dtype}, wanted x's dtype, {x.dtype}")
        if torch.is_grad_enabled() and bias.requires_grad:
            raise ValueError("bias: requires a gradient, but the experts' is frozen and gets none")


def check_not_rounding(name: str, weight: QuantizedWeight) -> None:
    """ValueError for codes of experts that ask for an x in fp8."""
    if weight.activations is not None:
        got = f"got activations={weight.activations!r}"
        raise ValueError(f"{name}: {got}, wanted None: experts do not round x")


def _check_shape(name: str, tensor: Weight, wanted: str, shape: tuple[int | None, ...]) -> None:
    if len(tensor.shape) != len(shape) or any(
        size is not None and size != got for size, got in zip(shape, tensor.shape, strict=True)
    ):
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, wanted {wanted}")
