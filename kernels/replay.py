"""Functions that do nothing but launch kernels: done again for other addresses.

With few rows a layer's launches run in less time than it takes Python to come by their arguments:
tiles, strides, views, contexts. Where nothing but addresses has changed, launches are as they were.
On a Xeon with the driver stubbed (`benchmarks.launch_overhead`, M 1) a forward then takes 17 us in
one launch and 19 in two instead of 32 and 37, with both gradients 102 instead of 199.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from .device import device_guard
from .launch import Launch, Tiled, hearing, is_hooked, modes

Operands = Sequence[Tensor | None]  # the first is a tensor
Results = tuple[Any, ...]  # of tensors and None
Selection = Callable[[Sequence[Any]], Any]
Lender = Callable[[], AbstractContextManager[Tensor]]
_NOTHING = nullcontext()
_RESIZE = torch.ops.aten.resize_.default
_EMPTY = {torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered: what is launched and allocated, and whether anything else is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self.made: list[Tensor] = []  # kept, so that no two have one address
        self.lent: dict[Lender, Tensor] = {}
        self.nothing_else = True

    def __enter__(self) -> Recorder:
        hearing.recorder = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        hearing.recorder = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        size = args[0].numel() if func is _RESIZE else 0
        result = func(*args, **(kwargs or {}))
        if func in _EMPTY:
            self.made.append(result)
        elif not func.is_view and not (func is _RESIZE and result.numel() == size):
            self.nothing_else = False
        return result

    def hear(self, launch: Launch | None) -> None:
        """Of a launch; None is one that is not to be had again."""
        if launch is None:
            self.nothing_else = False
        else:
            self.launches.append(launch)

    def hear_of_loan(self, lender: Lender, tensor: Tensor) -> None:
        """Of memory that launches have for a while, and who gives as much to others."""
        self.lent[lender] = tensor

    def replay(self, operands: Operands, results: Results) -> Replay | None:
        """What does the same for operands of the same kinds; None where that is not possible."""
        tensors = [*operands, *self.made, *self.lent.values()]
        addresses = [t.data_ptr() for t in tensors if t is not None]
        told_apart = 0 not in addresses and len({*addresses}) == len(addresses)
        if not self.nothing_else or not told_apart or len(self.lent) > 1:
            return None
        place: dict[int | None, int] = {
            t.data_ptr(): i for i, t in enumerate(tensors) if t is not None
        }
        place[None] = -1
        made = {i + len(operands): t for i, t in enumerate(self.made)}
        try:
            launches = [
                (launch._replace(pointers=()), _selection(launch.pointers, place))
                for launch in self.launches
            ]
            places = [-1 if t is None else place[t.data_ptr()] for t in results]
            for t, i in zip(results, places, strict=True):
                if t is not None and t.is_contiguous() and t.numel() == made[i].numel():
                    made[i] = t  # in its last shape
                elif t is not None:
                    return None
        except KeyError:  # memory of unknown origin
            return None
        lender = next(iter(self.lent), None)
        return Replay(operands, [*made.values()], lender, launches, places)


def _selection(pointers: tuple[Any, ...], place: dict[int | None, int]) -> Selection:
    """What picks a launch's pointers out of all: tuples of them and descriptors among them."""
    parts = [_part(pointer, place) for pointer in pointers]
    if len(parts) > 1 and all(isinstance(part, int) for part in parts):
        return itemgetter(*parts)
    return lambda given: tuple(given[p] if isinstance(p, int) else p(given) for p in parts)


def _part(pointer: Any, place: dict[int | None, int]) -> int | Selection:
    if isinstance(pointer, tuple):
        return _selection(pointer, place)
    if isinstance(pointer, Tiled):
        at, tiles = place[pointer.data_ptr()], pointer.at(0)  # which keeps no tensor alive
        return lambda given: tiles.at(given[at])
    return place[pointer]


class Replay:
    """One function's launches: call it with operands of the same shapes and dtypes."""

    __slots__ = ("_launches", "_lender", "_made", "_modes", "_results", "_strides")

    def __init__(
        self,
        operands: Operands,
        made: list[Tensor],
        lender: Lender | None,
        launches: list[tuple[Launch, Selection]],
        results: list[int],  # places among operands and what is made
    ) -> None:
        self._strides = [None if t is None else t.stride() for t in operands]
        self._made = [(tuple(t.shape), t.dtype) for t in made]
        self._lender, self._launches = lender, launches
        self._results = [i - len(operands) if i >= 0 else None for i in results]
        self._modes = modes()

    def __call__(self, operands: Operands) -> Results | None:
        """The results; None, and nothing is done, where a launch would differ in more."""
        if self._strides != [None if t is None else t.stride() for t in operands]:
            return None
        pointers = [None if t is None else t.data_ptr() for t in operands]
        if reduce(or_, filter(None, pointers)) & 15 or is_hooked() or self._modes != modes():
            return None
        first = operands[0]
        assert first is not None
        # Sizes one by one: together they take 0.5 us more, in a torch.Size 1.3.
        made = [first.new_empty(*shape, dtype=dtype) for shape, dtype in self._made]
        pointers += [t.data_ptr() for t in made]
        loan = _NOTHING if self._lender is None else self._lender()
        with device_guard(first), loan as lent:
            pointers += [None if lent is None else lent.data_ptr(), None]
            stream = driver.active.get_current_stream(first.get_device())
            for launch, selection in self._launches:
                launch.run(stream, selection(pointers))
        return tuple(None if i is None else made[i] for i in self._results)


class Replays:
    """What is known of some functions of tensors, by name; each is recorded where it comes first.

    All calls under one name are to have the same shapes, dtypes and options.
    """

    def __init__(self) -> None:
        self._known: dict[object, Replay | None] = {}

    def __call__(
        self, name: object, operands: Operands, function: Callable[[], Results]
    ) -> Results:
        """``function()``, which reads the operands and allocates its results."""
        if name in self._known:
            known = self._known[name]
            results = None if known is None else known(operands)
            return function() if results is None else results
        with Recorder() as recorder:
            results = function()
        self._known[name] = recorder.replay(operands, results)
        return results
