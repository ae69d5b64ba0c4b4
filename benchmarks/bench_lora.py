"""`make bench`: a small share of the suite under pytest-benchmark, provider beside provider.

Wall-clock times of whole calls, Python and the wait for the device included. The rows that the
report is made of come from `python -m benchmarks.run`.
"""

from itertools import product

import pytest
import torch

from . import measure
from .providers import CPU_PROVIDERS, PROVIDERS
from .shapes import Case, Layer, projections, square

CUDA = torch.cuda.is_available()


def _cases() -> list[Case]:
    layers: list[Layer]
    if CUDA:
        layers, tokens, dtype = [square(4096), projections("llama-3.1-8b")[2]], (512, 8192), "bf16"
    else:
        layers, tokens, dtype = [projections("smollm2-135m")[i] for i in (0, 2)], (1, 512), "fp32"
    return [
        Case(layer, M, N, K, 16, dropout, dtype, dtype)
        for (layer, N, K), M, dropout in product(layers, tokens, (0.0, 0.1))
    ]


@pytest.mark.benchmark(min_rounds=5, max_time=0.4, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("provider", PROVIDERS if CUDA else CPU_PROVIDERS)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("case", _cases(), ids=str)
def test_lora(benchmark, device, case, mode, provider):
    benchmark.group = f"{case} {mode}"
    p = measure.make_problem(case, device)
    chosen = PROVIDERS[provider]
    obstacle = chosen.obstacle(p)
    if obstacle:
        pytest.skip(obstacle)
    measure.assert_correct(chosen, p)
    call = measure.calls(chosen, p)[mode]

    def finished() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    benchmark(finished)
