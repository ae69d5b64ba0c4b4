"""What our operators count in PyTorch's `FlopCounterMode`: their products, 2 M N K each.

A product that only makes a tile's h again, or a norm's sum of squares, is no product of the maths
and counts nothing, as for PyTorch's own operators. torch.utils.flop_counter imports Triton, which
`import fused_lora` does not; so the formulas are registered when somebody imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]
# An operator's, by name, with shapes in the place of tensors; and "out", those of what it gives.
Arguments = dict[str, Any]


def _forward(M: int, N: int, K: int, ranks: int) -> int:
    """x W0^T, h = x A^T and h B^T; ``ranks``: the ranks of all M rows, added up."""
    return 2 * M * N * K + 2 * ranks * (K + N)


def _backward(call: Arguments, M: int, N: int, K: int, ranks: int) -> int:
    """dh = g B for dx = g W0 + dh A and for dA = dh^T x; dB = g^T h."""
    need_dx: bool = call["need_dx"]
    need_dA, need_dB = call["x"] is not None, call["h"] is not None
    per_rank = (need_dx + need_dA) * K + ((need_dx or need_dA) + need_dB) * N
    return 2 * M * N * K * need_dx + 2 * ranks * per_rank


def _sizes(rows: Shape, lora_A: Shape, lora_B: Shape) -> tuple[int, int, int, int]:
    M = prod(rows[:-1])
    return M, lora_B[0], lora_A[1], M * lora_A[0]


def _lora(call: Arguments) -> int:
    return _forward(*_sizes(call["x"], call["lora_A"], call["lora_B"]))


def _lora_backward(call: Arguments) -> int:
    return _backward(call, *_sizes(call["g"], call["lora_A"], call["lora_B"]))


def _dora(call: Arguments) -> int:
    """B A for the norm too."""
    N, r = call["lora_B"]
    product: int = 2 * N * r * call["lora_A"][1]
    return _lora(call) + product


def _group(call: Arguments) -> int:
    members = zip(call["lora_As"], call["lora_Bs"], strict=True)
    return sum(_forward(*_sizes(call["x"], A, B)) for A, B in members)


def _group_backward(call: Arguments) -> int:
    members = zip(call["gs"], call["lora_As"], call["lora_Bs"], strict=True)
    return sum(_backward(call, *_sizes(*member)) for member in members)


def _multi_sizes(call: Arguments, rows: Shape) -> tuple[int, int, int, int]:
    """Of a tensor of indices only the shape is known here: each row has the largest rank."""
    As, M = call["lora_As"], prod(rows[:-1])
    ranks = M * max(A[0] for A in As)
    if call["indices"] is None:
        pairs = zip(call["segments"][0::2], call["segments"][1::2], strict=True)
        ranks = sum(n * As[i][0] for i, n in pairs if i >= 0)
    return M, call["lora_Bs"][0][0], As[0][1], ranks


def _multi(call: Arguments) -> int:
    return _forward(*_multi_sizes(call, call["x"]))


def _multi_backward(call: Arguments) -> int:
    return _backward(call, *_multi_sizes(call, call["g"]))


def _rows_of_experts(call: Arguments) -> tuple[int, int]:
    """All, as if each had an expert, which only the indices know; and their ranks, added up."""
    M = call["groups"][0][0]
    return M, M * (call["lora_A"][1] if call["lora_A"] else 0)


def _experts(call: Arguments) -> int:
    M, ranks = _rows_of_experts(call)
    return _forward(M, call["out"][0][1], call["x"][1], ranks)


def _experts_backward(call: Arguments) -> int:
    M, ranks = _rows_of_experts(call)
    K = call["out"][0][1] if call["need_dx"] else call["x"][1] if call["x"] else 0
    return _backward(call, M, call["g"][1], K, ranks)


def _combine(call: Arguments) -> int:
    """And a product of p's rows with theirs."""
    M, ranks = _rows_of_experts(call)
    N = call["out"][0][1]
    combining: int = 2 * M * N
    return _forward(M, N, call["a"][1], ranks) + combining


def _combine_backward(call: Arguments) -> int:
    """da is made for dp too, which is no product."""
    M, ranks = _rows_of_experts(call)
    a = call["a"]  # there for dp and dA
    K = a[1] if a else call["out"][0][1] if call["need_da"] else 0
    needs = {"need_dx": call["need_da"] or call["need_dp"], "x": a if call["need_dA"] else None}
    return _backward(call | needs, M, call["g"][1], K, ranks)


_FORMULAS: dict[str, Callable[[Arguments], int]] = {
    "lora_linear": _lora,
    "lora_linear_backward": _lora_backward,
    "dora_linear": _dora,
    "dora_linear_backward": _lora_backward,
    "lora_linear_group": _group,
    "lora_linear_group_backward": _group_backward,
    "lora_linear_multi": _multi,
    "lora_linear_multi_backward": _multi_backward,
    "lora_linear_experts": _experts,
    "lora_linear_experts_backward": _experts_backward,
    "lora_experts_combine": _combine,
    "lora_experts_combine_backward": _combine_backward,
}


def _register(counter: ModuleType) -> None:
    for name, formula in _FORMULAS.items():
        operator = getattr(torch.ops.fused_lora, name)
        if operator in counter.flop_registry:  # by an import before
            continue
        names = [argument.name for argument in operator.default._schema.arguments]

        def count(
            *values: Any,
            out_shape: Any,
            formula: Callable[[Arguments], int] = formula,
            names: list[str] = names,
        ) -> int:
            return formula({**dict(zip(names, values, strict=True)), "out": out_shape})

        counter.register_flop_formula(operator)(count)


class _OnImport(MetaPathFinder):
    """Registers the formulas whenever PyTorch's module is run: imported, or reloaded."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        # Where it lies is for the other finders to say.
        others = [f for f in sys.meta_path if not isinstance(f, _OnImport)]
        found = (f.find_spec(fullname, path, target) for f in others if hasattr(f, "find_spec"))
        spec = next(filter(None, found), None)
        if spec is None or spec.loader is None:
            return spec
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
    if not any(isinstance(finder, _OnImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OnImport())
