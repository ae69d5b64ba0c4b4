"""`make bench`: a small share of the suite under pytest-benchmark, provider beside provider.

Plain layers, quantised ones and many adapters in one batch. Wall-clock times of whole calls, Python
and the wait for the device included. The rows that the report is made of come from
`python -m benchmarks.run`.
"""

from itertools import product

import pytest
import torch

from . import kinds, measure
from .conftest import DEVICE
from .shapes import Case, Layer, many_adapters, projections, square

CUDA = DEVICE.type == "cuda"


def _cases() -> list[Case]:
    layers: list[Layer]
    if CUDA:
        layers, tokens, dtype = [square(4096), projections("llama-3.1-8b")[2]], (512, 8192), "bf16"
    else:
        layers, tokens, dtype = [projections("smollm2-135m")[i] for i in (0, 2)], (1, 512), "fp32"
    cases = [
        Case(layer, M, N, K, 16, dropout, dtype, dtype)
        for (layer, N, K), M, dropout in product(layers, tokens, (0.0, 0.1))
    ]
    layer, N, K = layers[1]
    for format, M in product(("nf4", "int8", "fp8"), (tokens[1], 16)):
        cases.append(Case(layer, M, N, K, 16, 0.0, dtype, dtype, format))
    return [*cases, *many_adapters(layers[0][1], dtype, 2 * tokens[1], (64, 256))]


def _calls() -> list[tuple[Case, str, str]]:
    modes = ("forward", "forward+backward")
    return [
        (case, mode, provider.name)
        for case in _cases()
        for mode in (modes[1:] if case.kind == "quantised" else modes)
        if mode in case.modes
        for provider in kinds.choose(case, None, DEVICE)
    ]


@pytest.mark.benchmark(min_rounds=5, max_time=0.4, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize(("case", "mode", "provider"), _calls(), ids=str)
def test_lora(benchmark, case, mode, provider):
    benchmark.group = f"{case} {mode}"
    p = kinds.make_problem(case, DEVICE)
    chosen = kinds.providers_of(case)[0][provider]
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
