"""Device time of a call, by CUDA events, with a cold L2 and without Python's time."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable

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


def median_seconds(call: Callable[[], object]) -> float:
    """Median of as many samples as fit into 40 ms, at least 9."""
    sample = sampler(call)
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < _MIN_SAMPLES or (
        len(samples) < _MAX_SAMPLES and time.perf_counter() - begin < _SECONDS
    ):
        samples.append(sample())
    return statistics.median(samples) / 1e6
