"""Measures every strategy and tile for given shapes and keeps the best in the user's table.

Runs only when it is asked to: training reads tables and never tunes.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from . import dispatch, tables
from .calls import Call, transposed
from .cost_model import predicted_seconds
from .device_time import median_seconds
from .kernels.configs import tunable
from .kernels.device import device_guard, device_info
from .kernels.dropout import Dropout, dropout_threshold
from .kernels.tile_config import TileConfig
from .strategies import PARTS, WAYS, kernel_obstacle
from .tables import Choice, Product, Strategy

Candidate = tuple[Strategy | None, TileConfig | None]
Problems = Mapping[str, tuple[Call, Product]]  # by their keys in a table
Timer = Callable[[Sequence[Callable[[], object]]], list[float]]  # seconds of calls, in turns
FINALISTS = 4  # of a problem: once more, in turns
# How far two correct results may be apart, as a fraction of their norm, in 16-bit products.
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Measurement:
    """One candidate for one problem; ``seconds`` is None where ``problem`` says why."""

    key: str
    strategy: Strategy | None
    config: TileConfig | None
    seconds: float | None
    problem: str = ""


def shape(text: str) -> tuple[int, int, int]:
    """M, N and K of "8192,4096,4096"; ValueError for anything else."""
    try:
        M, N, K = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"shapes: got {text!r}, wanted M,N,K such as 8192,4096,4096") from None
    if min(M, N, K) < 1:
        raise ValueError(f"shapes: got {text!r}, wanted sizes of at least 1")
    return M, N, K


def candidates(call: Call, product: Product) -> Iterator[Candidate]:
    """Every strategy and tile that can take the call; for dx, it is transposed already."""
    device = device_info(call.device)
    if product == "h" or product == "grads":
        kind, itemsize = PARTS[product], call.dtype.itemsize
        for config in tunable(kind, call.r, itemsize, call.dropout, device):
            yield None, config
        return
    for strategy in predicted_seconds(call, device):
        for tile in dispatch.tiles_of(call, strategy):
            yield strategy, tile


def _candidates(call: Call, product: Product, by_hand: bool) -> list[Candidate]:
    """Those of `candidates` whose kernels are scheduled by hand, or the others."""
    return [
        (strategy, config)
        for strategy, config in candidates(call, product)
        if (strategy is not None and WAYS[strategy].by_hand) == by_hand
    ]


class _Problem:
    """Random operands of one product, in the layout that its direction reads."""

    def __init__(self, call: Call, product: Product) -> None:
        def normal(rows: int, columns: int) -> Tensor:
            # Forward reads weights [N, K] transposed, the input gradient as they are.
            shape = (rows, columns) if product == "dx" else (columns, rows)
            t: Tensor = torch.randn(shape, dtype=call.dtype, device=call.device) * rows**-0.5
            return t if product == "dx" else t.mT

        self.product = product
        self.x = torch.randn(call.M, call.K, dtype=call.dtype, device=call.device)
        self.w, self.a, self.b = (
            normal(call.K, call.N),
            normal(call.K, call.r),
            normal(call.r, call.N),
        )
        self.dropout = None
        if call.dropout:
            seed = torch.zeros(1, dtype=torch.int64, device=call.device)
            self.dropout = Dropout(seed, dropout_threshold(0.1))
        if product == "grads":
            self.h = torch.randn(call.M, call.r, dtype=call.dtype, device=call.device)
            self.g = torch.randn(call.M, call.N, dtype=call.dtype, device=call.device)
        self.drop_x = product == "forward"

    def run(self, strategy: Strategy | None, config: TileConfig | None) -> Tensor:
        """y or dx by a strategy; h or the gradients by None. A config of None is the default."""
        from .triton_backend import lora_gemm

        if strategy is None:
            return self._run_part(config)
        y: Tensor
        y, _ = lora_gemm(
            self.x,
            self.w,
            self.a,
            self.b,
            None,
            1.0,
            self.dropout,
            strategy,
            config,
            drop_x=self.drop_x,
            need_h=True,
        )
        return y

    def _run_part(self, config: TileConfig | None) -> Tensor:
        from .kernels.gemm import gemm_scaled
        from .kernels.grads import lora_grads

        rest = self.x.dtype.itemsize, self.dropout is not None, device_info(self.x.device)
        config = config or tunable(PARTS[self.product], len(self.b), *rest)[0]
        if self.product == "h":
            return gemm_scaled(config, self.x, self.a, scale=1.0, dropout=self.dropout)
        dtypes = {"dtype_a": torch.float32, "dtype_b": torch.float32}
        dA, dB = lora_grads(config, self.x, self.h, self.g, self.h, dropout=self.dropout, **dtypes)
        return torch.cat([dA.flatten(), dB.flatten()])  # the same time for all


def checked_seconds(
    run: Callable[[], Tensor],
    expected: Tensor,
    timer: Timer,
    wrong: str,
) -> tuple[float | None, str]:
    """Seconds of a call that gives ``expected``; or None and why: ``wrong`` with the error in it.

    The error is a fraction of the norm; a call that fails says how.
    """
    try:
        error = ((run().float() - expected).norm() / expected.norm()).item()
        if not error < _TOLERANCE:  # nor is NaN
            return None, wrong.format(error)
        return timer([run])[0], ""
    except Exception as problem:  # a compiler may fail in any way; the others can still be had
        return None, f"{type(problem).__name__}: {problem}"


def _measure(
    key: str, problem: _Problem, chosen: list[Candidate], timer: Timer
) -> Iterator[Measurement]:
    """Candidates one after another."""
    reference: Strategy | None = None if problem.product in PARTS else "split"
    expected = problem.run(reference, None).float()
    wrong = "is wrong: its result is {:.1e} of the norm away from split's"
    for candidate in chosen:
        with device_guard(problem.x):
            run = partial(problem.run, *candidate)
            seconds, why = checked_seconds(run, expected, timer, wrong)
        yield Measurement(key, *candidate, seconds, why)


class _Timed(Protocol):
    @property
    def seconds(self) -> float | None: ...


_AnyTimed = TypeVar("_AnyTimed", bound=_Timed)


def fastest(found: Iterable[_AnyTimed]) -> list[_AnyTimed]:
    """Those that are to take turns, after all were measured one after another."""
    right = [m for m in found if m.seconds is not None]
    return sorted(right, key=lambda m: m.seconds or 0.0)[:FINALISTS]


def _best(problem: _Problem, found: Iterable[Measurement], timer: Timer) -> Choice | None:
    """The fastest, as they take turns; None if there is none."""
    last = fastest(found)
    if not last:
        return None
    with device_guard(problem.x):
        seconds = timer([partial(problem.run, m.strategy, m.config) for m in last])
    i = seconds.index(min(seconds))
    return Choice(last[i].strategy, last[i].config, seconds[i])


def _compile(job: tuple[Call, Product, Strategy | None, TileConfig | None]) -> None:
    call, product, strategy, config = job
    # Whatever a compiler raises, the measurement will meet it again and report it.
    with contextlib.suppress(Exception):
        _Problem(call, product).run(strategy, config)


def processes(workers: int) -> ProcessPoolExecutor:
    """A pool of processes, each of which may use the GPU."""
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    return ProcessPoolExecutor(workers, mp_context=spawn)


def in_processes(work: Callable[[Any], None], jobs: list[Any], workers: int) -> None:
    """``work`` of each job, in so many processes."""
    with processes(workers) as pool:
        list(pool.map(work, jobs))


def _compile_all(
    problems: Problems, todo: dict[str, list[Candidate]], pool: ProcessPoolExecutor
) -> None:
    """Fills Triton's cache on disk, where processes can share the work, as timing cannot."""
    list(pool.map(_compile, [(*problems[key], *c) for key in todo for c in todo[key]]))


