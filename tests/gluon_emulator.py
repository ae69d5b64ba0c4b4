"""Runs a Gluon kernel for Hopper in Python on CPU tensors, in an order drawn by chance.

Triton's interpreter does not run Gluon. This does, for what kernels/specialized.py uses of it, and
so that missing synchronisation shows:

* Every partition of every program is a thread; one runs at a time, and a seeded generator picks
  which goes on at each operation that others can see.
* Copies by the copy engine, its stores, and warp-group products happen later, when that generator
  picks them or, at the latest, when nothing else can go on. Until then a copy's destination is NaN;
  a store reads its staging memory, and a product its operands, only then.
* An mbarrier is the hardware's: a phase ends when its arrivals and its bytes are all there, and a
  wait for a parity passes if the phase of that parity has ended.
* Shared memory is there twice, as plain accesses and as the copy engine and the tensor cores see
  it. What was stored plainly gets to those by a fence. So it is with global memory.
* Where nothing can go on, `Deadlock` says who waits for what.

Not modelled: registers, layouts, and what lies between the threads of one partition.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Callable, Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import triton.language as real_tl
from triton.experimental.gluon import language as real_gl
from triton.experimental.gluon.language.nvidia import hopper

POISON = {torch.int32: -(10**8)}  # of others NaN


class Deadlock(RuntimeError):
    """Nobody can go on."""


class Trap(RuntimeError):
    """The kernel's own trap."""


class _Abort(BaseException):
    """Another thread has failed."""


