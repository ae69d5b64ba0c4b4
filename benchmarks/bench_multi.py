"""`make bench`: many adapters in one batch, against the ways there are without such a kernel.

Every provider is checked against a loop over the adapters in fp64 before it is timed. Providers:

    multi      `lora_linear_multi`
    loop       the base product, then for each adapter index_select, two products, index_add_
    peft       PEFT's own forward with `adapter_names` (it has no form for ragged rows)
    bmm        rows padded to the longest adapter's, ranks to the largest: two torch.bmm
    linear     the base product alone: the bound
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_lora import lora_linear_multi

from .measure import DTYPES

CUDA = torch.cuda.is_available()
R = 16


@dataclass(frozen=True)
class Case:
    """Adapters of rank 16 on one layer; the rows of each adapter are ``rows``, side by side."""

    name: str
    N: int
    K: int
    rows: tuple[int, ...]
    dtype: str
    modes: tuple[str, ...] = ("forward", "forward+backward")

    def __str__(self) -> str:
        adapters = f"{len(self.rows)} adapters M {sum(self.rows)}"
        return f"{self.name} {adapters} N {self.N} K {self.K} r {R} {self.dtype}"


def _cases() -> list[Case]:
    side, dtype = (4096, "bf16") if CUDA else (576, "fp32")
    scale = 8 if CUDA else 1
    ragged = tuple(scale * n for n in (37, 410, 96, 481))
    return [
        Case("joint training, ragged", side, side, ragged, dtype),
        Case("joint training, equal", side, side, (scale * 256,) * 4, dtype),
        Case("decoding", side, side, (1,) * 64, dtype, ("forward",)),
        Case("decoding", side, side, (1,) * 200, dtype, ("forward",)),
    ]


@dataclass
class Problem:
    """The tensors of a case; x, A and B are leaves that train."""

    x: Tensor
    weight: Tensor
    As: list[Tensor]
    Bs: list[Tensor]
    g: Tensor
    rows: tuple[int, ...]

    @property
    def leaves(self) -> list[Tensor]:
        """What backward makes gradients for."""
        return [self.x, *self.As, *self.Bs]


def _problem(case: Case, device: torch.device) -> Problem:
    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * std).to(device, DTYPES[case.dtype])

    M = sum(case.rows)
    p = Problem(
        x=normal(M, case.K),
        weight=normal(case.N, case.K, std=case.K**-0.5),
        As=[normal(R, case.K, std=case.K**-0.5) for _ in case.rows],
        Bs=[normal(case.N, R, std=R**-0.5) for _ in case.rows],
        g=normal(M, case.N),
        rows=case.rows,
    )
    for leaf in p.leaves:
        leaf.requires_grad_()
    return p


def _multi(p: Problem) -> Callable[[], Tensor]:
    segments = list(enumerate(p.rows))
    return lambda: lora_linear_multi(p.x, p.weight, p.As, p.Bs, scalings=1.0, segments=segments)


def _indices(rows: Sequence[int], device: torch.device) -> list[Tensor]:
    return list(torch.arange(sum(rows), device=device).split(list(rows)))


def _loop(p: Problem) -> Callable[[], Tensor]:
    indices = _indices(p.rows, p.x.device)

    def call() -> Tensor:
        y = F.linear(p.x, p.weight)
        for index, A, B in zip(indices, p.As, p.Bs, strict=True):
            y = y.index_add(0, index, F.linear(F.linear(p.x[index], A), B))
        return y

    return call


def _bmm(p: Problem) -> Callable[[], Tensor]:
    longest, device = max(p.rows), p.x.device
    indices = _indices(p.rows, device)
    padded = torch.stack([F.pad(index, (0, longest - len(index))) for index in indices])
    real = torch.stack([torch.arange(longest, device=device) < n for n in p.rows])

    def call() -> Tensor:
        A, B = torch.stack(p.As), torch.stack(p.Bs)
        update = torch.bmm(torch.bmm(p.x[padded], A.mT), B.mT)
        return F.linear(p.x, p.weight).index_add(0, padded[real], update[real])

    return call


def _peft(p: Problem) -> Callable[[], Tensor]:
    """Samples of one row each in decoding; else PEFT's samples have to be equally long."""
    from peft import LoraConfig, get_peft_model

    N, K = p.weight.shape
    model = nn.Sequential()
    linear = nn.utils.skip_init(nn.Linear, K, N, bias=False, device=p.x.device, dtype=p.x.dtype)
    model.add_module("proj", linear)
    names = [f"a{i}" for i in range(len(p.rows))]
    config = LoraConfig(r=R, lora_alpha=R, target_modules=["proj"])
    peft_model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, config)
    layer = peft_model.base_model.model.proj.eval()
    tensors = [(layer.base_layer, p.weight)]
    tensors += [(layer.lora_A[name], A) for name, A in zip(names, p.As, strict=True)]
    tensors += [(layer.lora_B[name], B) for name, B in zip(names, p.Bs, strict=True)]
    for module, tensor in tensors:
        del module.weight
        module.weight = tensor

    def call() -> Tensor:
        y: Tensor = layer(p.x.view(len(names), -1, K), adapter_names=names)
        return y.view(-1, N)

    return call


def _linear(p: Problem) -> Callable[[], Tensor]:
    return lambda: F.linear(p.x, p.weight)


PROVIDERS = {"multi": _multi, "loop": _loop, "peft": _peft, "bmm": _bmm, "linear": _linear}


def _assert_correct(y: Tensor, p: Problem) -> None:
    exact = torch.cat(
        [
            F.linear(x, p.weight.double()) + F.linear(F.linear(x, A.double()), B.double())
            for x, A, B in zip(p.x.double().split(list(p.rows)), p.As, p.Bs, strict=True)
        ]
    )
    assert (y.double() - exact).norm() <= 2 * torch.finfo(y.dtype).eps ** 0.75 * exact.norm()


@pytest.mark.benchmark(min_rounds=5, max_time=0.4, warmup=True, warmup_iterations=2)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("case", "mode"),
    [(case, mode) for case in _cases() for mode in case.modes],
    ids=lambda part: str(part),
)
def test_multi(benchmark, device, case, mode, provider):
    benchmark.group = f"{case} {mode}"
    if provider == "peft" and not importlib.util.find_spec("peft"):
        pytest.skip("peft is not installed")
    if provider == "peft" and len(set(case.rows)) > 1:
        pytest.skip("PEFT's batches have samples of one length")
    p = _problem(case, device)
    layer = PROVIDERS[provider](p)
    if provider != "linear":
        _assert_correct(layer(), p)
    leaves = p.leaves if provider != "linear" else [p.x]

    def forward() -> None:
        with torch.no_grad():
            layer()

    def both() -> None:
        torch.autograd.grad(layer(), leaves, p.g)

    call = forward if mode == "forward" else both

    def finished() -> None:
        call()
        if CUDA:
            torch.cuda.synchronize()

    benchmark(finished)
