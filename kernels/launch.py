"""Launches that Triton need not look at again.

`kernel[grid](...)` finds the compiled kernel by the type of every argument, and by whether it is 1
or divisible by 16: 12 us for the fifty arguments of ours, more than a decoding step's launch takes
itself. Sizes, dtypes and constants that are as in an earlier call need no look: 4 us. Descriptors
cost Triton more (on a machine with an H200, 190 us a launch of persistent.py and 280 of
specialized.py, longer than a product of 2048 x 4096 x 4096 takes).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import reduce
from operator import attrgetter, or_
from typing import Any, NamedTuple

from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

_MAX_KNOWN = 4096  # launches of one kernel: every M of a dynamic batch is one


class _Address(int):
    def data_ptr(self) -> int:
        return self


class Tiled:
    """A tensor in tiles ``block_shape`` for the copy engine: what a launch reads of a descriptor.

    ``layout`` is Gluon's, of a tile in shared memory. Triton's own descriptors have to pass its
    checks whenever one is made; these do when Triton has a look at the launch.
    """

    __slots__ = ("base", "block_shape", "layout", "shape", "strides")
    padding = "zero"
    round_f32_to_tf32 = False

    def __init__(self, base: Tensor, block_shape: list[int], layout: Any = None) -> None:
        self.base: Any = base
        self.block_shape, self.layout = block_shape, layout
        self.shape, self.strides = [*base.shape], [*base.stride()]

    def at(self, address: int) -> Tiled:
        """The same tiles of what is at another address."""
        other = Tiled.__new__(Tiled)
        other.base, other.layout = _Address(address), self.layout
        other.block_shape, other.shape, other.strides = self.block_shape, self.shape, self.strides
        return other

    @property
    def dtype(self) -> tuple[object, ...]:
        """What a kernel is compiled for."""
        return self.base.dtype, *self.block_shape

    def data_ptr(self) -> int:
        """Of the tensor."""
        address: int = self.base.data_ptr()
        return address

    def get_device(self) -> int:
        """Of the tensor."""
        index: int = self.base.get_device()
        return index

    def checked(self) -> Any:
        """Triton's or Gluon's descriptor."""
        given = self.base, self.shape, self.strides, self.block_shape
        if self.layout is None:
            return TensorDescriptor(*given)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(*given, self.layout)


class Launch(NamedTuple):
    """A launch as the driver gets it."""

    compiled: CompiledKernel
    grid: tuple[int, int, int]
    pointers: tuple[Any, ...]  # to what it reads and writes; a `Tiled` stands for its own
    rest: tuple[Any, ...]  # of the arguments

    def run(self, stream: int, pointers: tuple[Any, ...]) -> None:
        """As `compiled[grid]` does, without hooks and what they would be told: 1.5 us."""
        compiled = self.compiled
        compiled.run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *pointers, *self.rest,
        )  # fmt: skip


class _Hearing(threading.local):
    recorder: Any = None  # replay.Recorder, who is told of this thread's launches


hearing = _Hearing()


class Launcher:
    """``kernel``, whose parameters are tensors, then sizes, then numbers, then constants.

    The first ``descriptors`` tensors are `Tiled`, or None.
    """

    def __init__(self, kernel: Any, descriptors: int = 0) -> None:
        self.kernel, self.descriptors = kernel, descriptors
        self._known: dict[tuple[object, ...], tuple[CompiledKernel, tuple[object, ...]]] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[Any, ...],
        sizes: tuple[Any, ...],
        numbers: tuple[float, ...] = (),
        **constants: Any,
    ) -> None:
        """``kernel[grid](*tensors, *sizes, *numbers, **constants)`` on the current device's stream.

        tensors: the first is one, others may be None or a tuple of such (a quantised weight's
        tables). sizes: integers, or tuples of numbers. numbers: what the kernel is not specialised
        by, always of the same types. constants: the constant parameters and the compiler's options,
        always in the same order.
        """
        try:
            pointers = [None if t is None else t.data_ptr() for t in tensors]
            dtypes = [None if t is None else t.dtype for t in tensors]
            addresses = pointers
        except AttributeError:  # a tuple
            pointers = _nested(Tensor.data_ptr, tensors)
            dtypes = _nested(attrgetter("dtype"), tensors)
            addresses = [p for part in pointers for p in (part if type(part) is tuple else (part,))]
        aligned = not reduce(or_, filter(None, addresses), 0) & 15
        device = tensors[0].get_device()
        key = (device, sizes, modes(), *dtypes, *constants.values())
        known = self._known.get(key) if aligned else None
        launch = None
        if known is not None:
            launch = self._launch(known, grid, tensors, pointers, sizes, numbers)
            if is_hooked():
                launch.compiled[grid](*launch.pointers, *launch.rest)
            else:
                launch.run(driver.active.get_current_stream(device), launch.pointers)
        else:
            checked = [t.checked() if isinstance(t, Tiled) else t for t in tensors]
            compiled = self.kernel[grid](*checked, *sizes, *numbers, **constants)
            if aligned and isinstance(compiled, CompiledKernel):  # the interpreter has none
                if len(self._known) >= _MAX_KNOWN:
                    self._known.clear()
                given = len(tensors) + len(sizes) + len(numbers)
                tail = tuple(constants.get(p.name, p.default) for p in self.kernel.params[given:])
                self._known[key] = compiled, tail
                launch = self._launch((compiled, tail), grid, tensors, pointers, sizes, numbers)
        if hearing.recorder is not None:
            hearing.recorder.hear(launch)

    def _launch(
        self,
        known: tuple[CompiledKernel, tuple[object, ...]],
        grid: tuple[int, int, int],
        tensors: tuple[Any, ...],
        pointers: list[Any],
        sizes: tuple[Any, ...],
        numbers: tuple[float, ...],
    ) -> Launch:
        compiled, tail = known
        # Of numbers the driver is not asked, pointer by pointer, whether they are its own.
        passed = (*tensors[: self.descriptors], *pointers[self.descriptors :])
        return Launch(compiled, grid, passed, (*sizes, *numbers, *tail))


def modes() -> tuple[object, ...]:
    """What Triton compiles kernels of their own for, besides their arguments."""
    return knobs.runtime.debug, knobs.compilation.instrumentation_mode


def is_hooked() -> bool:
    """Whether somebody (a profiler) hears of launches; Triton has chains of hooks, often empty."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _nested(read: Callable[[Tensor], object], tensors: tuple[Any, ...]) -> list[Any]:
    """What ``read`` finds of each tensor; of a tuple, one of them."""
    return [
        None if t is None else tuple(_nested(read, t)) if isinstance(t, tuple) else read(t)
        for t in tensors
    ]
