"""Micro-batches for several jobs that train adapters on one frozen model.

Every job brings its own batches. Packed together they fill micro-batches that one job would leave
half empty; in the style of LoRAFusion's scheduler (https://arxiv.org/abs/2510.00206, section 5).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Integral

from . import checks


@dataclass(frozen=True, order=True)
class Sample:
    """One sequence of one job."""

    job: int  # which is its adapter's index
    step: int  # the optimiser step that its gradient belongs to
    index: int  # within the step's batch
    tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """Samples to run in one forward and backward pass, those of one job together."""

    samples: tuple[Sample, ...]
    steps_after: tuple[int, ...]  # jobs whose step is complete: their optimisers step now

    @property
    def tokens(self) -> int:
        """Rows of the packed batch."""
        return sum(sample.tokens for sample in self.samples)

    @property
    def segments(self) -> list[tuple[int, int]]:
        """(adapter, rows) for `lora_linear_multi`: one stretch a job.

        For a whole model by name: ``route(model, segments=[(names[j], n) for j, n in segments])``.
        """
        return [
            (job, sum(sample.tokens for sample in samples))
            for job, samples in groupby(self.samples, key=lambda sample: sample.job)
        ]


def schedule(jobs: Sequence[Sequence[Sequence[int]]], max_tokens: int) -> list[MicroBatch]:
    """Packs every job's batches into few and equally large micro-batches, in the order to run them.

    ``jobs[j][s]`` has the lengths in tokens of the samples in job j's batch s. Step s of all jobs
    is packed together and runs before step s + 1 of any, so that no micro-batch has two steps of
    one adapter, and each step's optimiser can run before the next step's first sample does.

    Raises TypeError or ValueError unless all lengths are integers from 1 to ``max_tokens``.
    """
    checks.check_integer("max_tokens", max_tokens, 1)
    _check_list("jobs", jobs, "the jobs")
    for j, job in enumerate(jobs):
        _check_list(f"jobs[{j}]", job, "the batches of a job")
        for s, batch in enumerate(job):
            _check_list(f"jobs[{j}][{s}]", batch, "the samples of a batch")
            for tokens in batch:
                if isinstance(tokens, bool) or not isinstance(tokens, Integral):
                    raise TypeError(f"jobs[{j}][{s}]: got {tokens!r}, wanted a number of tokens")
                if not 1 <= tokens <= max_tokens:
                    raise ValueError(
                        f"jobs[{j}][{s}]: got {tokens} tokens, wanted 1 to {max_tokens}"
                    )
    micro_batches = []
    for s in range(max(map(len, jobs), default=0)):
        samples = [
            Sample(j, s, i, int(tokens))
            for j, job in enumerate(jobs)
            for i, tokens in enumerate(job[s] if s < len(job) else ())
        ]
        bins = pack([sample.tokens for sample in samples], max_tokens)
        packed = [tuple(sorted(samples[i] for i in indices)) for indices in bins]
        last = {sample.job: b for b, chosen in enumerate(packed) for sample in chosen}
        for b, chosen in enumerate(packed):
            complete = tuple(sorted(job for job in last if last[job] == b))
            micro_batches.append(MicroBatch(chosen, complete))
    return micro_batches


def _check_list(name: str, value: object, what: str) -> None:
    if isinstance(value, str) or not isinstance(value, Collection):  # NumPy's arrays too
        raise TypeError(f"{name}: got {value!r}, wanted a list of {what}")


def lower_bound(sizes: Sequence[int], capacity: int) -> int:
    """A number of bins that no packing of ``sizes`` gets below (Martello and Toth's L2 bound).

    For each t, sizes beyond capacity - t share a bin with none of at least t, those beyond half
    the capacity with none of their own kind, and what they leave takes the others of at least t.
    """
    best = 0
    for t in {0, *(size for size in sizes if 2 * size <= capacity)}:
        alone = [size for size in sizes if size > capacity - t]
        large = [size for size in sizes if capacity - t >= size and 2 * size > capacity]
        small = [size for size in sizes if t <= size and 2 * size <= capacity]
        left = len(large) * capacity - sum(large)
        more = -(-max(0, sum(small) - left) // capacity)
        best = max(best, len(alone) + len(large) + more)
    return best


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of ``sizes`` in bins of at most ``capacity``: few bins, then as equal as can be.

    Longest first onto the lightest bin (Graham's LPT), with the fewest bins that this works for;
    where putting each onto the fullest bin that takes it (best fit decreasing) needs fewer bins,
    that. Then what still makes the heaviest bin lighter is moved or swapped.
    """
    descending = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    fitted = _best_fit(sizes, descending, capacity)
    bins = fitted
    for number in range(lower_bound(sizes, capacity), len(fitted) + 1):
        even = _longest_first(sizes, descending, number)
        if all(sum(sizes[i] for i in chosen) <= capacity for chosen in even):
            bins = even
            break
    return _level(sizes, bins)


def _best_fit(sizes: Sequence[int], descending: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    loads: list[int] = []
    for i in descending:
        fits = [b for b, load in enumerate(loads) if load + sizes[i] <= capacity]
        if fits:
            b = max(fits, key=loads.__getitem__)
        else:
            b = len(bins)
            bins.append([])
            loads.append(0)
        bins[b].append(i)
        loads[b] += sizes[i]
    return bins


def _longest_first(sizes: Sequence[int], descending: list[int], number: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(number)]
    loads = [(0, b) for b in range(number)]
    for i in descending:
        load, b = loads[0]
        bins[b].append(i)
        heapq.heapreplace(loads, (load + sizes[i], b))
    return bins


def _level(sizes: Sequence[int], bins: list[list[int]]) -> list[list[int]]:
    """Moves or swaps between the heaviest bin and another while that makes the heavier lighter."""
    loads = [sum(sizes[i] for i in chosen) for chosen in bins]
    while bins:
        heavy = max(range(len(bins)), key=loads.__getitem__)
        # How much to shift to the other bin: best is half the difference, helpful is less than all.
        found = min(
            (
                (max(loads[heavy] - shift, loads[other] + shift), i, other, j)
                for other in range(len(bins))
                for i in bins[heavy]
                for j in (None, *bins[other])
                if 0 < (shift := sizes[i] - (0 if j is None else sizes[j]))
                and loads[other] + shift < loads[heavy]
            ),
            default=None,
            key=lambda choice: choice[0],
        )
        if found is None:
            return bins
        _, i, other, j = found
        bins[heavy].remove(i)
        bins[other].append(i)
        shift = sizes[i]
        if j is not None:
            bins[other].remove(j)
            bins[heavy].append(j)
            shift -= sizes[j]
        loads[heavy] -= shift
        loads[other] += shift
    return bins
