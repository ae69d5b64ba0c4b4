"""What our operators count in PyTorch's `FlopCounterMode`: their products, 2 M N K each.

A product that only makes a tile's h again, or a norm's sum of squares, is no product of the maths
and counts nothing, as for PyTorch's own operators. torch.utils.flop_counter imports Triton, which
`import fused_lora` does not; so the formulas are registered when somebody imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def _forward(x: Shape, lora_A: Shape, lora_B: Shape) -> int:
    """x W0^T, h = x A^T and h B^T."""
    M, (r, K), N = prod(x[:-1]), lora_A, lora_B[0]
    return 2 * M * (N * K + r * K + N * r)


def _backward(
    g: Shape, lora_A: Shape, lora_B: Shape, *, need_dx: bool, need_A: bool, need_B: bool
) -> int:
    """dh = g B for dx = g W0 + dh A and for dA = dh^T x; dB = g^T h."""
    M, (r, K), N = prod(g[:-1]), lora_A, lora_B[0]
    products = need_dx * (N * K + r * K) + need_A * r * K + need_B * N * r
    return 2 * M * (products + (need_dx or need_A) * N * r)


def lora_linear(x: Shape, lora_A: Shape, lora_B: Shape, *_: Any, out_shape: Any) -> int:
    """Of `ops.lora_linear_op`."""
    return _forward(x, lora_A, lora_B)


def lora_linear_backward(
    g: Shape, x: Shape | None, lora_A: Shape, lora_B: Shape, h: Shape | None, *rest: Any, **_: Any
) -> int:
    """Of `ops.lora_linear_backward_op`; its last argument is need_dx."""
    needs = {"need_dx": rest[-1], "need_A": x is not None, "need_B": h is not None}
    return _backward(g, lora_A, lora_B, **needs)


def dora_linear(x: Shape, lora_A: Shape, lora_B: Shape, *_: Any, out_shape: Any) -> int:
    """Of `dora_ops.dora_linear_op`: B A for the norm too."""
    return _forward(x, lora_A, lora_B) + 2 * prod(lora_A) * lora_B[0]


def dora_linear_backward(
    g: Shape,
    x: Shape | None,
    lora_A: Shape,
    lora_B: Shape,
    magnitude: Shape,
    norm: Shape,
    h: Shape | None,
    *rest: Any,
    out_shape: Any,
) -> int:
    """Of `dora_ops.dora_linear_backward_op`."""
    return lora_linear_backward(g, x, lora_A, lora_B, h, *rest)


def lora_linear_group(
    x: Shape, weights: Any, lora_As: Sequence[Shape], lora_Bs: Sequence[Shape], *_: Any, **__: Any
) -> int:
    """Of `group_ops.lora_linear_group_op`."""
    return sum(_forward(x, A, B) for A, B in zip(lora_As, lora_Bs, strict=True))


def lora_linear_group_backward(
    gs: Sequence[Shape],
    x: Shape | None,
    weights: Any,
    lora_As: Sequence[Shape],
    lora_Bs: Sequence[Shape],
    h: Shape | None,
    *rest: Any,
    out_shape: Any,
) -> int:
    """Of `group_ops.lora_linear_group_backward_op`."""
    needs = {"need_dx": rest[-1], "need_A": x is not None, "need_B": h is not None}
    return sum(_backward(*member, **needs) for member in zip(gs, lora_As, lora_Bs, strict=True))


_FORMULAS = (
    lora_linear,
    lora_linear_backward,
    dora_linear,
    dora_linear_backward,
    lora_linear_group,
    lora_linear_group_backward,
)


def _register(counter: ModuleType) -> None:
    for formula in _FORMULAS:
        operator = getattr(torch.ops.fused_lora, formula.__name__)
        counter.register_flop_formula(operator)(formula)


class _OnImport(MetaPathFinder):
    """Registers the formulas once PyTorch's module is imported, and is gone then."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register(module)

        loader.exec_module = exec_module
        return spec


def install() -> None:
    """Makes FlopCounterMode know our operators; they are registered already."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _OnImport())