class _Thread(threading.Thread):
    """A partition of a program."""

    def __init__(self, machine: Machine, program: int, name: str, run: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.machine, self.program, self.body = machine, program, run
        self.turn = threading.Semaphore(0)
        self.until: Callable[[], bool] | None = None  # what it waits for
        self.reason = ""
        self.done = False
        self.products: list[Callable[[], None]] = []  # in flight, in order
        self.stores: list[Callable[[], None]] = []
        self.committed: list[Callable[[], None]] = []  # all stores so far
        # Stored plainly, not fenced yet, by the kind of memory.
        self.dirty: dict[str, list[Callable[[], None]]] = {"shared": [], "global": []}

    def run(self) -> None:
        try:
            self.turn.acquire()
            self.machine.check()
            self.body()
            self.machine.drain(self)
        except _Abort:
            pass
        except BaseException as error:
            self.machine.fail(error)
        self.done = True
        self.machine.next()


class Machine:
    """The scheduler of one launch, and its memory."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        # How soon what is asynchronous happens: mostly at once, or mostly when all wait for it.
        self.eagerness = self.random.choice([0.02, 0.1, 0.5, 0.9])
        self.threads: list[_Thread] = []
        self.copies: list[Callable[[], None]] = []
        self.waiting_programs: list[_Thread] = []
        self.seen_by_copies: dict[int, torch.Tensor] = {}  # of global memory stored to plainly
        self.error: BaseException | None = None
        self.finished = threading.Event()
        self.current: _Thread

    def check(self) -> None:
        if self.error is not None:
            raise _Abort

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error

    def _operations(self) -> Iterator[tuple[list[Callable[[], None]], int]]:
        for i in range(len(self.copies)):
            yield self.copies, i
        for thread in self.threads:
            if thread.products:
                yield thread.products, 0
            for i in range(len(thread.stores)):
                yield thread.stores, i

    def next(self) -> None:
        """Gives the turn to somebody, after as many asynchronous operations as chance wants."""
        while self.error is None:
            alive = [t for t in self.threads if not t.done]
            ready = [t for t in alive if t.until is None or t.until()]
            operations = list(self._operations())
            if operations and (not ready or self.random.random() < self.eagerness):
                queue, i = self.random.choice(operations)
                queue[i]()
                del queue[i]
            elif ready:
                self.current = self.random.choice(ready)
                self.current.until = None
                self.current.turn.release()
                return
            elif alive:
                waits = "; ".join(f"{t.name} waits for {t.reason}" for t in alive)
                self.fail(Deadlock(waits))
            else:
                break
        for thread in self.threads:
            thread.turn.release()
        self.finished.set()

    def switch(self, until: Callable[[], bool] | None = None, reason: str = "") -> None:
        """Lets others go on, and returns once ``until`` holds."""
        thread = self.current
        thread.until, thread.reason = until, reason
        self.next()
        thread.turn.acquire()
        self.check()

    def drain(self, thread: _Thread) -> None:
        self.switch(lambda: not thread.stores, "its last stores")
        assert not thread.products, f"{thread.name} ends with products in flight"

    def start(self, program: int, name: str, run: Callable[[], None]) -> _Thread:
        thread = _Thread(self, program, f"program {program} {name}", run)
        self.threads.append(thread)
        thread.start()
        return thread


class Barrier:
    def __init__(self) -> None:
        self.name, self.count = "barrier", 0
        self.ended = self.pending = self.bytes = 0

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        assert self.count, f"{self.name} is not initialised"
        assert count <= self.pending, f"{self.name}: more arrivals than it takes"
        self.pending -= count
        self.copied(-expected)

    def copied(self, size: int) -> None:
        self.bytes -= size
        if self.pending == 0 and self.bytes == 0:
            self.ended += 1
            self.pending = self.count


class Barriers:
    def __init__(self, count: int) -> None:
        self.places = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        return self.places[i]

    def call(self, name: str) -> None:
        for i, barrier in enumerate(self.places):
            barrier.name = f"{name}[{i}] of {len(self.places)}"


class Shared:
    """A view of shared memory: `plain` as threads see it, `fenced` as everything else does."""

    def __init__(self, machine: Machine, plain: torch.Tensor, fenced: torch.Tensor) -> None:
        self.machine, self.plain, self.fenced = machine, plain, fenced
        self.shape, self.dtype = list(plain.shape), plain.dtype

    def _view(self, view: Callable[[torch.Tensor], torch.Tensor]) -> Shared:
        return Shared(self.machine, view(self.plain), view(self.fenced))

    def index(self, i: int) -> Shared:
        assert 0 <= i < self.shape[0]
        return self._view(lambda t: t[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self._view(lambda t: t.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return self._view(lambda t: t.permute(order))

    def load(self, layout: object) -> torch.Tensor:
        return self.plain.clone()

    def store(self, value: torch.Tensor) -> None:
        assert (self.dtype, self.shape) == (value.dtype, list(value.shape))
        self.plain.copy_(value)
        dirty = self.machine.current.dirty["shared"]
        dirty.append(lambda: void(self.fenced.copy_(self.plain)))
        self.machine.switch()

    def fill(self, value: torch.Tensor | float) -> None:
        for t in (self.plain, self.fenced):
            t.copy_(value) if isinstance(value, torch.Tensor) else t.fill_(value)


def void(_: object) -> None:
    pass


class Pointer:
    """An address, or a tensor of them: elements of a storage."""

    def __init__(self, flat: torch.Tensor, offset: Any) -> None:
        self.flat, self.offset = flat, offset

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.offset + more)


class Descriptor:
    def __init__(self, given: Any) -> None:
        self.base, self.layout, self.dtype = given.base, given.layout, given.base.dtype
        self.bounds, self.strides = given.shape, given.strides
        shape = list(given.block_shape)
        self.block_type = SimpleNamespace(
            shape=shape, nbytes=shape[0] * shape[1] * self.dtype.itemsize
        )

    def overlap(self, source: torch.Tensor, at: list[int]) -> tuple[torch.Tensor, int, int]:
        """The tile's part of the tensor in ``source``, with its rows and columns."""
        assert all(i >= 0 for i in at)
        shape = zip(self.bounds, self.block_type.shape, at, strict=True)
        rows, columns = (max(0, min(block, bound - i)) for bound, block, i in shape)
        offset = self.base.storage_offset() + at[0] * self.strides[0] + at[1]
        size = (rows, columns)
        return source.as_strided(size, self.strides, offset if rows * columns else 0), rows, columns


class Product:
    """An accumulator: nobody may look before the wait for it."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value, self.shape = value, value.shape

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"{name} of a product that was not waited for")


def _flat(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())


class Language:
    """`gl`, `tl`, `tma` and `mbarrier` in one: what a kernel calls, over a machine."""

    constexpr = staticmethod(lambda value: value)
    static_range = range
    int32, int64, float32 = torch.int32, torch.int64, torch.float32
    MBarrierLayout = hopper.mbarrier.MBarrierLayout

    def __init__(self, machine: Machine, programs: int) -> None:
        self.machine, self.programs = machine, programs

    def __getattr__(self, name: str) -> Any:  # layouts
        return getattr(real_gl, name)

    def program_id(self, axis: int) -> int:
        return self.machine.current.program

    def num_programs(self, axis: int) -> int:
        return self.programs

    def num_warps(self) -> int:
        return 4

    def cdiv(self, a: int, b: int) -> int:
        return -(-a // b)

    def cast(self, value: float, dtype: torch.dtype) -> float:
        return torch.tensor(value, dtype=dtype).item()

    def arange(self, first: int, last: int, layout: object = None) -> torch.Tensor:
        return torch.arange(first, last)

    def zeros(self, shape: list[int], dtype: torch.dtype, layout: object) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def full(self, shape: list[int], value: Any, dtype: torch.dtype, layout: object) -> Any:
        return torch.full(shape, value, dtype=dtype)

    def max(self, t: torch.Tensor, axis: int) -> Any:
        return t.amax(axis).item()

    def reshape(self, t: torch.Tensor, shape: list[int]) -> torch.Tensor:
        return t.reshape(shape)

    def permute(self, t: torch.Tensor, order: list[int]) -> torch.Tensor:
        return t.permute(order)

    def split(self, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return t.unbind(-1)

    # Global memory

    def load(self, pointer: Pointer, mask: Any = None, other: Any = 0.0) -> Any:
        self.machine.switch()
        if isinstance(pointer.offset, int):
            return pointer.flat[pointer.offset].item()
        result = torch.full(pointer.offset.shape, other, dtype=pointer.flat.dtype)
        result[mask] = pointer.flat[pointer.offset[mask]]
        return result

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        self.machine.switch()
        flat, key = pointer.flat, pointer.flat.data_ptr()
        seen = self.machine.seen_by_copies.setdefault(key, flat.clone())
        at = pointer.offset if mask is None else pointer.offset[mask]
        flat[at] = value if mask is None else value[mask]
        dirty = self.machine.current.dirty["global"]
        dirty.append(lambda: void(seen.__setitem__(at, flat[at])))

    def atomic_add(self, pointer: Pointer, value: int, sem: str = "acq_rel") -> int:
        self.machine.switch()
        old = int(pointer.flat[pointer.offset])
        pointer.flat[pointer.offset] += value
        return old

    def atomic_xchg(self, pointer: Pointer, value: int, sem: str = "acq_rel") -> None:
        self.machine.switch()
        pointer.flat[pointer.offset] = value

    def debug_barrier(self) -> None:
        self.machine.switch()

    def inline_asm_elementwise(self, asm: str, *_: object, **__: object) -> int:
        if asm.startswith("trap"):
            raise Trap
        assert asm.startswith("fence.proxy.async.global;")
        self._fence("global")
        return 0

    def _fence(self, space: str) -> None:
        for publish in self.machine.current.dirty[space]:
            publish()
        self.machine.current.dirty[space].clear()

    # Shared memory and its barriers

    def allocate_shared_memory(
        self, dtype: torch.dtype, shape: list[int], layout: object
    ) -> Shared | Barriers:
        if isinstance(layout, self.MBarrierLayout):
            return Barriers(shape[0])
        poison = POISON.get(dtype, float("nan"))
        return Shared(self.machine, *(torch.full(shape, poison, dtype=dtype) for _ in range(2)))

    def fence_async_shared(self) -> None:
        self._fence("shared")

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def expect(self, barrier: Barrier, size: int) -> None:
        self.machine.switch()
        barrier.arrive(expected=size)  # it is an arrival too

    def arrive(self, barrier: Barrier, count: int = 1, pred: bool = True) -> None:
        self.machine.switch()
        if pred:
            barrier.arrive(count)

    def wait(self, barrier: Barrier, parity: int) -> None:
        assert barrier.count, f"{barrier.name} is not initialised"
        reason = f"phase {parity} of {barrier.name}, where {barrier.ended} have ended"
        self.machine.switch(lambda: barrier.ended & 1 != parity, reason)

    # The copy engine

    def async_load(self, desc: Descriptor, at: list[int], barrier: Barrier, to: Shared) -> None:
        assert (to.dtype, to.shape) == (desc.dtype, desc.block_type.shape)
        to.fill(float("nan"))
        flat = _flat(desc.base)

        def copy() -> None:
            seen = self.machine.seen_by_copies.get(flat.data_ptr(), flat)
            source, rows, columns = desc.overlap(seen, at)
            to.fill(0.0)
            to.slice(0, rows, 0).slice(0, columns, 1).fill(source)
            barrier.copied(desc.block_type.nbytes)

        self.machine.copies.append(copy)
        self.machine.switch()

    def async_store(self, desc: Descriptor, at: list[int], source: Shared) -> None:
        assert (source.dtype, source.shape) == (desc.dtype, desc.block_type.shape)

        def copy() -> None:
            target, rows, columns = desc.overlap(_flat(desc.base), at)
            target.copy_(source.fenced[:rows, :columns])

        self.machine.current.stores.append(copy)
        self.machine.current.committed.append(copy)
        self.machine.switch()

    def store_wait(self, pendings: int) -> None:
        thread = self.machine.current  # which stores are too old, not how many may be in flight
        older = thread.committed[: max(0, len(thread.committed) - pendings)]
        self.machine.switch(lambda: not any(s in thread.stores for s in older), "its stores")

    # The tensor cores

    def warpgroup_mma(
        self, a: Shared, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        assert is_async
        assert a.shape[1] == b.shape[0]
        assert a.shape[1] % 16 == 0
        before = acc if isinstance(acc, Product) else Product(acc)
        product = Product(before.value)

        def multiply() -> None:
            added = a.fenced.float() @ b.fenced.float()
            product.value = before.value + added if use_acc else added

        self.machine.current.products.append(multiply)
        self.machine.switch()
        return product

    def warpgroup_mma_wait(self, outstanding: int = 0, deps: tuple[Any, ...] = ()) -> Any:
        products = self.machine.current.products
        self.machine.switch(lambda: len(products) <= outstanding, "its products")
        (acc,) = deps
        return acc if products or not isinstance(acc, Product) else acc.value

    # Partitions

    def warp_specialize(
        self, partitions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]
    ) -> None:
        machine, program = self.machine, self.machine.current.program
        for function, arguments in partitions:
            for name, value in zip(inspect.signature(function).parameters, arguments, strict=True):
                if isinstance(value, Barriers):
                    value.call(name)
        workers = [
            machine.start(
                program, f"worker {i} {function.__name__}", lambda f=function, a=args: f(*a)
            )
            for i, (function, args) in enumerate(partitions[1:])
        ]
        function, arguments = partitions[0]
        function(*arguments)
        machine.drain(machine.current)
        machine.switch(lambda: all(w.done for w in workers), "the other partitions")


def _rebuild(function: Any, language: Language, made: dict[Any, Any]) -> Any:
    """The kernel's Python function, and all that it calls, with `language` for Gluon."""
    python = getattr(function, "fn", function)
    if python in made:
        return made[python]
    names: dict[str, Any] = {}
    rebuilt = FunctionType(python.__code__, names, python.__name__, python.__defaults__)
    made[python] = rebuilt
    for name, value in python.__globals__.items():
        if isinstance(value, real_tl.constexpr):
            value = value.value
        elif value in (real_gl, real_tl, hopper.tma, hopper.mbarrier):
            value = language
        elif name in python.__code__.co_names and hasattr(value, "fn"):
            value = _rebuild(value, language, made)
        elif name in python.__code__.co_names and name in dir(Language):
            value = getattr(language, name)
        names[name] = value
    return rebuilt


class Emulated:
    """A kernel that is launched like the real one: ``Emulated(kernel, seed)[grid](...)``."""

    def __init__(self, kernel: Any, seed: int, resident: int | None = None) -> None:
        self.kernel, self.seed, self.resident = kernel, seed, resident

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launch(grid[0], args, kwargs)

    def launch(self, programs: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        machine = Machine(self.seed)
        kernel = _rebuild(self.kernel, Language(machine, programs), {})
        parameters = inspect.signature(kernel).parameters
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        values = {name: _argument(v) for name, v in given.items() if name in parameters}
        running = min(programs, self.resident or programs)

        def run(program: int) -> None:
            kernel(**values)
            if (following := program + running) < programs:  # in the place of the one that ends
                machine.start(following, "worker", lambda: run(following))

        threads = [machine.start(i, "default", lambda i=i: run(i)) for i in range(running)]
        machine.current = threads[0]
        machine.next()
        machine.finished.wait()
        if machine.error is not None:
            raise machine.error


def _argument(value: Any) -> Any:
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    if isinstance(value, torch.Tensor):
        return Pointer(_flat(value), value.storage_offset())
    return value
