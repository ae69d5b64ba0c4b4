"""How it is measured: correctness first, then times side by side, then peak memory.

GPU times are those of CUDA events. Before each sample the L2 cache is flushed, for as long as
Python needs to enqueue the call, so that the events see the device's time and not Python's. CPU
times are of `time.perf_counter`; of one thread, of `time.process_time`, which leaves out what other
processes on a shared machine took. Providers take turns in an order that is shuffled every round.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from oracle import Problem, Result, compare, in_fp64, magnitudes, run
from torch import Tensor

from fused_lora import device_time
from fused_lora.seeds import draw_seeds

from . import kinds
from .providers import Provider

Call = Callable[[], object]

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its own messages go to stderr at every use

_CPU_SAMPLE = 1e-3  # seconds: shorter calls are repeated within a sample
_MIN_ROUNDS = 7
# A virtual CPU can be half as fast for a second or two: then samples spread more than this from the
# 20 % to the 80 % quantile, and medians of different providers compare different seconds.
_DISTURBED, _ATTEMPTS = 1.15, 3


Expected = tuple[Result, Result, Result]


def assert_correct(
    provider: Provider, p: Problem, known: dict[bool, Expected] | None = None
) -> None:
    """The rule of tests/oracle.py for y and all gradients, or AssertionError.

    Other libraries' dropout masks cannot be known, so that they are checked without dropout.
    ``known`` keeps what providers of the same problem are compared with, if there is no dropout.
    """
    change: dict[str, object] = {} if provider.ours else {"dropout_p": 0.0}
    if not provider.adapter:
        change["lora_B"] = torch.zeros_like(p.lora_B)
    p = replace(p, **change)
    if p.dropout_p:  # the mask, or its seed, that the layer will draw: from the same state
        state = random.getrandbits(32)
        torch.manual_seed(state)
        p = replace(p, seed=_draw(provider, p))
        torch.manual_seed(state)
    needs = ("x", "lora_A", "lora_B") if provider.adapter else ("x",)
    got = run(lambda p: provider.build(p)(p.x), p, needs)
    known = {} if known is None or p.dropout_p else known
    if provider.adapter not in known:
        known[provider.adapter] = _expected(p, needs)
    compare(got, *known[provider.adapter])


def _draw(provider: Provider, p: Problem) -> Tensor:
    if p.x.device.type == "cpu" and provider.backend != "triton":
        try:
            from fused_lora.reference import drawn_mask, dropout_threshold
        except ImportError:  # an older commit, under run --base
            pass
        else:
            return drawn_mask(dropout_threshold(p.dropout_p), *p.x.shape)
    return draw_seeds(1, p.x.device, provider.backend)


def _expected(p: Problem, needs: tuple[str, ...]) -> Expected:
    """Results in fp64, their magnitudes, and PyTorch's own in the same dtypes."""
    expression = kinds.expression(p)
    exact = in_fp64(p)
    return (
        run(expression, exact, needs),
        run(expression, magnitudes(exact), needs),
        run(expression, p, needs),
    )


def calls(provider: Provider, p: Problem) -> dict[str, Call]:
    """A function for every mode that has a time."""
    layer = provider.build(p)
    leaves = kinds.leaves(p) if provider.adapter else [p.x]
    y = layer(p.x)

    def forward() -> Tensor:
        return layer(p.x)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, p.g, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(p.x), leaves, p.g)

    return {"forward": forward, "backward": backward, "forward+backward": both}


def clock() -> Callable[[], float]:
    """Of CPU times, in seconds."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _seconds(call: Call, number: int = 1) -> float:
    """Mean CPU time of a call."""
    now = clock()
    start = now()
    for _ in range(number):
        call()
    return (now() - start) / number


def _cpu_sampler(call: Call) -> Callable[[], float]:
    """Mean time of enough calls for the clock, in us."""
    estimate = min(_seconds(call) for _ in range(3))
    number = max(1, math.ceil(_CPU_SAMPLE / estimate))
    return lambda: _seconds(call, number) * 1e6


def _overhead_sampler(call: Call) -> Callable[[], float]:
    """CPU time of a call in us, without waiting for the device."""

    def sample() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return _seconds(call, 100) * 1e6

    return sample


def side_by_side(
    todo: dict[str, Call], device: torch.device, seconds: float, *, overhead: bool = False
) -> dict[str, list[float]]:
    """Samples in us of every call by name, all in turns, for about ``seconds`` in all."""
    make = device_time.sampler if device.type == "cuda" else _cpu_sampler
    if overhead:
        make = _overhead_sampler
    for call in todo.values():  # what happens once: compilation, handles, caches
        call()
    samplers = [make(call) for call in todo.values()]
    times = device_time.in_turns(samplers, seconds, _MIN_ROUNDS)
    return dict(zip(todo, times, strict=True))


def undisturbed(
    todo: dict[str, Call], device: torch.device, seconds: float, *, overhead: bool = False
) -> dict[str, list[float]]:
    """`side_by_side`, on a CPU again while it is disturbed: of 3 attempts that of least spread."""

    def spread(times: dict[str, list[float]]) -> float:
        each = map(quantiles, times.values())
        return max(found["q80"] / found["q20"] for found in each)

    attempts = []
    for _ in range(_ATTEMPTS if device.type == "cpu" else 1):
        attempts.append(side_by_side(todo, device, seconds, overhead=overhead))
        if spread(attempts[-1]) <= _DISTURBED:
            break
    return min(attempts, key=spread)


def quantiles(samples: list[float]) -> dict[str, float]:
    """Median and the 20 % and 80 % quantiles."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"median": statistics.median(samples), "q20": fifths[0], "q80": fifths[3]}


def peak_memory(call: Call, device: torch.device) -> int:
    """Most bytes that the call holds at once beyond what is there before it.

    On a GPU by the caching allocator's own count. On a CPU by the profiler's record of every
    allocation of PyTorch's CPU allocator, temporaries inside operators included (but not what
    oneDNN and MKL take for themselves).
    """
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return max(_cpu_memory(call), default=0)


def _cpu_memory(call: Call) -> Iterator[int]:
    """Bytes allocated by the call after each allocation and release."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    allocated = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        yield allocated


def release() -> None:
    """Gives memory back that nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
