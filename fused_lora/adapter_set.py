"""Many adapters, checked once: what is known of them for as long as nothing about them changes.

Hundreds of them take longer to look at than a decoding step takes on a GPU. What is kept for a
set of adapters is found by their addresses, and holds only if Dynamo's guards on tensors, which
look at all of them in one call, find every type, dtype, shape, stride and requires_grad as it was.
So nothing has to be told of a change, and no tensor is kept alive. Without guards nothing is kept,
and each call looks anew.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import checks
from .autocast import autocast_enabled
from .calls import Call, facts_of
from .guards import guards_of
from .kernels.rows import AdapterLayout, adapter_layout, addresses_of

_MAX_SETS = 512  # 0.1 MB each with 256 adapters


@dataclass(frozen=True, eq=False)
class AdapterSet:
    """What is known of some adapters."""

    scalings: tuple[float, ...]
    kinds: tuple[int, ...]  # one adapter for each kind of shape, dtype, ... that there is
    needs_grad: bool
    mixed: str | None  # why the kernels cannot take them, if dtypes are why
    layout: AdapterLayout | None  # None if one is not contiguous, or has no address
    calls: dict[object, Call] = field(default_factory=dict)  # by the facts about all else


_sets: OrderedDict[object, tuple[Any, AdapterSet]] = OrderedDict()


def check_lists(
    lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], scalings: float | Sequence[float]
) -> tuple[Any, ...]:
    """A scaling for each adapter; TypeError or ValueError unless there is as much of everything."""
    for name, tensors in (("lora_As", lora_As), ("lora_Bs", lora_Bs)):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name}: got {type(tensors).__name__}, wanted a list of tensors")
    number = len(lora_As)
    if number == 0 or len(lora_Bs) != number:
        raise ValueError(
            f"lora_As, lora_Bs: got {number} and {len(lora_Bs)} adapters, wanted as many of both "
            "and at least 1"
        )
    scales: tuple[Any, ...]
    scales = tuple(scalings) if isinstance(scalings, (list, tuple)) else (scalings,) * number
    if len(scales) != number:
        raise ValueError(f"scalings: got {len(scales)}, wanted one for each of {number} adapters")
    return scales


def adapter_set(
    lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor], scalings: float | Sequence[float]
) -> AdapterSet:
    """The set of these adapters; TypeError or ValueError for what is wrong with them as a set.

    What is wrong with one of them is for `checks.check_tensors`, which knows what it should fit.
    """
    scales = check_lists(lora_As, lora_Bs, scalings)
    try:
        addresses = addresses_of(lora_As, lora_Bs)
    except (TypeError, RuntimeError):  # no tensor, or one without an address
        return _make(lora_As, lora_Bs, scales, None)
    # Guards compare dispatch keys, which these modes change.
    modes = (torch.is_inference_mode_enabled(), autocast_enabled(lora_As[0]))
    key = (addresses, scales, frozenset(map(type, scales)), modes)
    try:
        found = _sets.get(key)
    except TypeError:  # a list or an array among the scalings, which is for the check to refuse
        return _make(lora_As, lora_Bs, scales, None)
    if found is not None and found[0].check(*lora_As, *lora_Bs):
        return found[1]
    made = _make(lora_As, lora_Bs, scales, addresses)
    tensors = (*lora_As, *lora_Bs)
    guards = guards_of(
        tensors, [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    )
    if guards is not None:
        _sets[key] = (guards, made)
        if len(_sets) > _MAX_SETS:
            _sets.popitem(last=False)
    return made


def _make(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scales: tuple[float, ...],
    addresses: tuple[int, ...] | None,
) -> AdapterSet:
    for scaling in scales:
        checks.check_number("scaling", scaling)
    scales = tuple(map(float, scales))
    kinds: dict[object, int] = {}
    for i, (A, B) in enumerate(zip(lora_As, lora_Bs, strict=True)):
        both = isinstance(A, Tensor) and isinstance(B, Tensor)
        kinds.setdefault(
            (facts_of(A), facts_of(B)) if both else i, i
        )  # others: for the checks to refuse
    layout = None
    if addresses is not None and all(t.ndim and t.is_contiguous() for t in (*lora_As, *lora_Bs)):
        ranks = tuple(A.shape[0] for A in lora_As)
        layout = adapter_layout(addresses, ranks, scales, lora_As[0].device)
    return AdapterSet(
        scalings=scales,
        kinds=tuple(kinds.values()),
        needs_grad=any(getattr(t, "requires_grad", False) for t in (*lora_As, *lora_Bs)),
        mixed=_mixed_dtypes(lora_As, lora_Bs),
        layout=layout,
    )


def _mixed_dtypes(lora_As: Sequence[Tensor], lora_Bs: Sequence[Tensor]) -> str | None:
    for name, tensors in (("lora_As", lora_As), ("lora_Bs", lora_Bs)):
        dtypes = {getattr(t, "dtype", None) for t in tensors}
        if len(dtypes) > 1:
            got = " and ".join(sorted(map(str, dtypes)))
            return f"{name}: got {got}, wanted one dtype for all"
    return None
