"""What was decided for a call, for others like it, which then need no other look.

By guards, not a key of all that counts: after a large product what Python touches comes from
memory, and a look at every attribute of every tensor takes 10 us then, warm 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .autocast import autocast_enabled
from .guards import Sizes, guards_of
from .lookup import parameters
from .quantized_weight import Weight

if TYPE_CHECKING:
    from .arguments import Arguments

_MAX_CALLS = 4096
_MAX_SHAPES = 32  # of x for each of the calls
_NUMBERS = (float, int)  # and nothing that compares or hashes in a way of its own


class _Known(NamedTuple):
    """What is known of the calls with the same W0s and As and the same options."""

    guards: Any  # on x but for its rows, W0 or its codes, A, B and bias
    facts: list[object]  # about every quantised W0
    autocast_dtype: torch.dtype | None  # where autocast is on, and left the tensors as they are
    decisions: dict[torch.Size, Any]  # for each x.shape


_known: dict[tuple[object, ...], _Known] = {}


def forget() -> None:
    """Lets every call be decided anew."""
    _known.clear()


def _key(caller: str, x: Tensor, members: Sequence[Arguments]) -> tuple[object, ...] | None:
    """What may take turns: else each would make the other's guards anew."""
    parts: list[object] = [caller, x.ndim, x.requires_grad, members[0].backend]
    for weight, lora_A, _, scaling, bias, dropout_p, _ in members:
        if not (type(scaling) in _NUMBERS and type(dropout_p) in _NUMBERS):  # True is 1.0
            return None
        parts += id(weight), id(lora_A), bias is None, scaling, dropout_p
    return tuple(parts)


def _facts(weight: Weight) -> tuple[Tensor, object]:
    """A tensor that guards can look at, and what there is to know of a quantised W0 besides."""
    if isinstance(weight, Tensor):
        return weight, None
    (codes,) = parameters(weight, "codes")
    return codes, (weight.layout, weight.dtype, weight.shape, type(weight))


def _looked_at(x: Tensor, members: Sequence[Arguments]) -> tuple[list[Tensor], list[object]]:
    """What guards look at, and the facts about every W0."""
    tensors, facts = [x], []
    for weight, lora_A, lora_B, _, bias, _, _ in members:
        W, fact = _facts(weight)
        facts.append(fact)
        tensors += (W, lora_A, lora_B) if bias is None else (W, lora_A, lora_B, bias)
    return tensors, facts


def recall(caller: str, x: Tensor, members: Sequence[Arguments]) -> Any:
    """What `remember` keeps of a call like this one; None if there is nothing."""
    try:
        key = _key(caller, x, members)
        known = None if key is None else _known.get(key)
        if known is None:
            return None
        tensors, now = _looked_at(x, members)
        for tensor in tensors:
            if tensor.is_nested:
                return None  # of its strides guards ask, and the process ends
        guards, facts, autocast_dtype, decisions = known
        if not guards.check(*tensors) or facts != now:
            return None
        if autocast_dtype and autocast_dtype != torch.get_autocast_dtype(x.device.type):
            return None
        return decisions.get(x.shape)
    except (AttributeError, TypeError):  # no tensor, or not hashable: the checks say which
        return None


def remember(decision: object, caller: str, x: Tensor, members: Sequence[Arguments]) -> None:
    """Keeps the decision for `recall`, until `forget`. No tensor is kept alive.

    ``caller``: whose decision it is; ``members``: its layers, all on x and of one backend.
    """
    key = _key(caller, x, members)
    tensors, facts = _looked_at(x, members)
    # A W0 that requires a gradient is refused where one is asked for.
    if key is None or any(_facts(m.weight)[0].requires_grad for m in members):
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