def problems_of(
    shapes: Iterable[tuple[int, int, int]],
    *,
    ranks: Iterable[int] = (16,),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    dropouts: Iterable[bool] = (False,),
    products: Iterable[Product] = ("h", "grads", "forward", "dx"),
    device: torch.device | str = "cuda",
) -> Problems:
    """What there is to measure for layers, in its order; takes and raises what `tune` does."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    problems: dict[str, tuple[Call, Product]] = {}
    wanted = sorted(set(products), key=get_args(Product)[::-1].index)
    for product, (M, N, K), r, dtype, dropout in itertools.product(
        wanted, list(shapes), list(ranks), list(dtypes), list(dropouts)
    ):
        call = Call(M, N, K, r, dtype, device, dropout, plain_tensors=True)
        obstacle = kernel_obstacle(call)
        if obstacle is not None:
            raise type(obstacle)(f"cannot tune for M, N, K = {M}, {N}, {K}: {obstacle}")
        calls = [transposed(call) if product == "dx" else call]
        if product == "h":  # and dh, of the gradient's N columns, which has no dropout
            calls.append(replace(transposed(call), dropout=False))
        problems |= {dispatch.table_key(call, product): (call, product) for call in calls}
    return problems


def measured(
    problems: Problems,
    *,
    timer: Timer = median_seconds,
    progress: Callable[[int, int, Measurement], None] | None = None,
    pool: ProcessPoolExecutor | None = None,
) -> Iterator[tuple[dict[str, Choice], set[str]]]:
    """Measures problems and keeps each one's best in the user's table, as `tune` does.

    ``pool``: compiles all candidates first. After each problem: the best choices until then, and
    which problems have candidates that were not measured yet.
    """
    best: dict[str, Choice] = {}
    left = set(problems)
    found: dict[str, list[Measurement]] = {key: [] for key in problems}
    # What is scheduled by hand comes after all else, which is kept if a kernel hangs there.
    others, by_hand = (
        {key: chosen for key in problems if (chosen := _candidates(*problems[key], last))}
        for last in (False, True)
    )
    for todo in (others, by_hand):
        if pool is not None and todo:
            _compile_all(problems, todo, pool)
        for done, (key, chosen) in enumerate(todo.items()):
            problem = _Problem(*problems[key])
            for m in _measure(key, problem, chosen, timer):
                found[key].append(m)
                if progress is not None:
                    progress(done, len(todo), m)
            choice = _best(problem, found[key], timer)
            gpu = device_info(problem.x.device).name
            del problem  # before the next one's tensors are made
            if choice is not None:
                best[key] = choice
            tables.save(gpu, best)  # after each, so that a run that is cut off has kept the rest
            dispatch.forget_plans()
            if todo is by_hand or key not in by_hand:
                left.remove(key)
            yield best, left


def tune(
    shapes: Iterable[tuple[int, int, int]],
    *,
    ranks: Iterable[int] = (16,),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    dropouts: Iterable[bool] = (False,),
    products: Iterable[Product] = ("h", "grads", "forward", "dx"),
    device: torch.device | str = "cuda",
    timer: Timer = median_seconds,
    progress: Callable[[int, int, Measurement], None] | None = None,
    workers: int = 0,
) -> dict[str, Choice]:
    """Measures layers and adds the best choices to the user's table for this GPU.

    Candidates are measured one after another; then the fastest few of a problem once more, in
    turns, which decides.

    Args:
        shapes: (M, N, K) of layers: M rows into a weight [N, K]. M counts for its power of two.
        ranks, dtypes, dropouts, products: measured for every shape. h comes first: what makes y and
            dx is measured with the tile that was found for it.
        timer: seconds of each of some calls, which take turns.
        progress: called after each candidate with (problems done, problems, measurement).
        workers: processes that compile all candidates first; 0 compiles each when it is its turn.

    Returns:
        The best choice by table key. A candidate that fails or is wrong is left out; ``progress``
        is told why.

    Raises:
        RuntimeError, TypeError or ValueError: the kernels cannot take one of the problems.
    """
    problems = problems_of(
        shapes, ranks=ranks, dtypes=dtypes, dropouts=dropouts, products=products, device=device
    )
    best: dict[str, Choice] = {}
    with processes(workers) if workers else contextlib.nullcontext() as pool:
        for choices, _ in measured(problems, timer=timer, progress=progress, pool=pool):
            best = choices
    return best
