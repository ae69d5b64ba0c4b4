"""Measures every strategy and tile for given shapes and keeps the best in the user's table.

Runs only when it is asked to: training reads tables and never tunes.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dispatch, tables
from .device_time import median_seconds
from .kernels.configs import TileConfig, is_specialized, ship
from .kernels.device import device_guard, device_info
from .kernels.dropout import Dropout, dropout_threshold
from .tables import Choice, Direction, Strategy

Candidate = tuple[Strategy, TileConfig | None]
# How far two correct results may be apart, as a fraction of their norm, in 16-bit products.
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Measurement:
    """One candidate for one problem; ``seconds`` is None where ``problem`` says why."""

    key: str
    strategy: Strategy
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


def candidates(call: dispatch.Call, direction: Direction) -> Iterator[Candidate]:
    """Every strategy and tile that can take the call; for dx, its N and K are swapped already."""
    device = device_info(call.device)
    for strategy in dispatch.predicted_seconds(call, device):
        if strategy == "library":
            yield strategy, None
            continue
        kind = dispatch.KINDS[strategy]
        # In the forward, dropout is on x where h is made, and the launch that makes y has none.
        dropout = call.dropout and (direction == "dx" or strategy.endswith("one_pass"))
        for config in ship(kind, call.r, call.dtype.itemsize, dropout, device):
            if strategy != "skinny" or config.BLOCK_M >= call.M:
                yield strategy, config


def _candidates(call: dispatch.Call, direction: Direction, by_hand: bool) -> list[Candidate]:
    """Those of `candidates` whose kernels are scheduled by hand, or the others."""
    return [
        (strategy, config)
        for strategy, config in candidates(call, direction)
        if (strategy in dispatch.KINDS and is_specialized(dispatch.KINDS[strategy])) == by_hand
    ]


class _Problem:
    """Random operands of one product, in the layout that its direction reads."""

    def __init__(self, call: dispatch.Call, direction: Direction) -> None:
        def normal(rows: int, columns: int) -> Tensor:
            # Forward reads weights [N, K] transposed, the input gradient as they are.
            shape = (rows, columns) if direction == "dx" else (columns, rows)
            t: Tensor = torch.randn(shape, dtype=call.dtype, device=call.device) * rows**-0.5
            return t if direction == "dx" else t.mT

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
        self.drop_x = direction == "forward"

    def run(self, strategy: Strategy, config: TileConfig | None) -> Tensor:
        from .triton_backend import lora_gemm

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


def checked_seconds(
    run: Callable[[], Tensor],
    expected: Tensor,
    timer: Callable[[Callable[[], object]], float],
    wrong: str,
) -> tuple[float | None, str]:
    """Seconds of a call that gives ``expected``; or None and why: ``wrong`` with the error in it.

    The error is a fraction of the norm; a call that fails says how.
    """
    try:
        error = ((run().float() - expected).norm() / expected.norm()).item()
        if not error < _TOLERANCE:  # nor is NaN
            return None, wrong.format(error)
        return timer(run), ""
    except Exception as problem:  # a compiler may fail in any way; the others can still be had
        return None, f"{type(problem).__name__}: {problem}"


def _measure(
    call: dispatch.Call,
    direction: Direction,
    chosen: list[Candidate],
    timer: Callable[[Callable[[], object]], float],
) -> Iterator[Measurement]:
    name = dispatch.table_key(call, direction)
    problem = _Problem(call, direction)
    expected = problem.run("split", None).float()
    for strategy, config in chosen:
        with device_guard(problem.x):
            seconds, why = checked_seconds(
                lambda s=strategy, c=config: problem.run(s, c),  # type: ignore[misc]
                expected,
                timer,
                "is wrong: its result is {:.1e} of the norm away from split's",
            )
        yield Measurement(name, strategy, config, seconds, why)


def _compile(job: tuple[dispatch.Call, Direction, Strategy, TileConfig | None]) -> None:
    call, direction, strategy, config = job
    # Whatever a compiler raises, the measurement will meet it again and report it.
    with contextlib.suppress(Exception):
        _Problem(call, direction).run(strategy, config)


def in_processes(work: Callable[[Any], None], jobs: list[Any], workers: int) -> None:
    """``work`` of each job, in so many processes."""
    spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        list(pool.map(work, jobs))


def _compile_all(
    todo: list[tuple[dispatch.Call, Direction, list[Candidate]]], workers: int
) -> None:
    """Fills Triton's cache on disk, where processes can share the work, as timing cannot."""
    jobs = [(call, direction, *c) for call, direction, chosen in todo for c in chosen]
    in_processes(_compile, jobs, workers)


def tune(
    shapes: Iterable[tuple[int, int, int]],
    *,
    ranks: Iterable[int] = (16,),
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    dropouts: Iterable[bool] = (False,),
    directions: Iterable[Direction] = ("forward", "dx"),
    device: torch.device | str = "cuda",
    timer: Callable[[Callable[[], object]], float] = median_seconds,
    progress: Callable[[int, int, Measurement], None] | None = None,
    workers: int = 0,
) -> dict[str, Choice]:
    """Measures layers and adds the best choices to the user's table for this GPU.

    Args:
        shapes: (M, N, K) of layers: M rows into a weight [N, K]. M counts for its power of two.
        ranks, dtypes, dropouts, directions: measured for every shape.
        timer: seconds of a call.
        progress: called after each candidate with (problems done, problems, measurement).
        workers: processes that compile all candidates first; 0 compiles each when it is its turn.

    Returns:
        The best choice by table key. A candidate that fails or is wrong is left out; ``progress``
        is told why.

    Raises:
        RuntimeError, TypeError or ValueError: the kernels cannot take one of the problems.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    problems: list[tuple[dispatch.Call, Direction]] = []
    for (M, N, K), r, dtype, dropout, direction in itertools.product(
        list(shapes), list(ranks), list(dtypes), list(dropouts), list(directions)
    ):
        call = dispatch.Call(M, N, K, r, dtype, device, dropout, plain_tensors=True)
        obstacle = dispatch.kernel_obstacle(call)
        if obstacle is not None:
            raise type(obstacle)(f"cannot tune for M, N, K = {M}, {N}, {K}: {obstacle}")
        problems.append((call if direction == "forward" else dispatch.transposed(call), direction))
    best: dict[str, Choice] = {}
    gpu = device_info(device).name
    # What is scheduled by hand comes after all else, which is kept if a kernel hangs there.
    for by_hand in (False, True):
        todo = [(*problem, _candidates(*problem, by_hand)) for problem in problems]
        todo = [job for job in todo if job[2]]
        if workers and todo:
            _compile_all(todo, workers)
        for done, (call, direction, chosen) in enumerate(todo):
            for m in _measure(call, direction, chosen, timer):
                faster = m.key not in best or (m.seconds or 0) < best[m.key].seconds
                if m.seconds is not None and faster:
                    best[m.key] = Choice(m.strategy, m.config, m.seconds)
                if progress is not None:
                    progress(done, len(todo), m)
            tables.save(gpu, best)  # after each, so that a run that is cut off has kept the rest
    dispatch.forget_plans()
    return best
