"""Every kernel on small, odd-shaped calls, forward and backward: a program for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.sanitize

Without PyTorch's caching allocator every tensor is an allocation of its own, beyond whose end
nothing is. Results are checked too; without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, product
from typing import Any, Literal, cast

import torch

if not torch.cuda.is_available():  # read by Triton when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"

from oracle import check, fused, problem, run

from fused_lora import (
    QuantizedWeight,
    dora_linear,
    lora_linear,
    lora_linear_gated,
    lora_linear_group,
    lora_linear_multi,
    quantize_fp8,
    quantize_nf4,
)
from fused_lora.dispatch import Plan
from fused_lora.group import LoRALinearGroupFunction
from fused_lora.kernels.configs import MAX_SKINNY_M
from fused_lora.kernels.device import device_info
from fused_lora.kernels.dropout import dropout_threshold
from fused_lora.multi import LoRALinearMultiFunction
from fused_lora.multi_backends import MultiPlan
from fused_lora.multi_rows import row_groups
from fused_lora.strategies import specialized_obstacle
from fused_lora.tables import Strategy

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
# M, N, K, r: nothing divides a tile, some fall short of one, some need several. (Not M = r = 1: the
# one rounding of the one element of dh would be compared with PyTorch's, which is luck.)
SHAPES = [(1, 61, 17, 9), (23, 7, 3, 1), (17, 33, 65, 16), (70, 129, 63, 5), (131, 65, 190, 33)]
# Rows of whole 16 bytes, which tensor descriptors want; no side is a whole number of tiles.
ALIGNED = [(61, 136, 72, 24), (150, 264, 200, 16)]
HALF = (torch.bfloat16,) if CUDA else (torch.float16,)
DTYPES = (*HALF, torch.float32)

Case = tuple[str, Callable[[], None]]


def _layer(
    shape: tuple[int, int, int, int], dtype: torch.dtype, strategy: Strategy, dropout_p: float
) -> None:
    adapter_dtype = torch.float32
    p = problem(
        *shape, dtype=dtype, adapter_dtype=adapter_dtype, device=DEVICE, dropout_p=dropout_p
    )
    check(run(fused(Plan("triton", strategy, strategy)), p), p)


def _layers() -> Iterator[Case]:
    """One layer, by every strategy, with the oracle's rule for y and all gradients."""
    plain: list[tuple[Strategy, float]] = [("one_pass", 0.0), ("split", 0.0), ("split", 0.3)]
    plain += [("library", 0.3)]
    special: list[tuple[Strategy, float]] = [("tma_one_pass", 0.0)]
    for strategy in ("tma_split", "one_launch", "skinny"):
        special += [(strategy, 0.0), (strategy, 0.3)]
    special += [("library", 0.0)]
    for shape, dtype, (strategy, p) in chain(
        product(SHAPES, DTYPES, plain), product(ALIGNED, HALF, special)
    ):
        if strategy != "skinny" or shape[0] <= MAX_SKINNY_M:
            name = f"{dtype} M, N, K, r {shape} {strategy} dropout {p}"
            yield name, partial(_layer, shape, dtype, strategy, p)


def _by_hand() -> Iterator[Case]:
    """The hand-scheduled kernel in all of its forms; last: one that hangs ends the program."""
    if specialized_obstacle(DEVICE, device_info(DEVICE)) is not None:
        return
    from hand_scheduled import TOLERANCE, Operands, all_tiles, check_sum

    of: dict[str, Any] = {"transposed": False, "device": DEVICE, "dtype": HALF[0]}
    first, halves = all_tiles()[0], next(c for c in all_tiles() if c.HALVES)
    for shape in ALIGNED:
        for form in ("plain", "second", "produced", "dora"):
            operands = Operands(*shape, **of)
            yield f"{form} {shape}", partial(operands.check, form, first, 8 * TOLERANCE)
        M, N, K, _ = shape
        for Ks, adapters in product(((K, 136), (K, 136, 64)), (False, True)):
            options = {"adapters": adapters, "tolerance": 8 * TOLERANCE, **of}
            name = f"a sum of {len(Ks)} products {shape}, adapters: {adapters}"
            yield name, partial(check_sum, first, M, N, Ks, **options)
    shape = (2900, 3208, 72, 24)  # more tiles than multiprocessors, and few in the last round
    for form in ("second", "produced", "dora"):
        operands = Operands(*shape, **of)
        yield f"{form} {shape} by halves", partial(operands.check, form, halves, 8 * TOLERANCE)


