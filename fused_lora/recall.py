"""What was decided for a call, for others like it, which then need no other look.

By guards, not a key of all that counts: after a large product what Python touches comes from
memory, and a look at every attribute of every tensor takes 10 us then, warm 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .autocast import autocast_enabled
from .guards import Sizes, guards_of
from .lookup import parameters
from .quantize import QuantizedWeight

Weight = Tensor | QuantizedWeight
Member = tuple[Weight, Tensor, Tensor, float, Tensor | None, float]  # as group.py has them

_MAX_CALLS = 4096
_MAX_SHAPES = 32  # of x for each of the calls
_NUMBERS = (float, int)  # and nothing that compares or hashes in a way of its own


class _Known(NamedTuple):
    """What is known of the calls with the same W0s and As and the same options."""

    guards: Any  # on x but for its rows, W0 or its codes, A, B and bias
    facts: object  # about a quantised W0
    autocast_dtype: torch.dtype | None  # where autocast is on, and left the tensors as they are
    decisions: dict[torch.Size, Any]  # for each x.shape


_known: dict[tuple[object, ...], _Known] = {}


def forget() -> None:
    """Lets every call be decided anew."""
    _known.clear()


def _key(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> tuple[object, ...] | None:
    if not (type(scaling) in _NUMBERS and type(dropout_p) in _NUMBERS):  # True is 1.0
        return None
    # What may take turns: else each would make the other's guards anew.
    of_tensors = id(weight), id(lora_A), x.ndim, x.requires_grad, bias is None
    return *of_tensors, scaling, dropout_p, backend


def _key_of_all(x: Tensor, members: Sequence[Member], backend: str) -> tuple[object, ...] | None:
    keys = [_key(x, W, A, bias, s, p, backend) for W, A, _, s, bias, p in members]
    return None if None in keys else tuple(keys)


def _facts(weight: Weight) -> tuple[Tensor, object]:
    """A tensor that guards can look at, and what there is to know of a quantised W0 besides."""
    if isinstance(weight, Tensor):
        return weight, None
    (codes,) = parameters(weight, "codes")
    return codes, (weight.layout, weight.dtype, weight.shape, type(weight))


def _tensors_of_all(
    x: Tensor, members: Sequence[Member]
) -> tuple[tuple[Tensor, ...], list[object]]:
    tensors, facts = [x], []
    for weight, lora_A, lora_B, _, bias, _ in members:
        W, fact = _facts(weight)
        facts.append(fact)
        tensors += (W, lora_A, lora_B) if bias is None else (W, lora_A, lora_B, bias)
    return tuple(tensors), facts


def _decided(known: _Known, x: Tensor, tensors: tuple[Tensor, ...], facts: object) -> Any:
    for tensor in tensors:
        if tensor.is_nested:
            return None  # of its strides guards ask, and the process ends
    guards, known_facts, autocast_dtype, decisions = known
    if not guards.check(*tensors) or known_facts != facts:
        return None
    if autocast_dtype and autocast_dtype != torch.get_autocast_dtype(x.device.type):
        return None
    return decisions.get(x.shape)


def recall(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> Any:
    """What `remember` keeps of a call like this one; None if there is nothing."""
    try:
        key = _key(x, weight, lora_A, bias, scaling, dropout_p, backend)
        known = None if key is None else _known.get(key)
        if known is None:
            return None
        W, facts = _facts(weight)
        tensors = (x, W, lora_A, lora_B) if bias is None else (x, W, lora_A, lora_B, bias)
        return _decided(known, x, tensors, facts)
    except (AttributeError, TypeError):  # no tensor, or not hashable: the checks say which
        return None


def remember(
    decision: object,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float,
    dropout_p: float,
    backend: str,
) -> None:
    """Keeps the decision for `recall`, until `forget`. No tensor is kept alive."""
    W, facts = _facts(weight)
    tensors = (x, W, lora_A, lora_B) if bias is None else (x, W, lora_A, lora_B, bias)
    # A W0 that requires a gradient is refused where one is asked for.
    if not W.requires_grad:
        key = _key(x, weight, lora_A, bias, scaling, dropout_p, backend)
        _keep(key, decision, x, tensors, facts)


def recall_all(x: Tensor, members: Sequence[Member], backend: str) -> Any:
    """As `recall`, of several layers on one x."""
    try:
        key = _key_of_all(x, members, backend)
        known = None if key is None else _known.get(key)
        return None if known is None else _decided(known, x, *_tensors_of_all(x, members))
    except (AttributeError, TypeError):
        return None


def remember_all(decision: object, x: Tensor, members: Sequence[Member], backend: str) -> None:
    """Keeps the decision for `recall_all`."""
    if not any(_facts(member[0])[0].requires_grad for member in members):
        key = _key_of_all(x, members, backend)
        _keep(key, decision, x, *_tensors_of_all(x, members))


def _keep(
    key: tuple[object, ...] | None,
    decision: object,
    x: Tensor,
    tensors: tuple[Tensor, ...],
    facts: object,
) -> None:
    if key is None:
        return
    sizes: Sizes = [[*[None] * (x.ndim - 1), x.shape[-1]], *(list(t.shape) for t in tensors[1:])]
    guards = guards_of(tensors, sizes, [[None] * t.ndim for t in tensors])
    if guards is None:
        return
    dtype = torch.get_autocast_dtype(x.device.type) if autocast_enabled(x) else None
    known = _known.get(key)
    same = known is not None and known[1:3] == (facts, dtype) and known.guards.check(*tensors)
    decisions = known.decisions if known is not None and same else {}
    for cache, limit in ((_known, _MAX_CALLS), (decisions, _MAX_SHAPES)):
        if len(cache) >= limit:
            cache.clear()
    decisions[x.shape] = decision
    _known[key] = _Known(guards, facts, dtype, decisions)
