"""Device time of a call, by CUDA events, with a cold L2 and without Python's time."""

from __future__ import annotations

import functools
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_FLUSH_BYTES = 256 * 2**20  # five times the L2 of an H100
_MIN_SAMPLES, _MAX_SAMPLES, _SECONDS = 9, 100, 0.04


@functools.cache
def _flush_buffer(device: int) -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)


def sampler(call: Callable[[], object]) -> Callable[[], float]:
    """A function that gives the time of one ``call`` on the current device, in us.

    Before each sample the L2 cache is flushed, for as long as Python needs to enqueue the call.
    """
    cache = _flush_buffer(torch.cuda.current_device())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def elapsed(timed: Callable[[], object], flushes: int = 0) -> float:
        torch.cuda.synchronize()
        for _ in range(flushes):
            cache.zero_()
        start.record()
        timed()
        end.record()
        torch.cuda.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds * 1e3

    enqueue = []
    for _ in range(3):
        torch.cuda.synchronize()
        before = time.perf_counter()
        call()
        enqueue.append((time.perf_counter() - before) * 1e6)
    flush = min(elapsed(cache.zero_) for _ in range(3))
    flushes = 1 + math.ceil(2 * min(enqueue) / flush)
    return lambda: elapsed(call, flushes)


def in_turns(
    samplers: Sequence[Callable[[], float]], seconds: float, at_least: int = _MIN_SAMPLES
) -> list[list[float]]:
    """Samples of each, one a round, in an order shuffled every round, for about ``seconds``."""
    samples: list[list[float]] = [[] for _ in samplers]
    turns = list(zip(samplers, samples, strict=True))
    begin = time.perf_counter()
    for done in range(_MAX_SAMPLES):
        if done >= at_least and time.perf_counter() - begin > seconds:
            break
        random.shuffle(turns)
        for sample, found in turns:
            found.append(sample())
    return samples


def median_seconds(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Each one's median, all in turns, of as many samples as fit into 40 ms a call, at least 9.

    What is to be compared has to take turns: a GPU that has become warm is slower, by 7 % on an
    H200 at 8192^3.
    """
    samples = in_turns([sampler(call) for call in calls], _SECONDS * len(calls))
    return [statistics.median(found) / 1e6 for found in samples]