def _others() -> Iterator[Case]:
    """The other products, forward and backward, against their own PyTorch path."""
    for dtype, (M, N, K, r) in product(HALF, SHAPES[2:]):

        def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return (torch.randn(*shape) * shape[-1] ** -0.5).to(DEVICE, dtype)

        x, As, Bs = normal(M, K), [normal(r, K) for _ in range(3)], [normal(N, r) for _ in range(3)]
        weights = [normal(N, K) for _ in range(3)]
        rows = torch.arange(M, device=DEVICE) % 4 - 1
        whole = K // 64 * 64  # NF4's blocks
        calls: dict[str, Callable[..., Any]] = {
            "group": partial(lora_linear_group, x, weights, As, Bs, scalings=[1.0] * 3),
            "multi": partial(
                lora_linear_multi, x, weights[0], As, Bs, scalings=1.0, adapter_indices=rows
            ),
            "gated": partial(
                lora_linear_gated, x, normal(M, K), weights[0], As[0], Bs[0], scaling=1.0
            ),
            "dora": partial(
                dora_linear, x, weights[0], As[0], Bs[0], normal(N).abs() + 0.5, scaling=1.0
            ),
        }
        for way, p in (("split", 0.3), ("library", 0.3), ("library", 0.0)):
            calls[f"group, dx {way}, dropout {p}"] = partial(
                _group, x, weights, As, Bs, cast(Strategy, way), p
            )
        leaves = [x, *As, *Bs]
        if whole:
            x4, A4s = normal(M, whole), [normal(r, whole) for _ in range(3)]
            values = normal(N, whole)
            quantised = quantize_nf4(values)
            adapted = (x4, quantised, A4s[0], Bs[0])
            calls["nf4"] = partial(lora_linear, *adapted, scaling=1.0)
            calls["nf4 dora"] = partial(dora_linear, *adapted, normal(N).abs() + 0.5, scaling=1.0)
            calls["nf4 group"] = partial(
                lora_linear_group, x4, [quantised] * 3, A4s, Bs, scalings=[1.0] * 3
            )
            for strategy in ("split", "expand"):
                calls[f"nf4 multi {strategy}"] = partial(
                    _multi, x4, quantised, A4s, Bs, rows, strategy
                )
            rounding = quantize_fp8(values, activations="fp8")
            calls["fp8 by fp8"] = partial(lora_linear, x4, rounding, A4s[0], Bs[0], scaling=1.0)
            leaves += [x4, *A4s]
        for leaf in leaves:
            leaf.requires_grad_()
        for name, call in calls.items():
            name = f"{dtype} M, N, K, r {(M, N, K, r)} {name}"
            yield name, partial(_same_on_both, call, leaves)


def _group(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    As: list[torch.Tensor],
    Bs: list[torch.Tensor],
    strategy_dx: Strategy,
    dropout_p: float,
    *,
    backend: Literal["triton", "torch"],
) -> tuple[torch.Tensor, ...]:
    """Layers on one x, their dx by one strategy, the last one without dropout."""
    n = len(weights)
    plan = Plan("triton", "split", strategy_dx)
    if backend == "torch":
        plan = Plan("torch", "library", "library")
    thresholds = [dropout_threshold(dropout_p)] * (n - 1) + [0]
    seeds = torch.arange(2 * n, device=x.device).view(n, 2)[:, 0] if dropout_p else None
    tensors = *weights, *As, *Bs, *[None] * n
    ys: tuple[torch.Tensor, ...] = LoRALinearGroupFunction.apply(
        x, [1.0] * n, seeds, thresholds, [plan] * n, None, *tensors
    )
    return ys


def _multi(
    x: torch.Tensor,
    weight: QuantizedWeight,
    As: list[torch.Tensor],
    Bs: list[torch.Tensor],
    indices: torch.Tensor,
    strategy: Literal["split", "expand"],
    *,
    backend: Literal["triton", "torch"],
) -> torch.Tensor:
    """Many adapters by one strategy, whatever their number of rows."""
    if backend == "torch":
        plan = MultiPlan("torch", "library", "library")
    else:  # codes in the base product's loop can only be followed by expansion
        plan = MultiPlan("triton", strategy, strategy, *[strategy == "expand"] * 2)
    rows = row_groups(x.shape[:-1], x.device, len(As), indices, None)
    scalings = (1.0,) * len(As)
    y: torch.Tensor = LoRALinearMultiFunction.apply(
        x, weight, None, scalings, None, 0, rows, plan, None, *As, *Bs
    )
    return y


def _same_on_both(call: Callable[..., Any], leaves: list[torch.Tensor]) -> None:
    results = []
    for backend in ("triton", "torch"):
        y = call(backend=backend)
        ys = [y] if isinstance(y, torch.Tensor) else list(y)
        total = torch.stack([y.float().square().sum() for y in ys]).sum()
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        results.append([t for t in (*ys, *grads) if t is not None])
    for ours, theirs in zip(*results, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < 0.05, f"{error:.1e} of the norm away from the PyTorch path"


def main() -> int:
    """Runs all cases; returns 1 if a result is wrong."""
    torch.manual_seed(0)
    total = wrong = 0
    for name, case in chain(_others(), _layers(), _by_hand()):
        total += 1
        verdict = "right"
        try:
            case()
        except AssertionError as error:
            wrong += 1
            verdict = f"wrong, {error}"
        print(f"{name}: {verdict}", flush=True)  # a sanitizer cut short: how far it came
    where = torch.cuda.get_device_name() if CUDA else "the CPU, in Triton's interpreter"
    print(f"{total - wrong} of {total} cases right on {where}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
