"""Base weights as arguments of registered operators, which take tensors and strings alone.

A weight becomes its tensors and a word that says what they are: "" for a plain tensor, else the
format, shape and dtype of a `QuantizedWeight`. The words of several weights have ";" between them,
so that one layer and a group use the same two functions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .quantize import Layout, QuantizedWeight

_PARTS = ("codes", "scales")
_CODEBOOK = ("codebook",)
_NESTED = ("nested_scales", "nested_codebook", "nested_offset")
_ABSENT: dict[str, Any] = dict.fromkeys((*_PARTS, *_CODEBOOK, *_NESTED))


def pack(*weights: Tensor | QuantizedWeight) -> tuple[list[Tensor], str]:
    """The tensors of ``weights``, not copied, and the spec for `unpack`. Dynamo traces it."""
    tensors: list[Tensor] = []
    words = []
    for weight in weights:
        if not isinstance(weight, QuantizedWeight):
            tensors.append(weight)
            words.append("")
            continue
        (N, K), layout = weight.shape, weight.layout
        flags = f"{layout.block[0]} {layout.block[1]} {int(layout.nested)} {int(layout.tiled)}"
        words.append(f"{layout.format} {weight.dtype} {N} {K} {flags}")
        parts = [getattr(weight, name) for name in _ABSENT]
        tensors += [part for part in parts if part is not None]
    return tensors, ";".join(words)


def unpack(tensors: Sequence[Tensor], spec: str) -> list[Tensor | QuantizedWeight]:
    """The weights again, over the same storage. Checks nothing: `pack` had whole ones."""
    weights: list[Tensor | QuantizedWeight] = []
    rest = iter(tensors)
    for word in spec.split(";"):
        if not word:
            weights.append(next(rest))
            continue
        names, facts = _read(word)
        weight = QuantizedWeight.__new__(QuantizedWeight)
        nn.Module.__init__(weight)
        vars(weight).update(facts)
        weight._parameters.update(_ABSENT | dict(zip(names, rest, strict=False)))
        weights.append(weight)
    return weights


@functools.lru_cache(maxsize=1024)
def _read(word: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The tensors that a quantised weight has, and its other attributes."""
    format, dtype, *numbers = word.split(" ")
    N, K, rows, cols, nested, tiled = map(int, numbers)
    names = _PARTS + (_CODEBOOK if format in ("nf4", "fp4") else ()) + (_NESTED if nested else ())
    facts = {
        "shape": torch.Size((N, K)),
        "dtype": getattr(torch, dtype.removeprefix("torch.")),
        "layout": Layout(format, (rows, cols), bool(nested), bool(tiled)),  # type: ignore[arg-type]
    }
    return names, facts
