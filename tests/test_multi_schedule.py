"""The micro-batch scheduler: always valid, near the lower bound, and near the best there is."""

import re
from collections import Counter

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_lora.schedule import lower_bound, pack, schedule

BUDGET = 100
jobs_of_anything = st.lists(
    st.lists(st.lists(st.integers(1, BUDGET), max_size=8), max_size=4), max_size=4
)


@settings(max_examples=200, deadline=None)
@given(jobs_of_anything)
def test_multi_schedules_are_valid(jobs):
    batches = schedule(jobs, BUDGET)
    assert all(0 < batch.tokens <= BUDGET for batch in batches)
    got = Counter((s.job, s.step, s.index, s.tokens) for batch in batches for s in batch.samples)
    wanted = Counter(
        (j, s, i, tokens)
        for j, job in enumerate(jobs)
        for s, lengths in enumerate(job)
        for i, tokens in enumerate(lengths)
    )
    assert got == wanted  # every sample once
    done = {j: 0 for j in range(len(jobs))}
    left = Counter((s.job, s.step) for batch in batches for s in batch.samples)
    for batch in batches:
        for sample in batch.samples:
            assert sample.step >= done[sample.job]  # of no step that its optimiser has finished
            left[sample.job, sample.step] -= 1
        for job in {s.job for s in batch.samples}:
            (step,) = {s.step for s in batch.samples if s.job == job}  # one step of an adapter
            assert (left[job, step] == 0) == (job in batch.steps_after)
            if job in batch.steps_after:
                done[job] = step + 1


@settings(max_examples=100, deadline=None)
@given(jobs_of_anything)
def test_multi_segments_have_an_adapter_once(jobs):
    for batch in schedule(jobs, BUDGET):
        assert sum(rows for _, rows in batch.segments) == batch.tokens
        adapters = [adapter for adapter, _ in batch.segments]
        assert adapters == sorted(set(adapters))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, BUDGET), max_size=30))
def test_multi_packing_is_between_its_bounds(sizes):
    bins = pack(sizes, BUDGET)
    assert sorted(i for chosen in bins for i in chosen) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in chosen) for chosen in bins]
    assert all(0 < load <= BUDGET for load in loads)
    bound = lower_bound(sizes, BUDGET)
    assert bound >= -(-sum(sizes) // BUDGET)
    assert bound <= len(bins) <= bound * 3 / 2 + 1  # first fit decreasing is within 11/9 OPT + 6/9


@pytest.mark.parametrize("sigma", [0.5, 1.0])
@pytest.mark.parametrize("num_jobs", [1, 4])
def test_multi_balance_on_realistic_lengths(sigma, num_jobs):
    """Log-normal lengths, as instruction data has: 4 jobs, 8 steps of 32 samples."""
    budget = 8192
    jobs = [
        [torch.randn(32).mul(sigma).add(6).exp().clamp(16, budget).int().tolist() for _ in range(8)]
        for _ in range(num_jobs)
    ]
    batches = schedule(jobs, budget)
    for step in range(8):
        loads = [b.tokens for b in batches if b.samples[0].step == step]
        sizes = [tokens for job in jobs for tokens in job[step]]
        assert len(loads) <= lower_bound(sizes, budget) + 1
        ideal = max(sum(sizes) / len(loads), max(sizes))
        assert max(loads) <= 1.02 * ideal + 1


def _exact(sizes, capacity):
    """Fewest bins, and with so many the smallest maximum, by mixed-integer programming."""
    optimize = pytest.importorskip("scipy.optimize")
    numpy = pytest.importorskip("numpy")

    def smallest_maximum(number):
        n = len(sizes)
        cost = numpy.zeros(n * number + 1)
        cost[-1] = 1  # variables: item i in bin b, then the maximum
        once = numpy.zeros((n, n * number + 1))
        below = numpy.zeros((number, n * number + 1))
        for i in range(n):
            once[i, i * number : (i + 1) * number] = 1
            for b in range(number):
                below[b, i * number + b] = sizes[i]
        below[:, -1] = -1
        found = optimize.milp(
            cost,
            constraints=[
                optimize.LinearConstraint(once, 1, 1),
                optimize.LinearConstraint(below, -numpy.inf, 0),
            ],
            integrality=numpy.append(numpy.ones(n * number), 0),
            bounds=optimize.Bounds(0, numpy.append(numpy.ones(n * number), capacity)),
        )
        return None if found.x is None else round(found.fun)

    number = -(-sum(sizes) // capacity)
    while (maximum := smallest_maximum(number)) is None:
        number += 1
    return number, maximum


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(10, BUDGET), min_size=1, max_size=8))
def test_multi_packing_against_the_exact_solution(sizes):
    number, maximum = _exact(sizes, BUDGET)
    assert lower_bound(sizes, BUDGET) <= number
    bins = pack(sizes, BUDGET)
    assert len(bins) <= number + 1
    if len(bins) == number:
        heaviest = max(sum(sizes[i] for i in chosen) for chosen in bins)
        assert heaviest <= maximum * 7 / 6  # Graham's bound for LPT is 4/3


@pytest.mark.parametrize(
    ("jobs", "budget", "error", "message"),
    [
        ([[[101]]], 100, ValueError, "jobs[0][0]: got 101 tokens, wanted 1 to 100"),
        ([[[1]], [[2], [0]]], 100, ValueError, "jobs[1][1]: got 0 tokens"),
        ([[[1.5]]], 100, TypeError, "jobs[0][0]: got 1.5"),
        ([], 0, ValueError, "max_tokens: got 0"),
        ([], 1.5, TypeError, "max_tokens: got 1.5"),
    ],
)
def test_multi_schedule_refuses(jobs, budget, error, message):
    with pytest.raises(error, match=re.escape(message)):
        schedule(jobs, budget)


def test_numpys_numbers_are_numbers():
    numpy = pytest.importorskip("numpy")
    assert schedule([[numpy.array([3, 5])]], 8) == schedule([[[3, 5]]], 8)
