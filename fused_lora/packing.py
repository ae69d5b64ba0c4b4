"""Base weights as arguments of registered operators, which take tensors and strings alone.

A weight becomes its tensors and a word that says what they are: "" for a plain tensor, else the
format, shape and dtype of a `QuantizedWeight`. The words of several weights have ";" between them,
so that one layer and a group use the same two functions.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .codes import FOUR_BIT
from .quantized_weight import Layout, QuantizedWeight, Weight

_PARTS = ("codes", "scales")
_CODEBOOK = ("codebook",)
_NESTED = ("nested_scales", "nested_codebook", "nested_offset")
_LAYOUT = [field.name for field in fields(Layout)]
_ABSENT: dict[str, Any] = dict.fromkeys((*_PARTS, *_CODEBOOK, *_NESTED))


def pack(*weights: Weight) -> tuple[list[Tensor], str]:
    """The tensors of ``weights``, not copied, and the spec for `unpack`. Dynamo traces it."""
    tensors: list[Tensor] = []
    words = []
    for weight in weights:
        if not isinstance(weight, QuantizedWeight):
            tensors.append(weight)
            words.append("")
            continue
        layout = "|".join([f"{getattr(weight.layout, field)}" for field in _LAYOUT])
        shape = ",".join([f"{size}" for size in weight.shape])
        words.append(f"{shape}|{weight.dtype}|{layout}")
        parts = [getattr(weight, name) for name in _ABSENT]
        tensors += [part for part in parts if part is not None]
    return tensors, ";".join(words)


def unpack(tensors: Sequence[Tensor], spec: str) -> list[Weight]:
    """The weights again, over the same storage. Checks nothing: `pack` had whole ones."""
    weights: list[Weight] = []
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
    shape, dtype, *values = map(_value, word.split("|"))
    layout = Layout(*values)
    names = _PARTS + (_CODEBOOK if layout.format in FOUR_BIT else ())
    names += _NESTED if layout.nested else ()
    dtype = getattr(torch, dtype.removeprefix("torch."))
    return names, {"shape": torch.Size(shape), "dtype": dtype, "layout": layout}


def _value(text: str) -> Any:
    """What ``text`` is as a literal, or a name: itself."""
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text
