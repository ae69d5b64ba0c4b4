r"""Every kernel on small, odd-shaped calls, forward and backward: a program for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
        python -m benchmarks.sanitize [--parts PART ...]

Without PyTorch's caching allocator every tensor is an allocation of its own, beyond whose end
nothing is. Results are checked too; without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice, product
from typing import Any, Literal

import torch

if not torch.cuda.is_available():  # read by Triton when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"

from oracle import check, fused, problem, run

from benchmarks import OUT_OF_TIME
from fused_lora import (
    QuantizedWeight,
    dora_linear,
    lora_linear,
    lora_linear_experts,
    lora_linear_gated,
    lora_linear_group,
    lora_linear_multi,
    quantize_fp8,
    quantize_int8,
    quantize_nf4,
)
from fused_lora.dispatch import Plan
from fused_lora.expert_middle import Middle
from fused_lora.expert_mlp import run_projections
from fused_lora.expert_stack import Projection
from fused_lora.group import LoRALinearGroupFunction
from fused_lora.kernels.alignment import rows_obstacle
from fused_lora.kernels.configs import MAX_SKINNY_M
from fused_lora.kernels.copy import aligned_copy
from fused_lora.kernels.device import device_info
from fused_lora.kernels.dropout import dropout_threshold
from fused_lora.kernels.tile_config import TileConfig
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


def _form(
    shape: tuple[int, int, int, int], form: str, config: TileConfig, transposed: bool
) -> None:
    from hand_scheduled import TOLERANCE, Operands

    operands = Operands(*shape, transposed=transposed, device=DEVICE, dtype=HALF[0])
    operands.check(form, config, 8 * TOLERANCE)


def _sum(M: int, N: int, Ks: tuple[int, ...], config: TileConfig, adapters: bool) -> None:
    from hand_scheduled import TOLERANCE, check_sum

    like: dict[str, Any] = {"transposed": False, "device": DEVICE, "dtype": HALF[0]}
    check_sum(config, M, N, Ks, adapters=adapters, tolerance=8 * TOLERANCE, **like)


def _sums(shape: tuple[int, int, int, int], config: TileConfig) -> Iterator[Case]:
    """dx of two layers and of three, with their adapters' part and without."""
    M, N, K, _ = shape
    for Ks, adapters in product(((K, 136), (K, 136, 64)), (True, False)):
        name = f"a sum of {len(Ks)} products {shape}, adapters: {adapters}"
        yield name, partial(_sum, M, N, Ks, config, adapters)


def _one_by_hand() -> Iterator[Case]:
    """The first of `_by_hand`'s, to be run alone before what runs such kernels side by side."""
    yield from islice(_by_hand(), 1)


def _by_hand() -> Iterator[Case]:
    """The hand-scheduled kernel in all of its forms, the newest first; over W0 in both layouts."""
    if specialized_obstacle(DEVICE, device_info(DEVICE)) is not None:
        return
    from hand_scheduled import all_tiles

    first, halves = all_tiles()[0], next(c for c in all_tiles() if c.HALVES)
    layouts = {True: "of a forward", False: "of dx"}
    for shape in ALIGNED:
        yield from _sums(shape, first)
        yield from _groups_by(("ws_split", 0.0), ("ws_split", 0.3), shape=shape)
        for form, turned in product(("dora", "second", "produced", "plain"), layouts):
            name = f"{form} {shape}, W0 {layouts[turned]}"
            yield name, partial(_form, shape, form, first, turned)
    shape = (2900, 3208, 72, 24)  # more tiles than multiprocessors, and few in the last round
    for form, turned in product(("dora", "second", "produced"), layouts):
        name = f"{form} {shape} by halves, W0 {layouts[turned]}"
        yield name, partial(_form, shape, form, halves, turned)


def _copy(t: torch.Tensor) -> None:
    copy = aligned_copy(t, HALF[0])
    assert rows_obstacle(copy) is None
    assert torch.equal(copy, t.to(HALF[0])), "not what Tensor.to makes"


def _copies() -> Iterator[Case]:
    """Adapters in fp32, as they are and as their own transpose, for the copy engine."""
    for M, N, *_ in SHAPES[2:]:
        t = _normal(torch.float32, M, N)
        yield f"a copy of {(M, N)}", partial(_copy, t)
        yield f"a copy of {(N, M)}, transposed", partial(_copy, t.t())


def _normal(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(DEVICE, dtype)


def _groups_by(*ways: tuple[Strategy, float], shape: tuple[int, int, int, int]) -> Iterator[Case]:
    """Layers on one x, whose one dx is made by one strategy and dropout after another."""
    M, N, K, r = shape
    x, *weights = (_normal(HALF[0], rows, K) for rows in (M, N, N, N))
    As, Bs = ([_normal(HALF[0], *size) for _ in weights] for size in ((r, K), (N, r)))
    leaves = [x, *As, *Bs]
    for leaf in leaves:
        leaf.requires_grad_()
    for strategy, dropout_p in ways:
        call = partial(_group, x, weights, As, Bs, strategy, dropout_p)
        name = f"M, N, K, r {shape} group, dx {strategy}, dropout {dropout_p}"
        yield name, partial(_same_on_both, call, leaves)


def _groups() -> Iterator[Case]:
    """One dx of layers on one x, by what a compiler schedules."""
    for shape in SHAPES[2:]:
        yield from _groups_by(("split", 0.3), ("library", 0.3), ("library", 0.0), shape=shape)


def _three(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """x, three layers' W0, A and B, and which of them each row goes to, -1 for none."""
    M, N, K, r = shape
    normal = partial(_normal, dtype)
    weights, As, Bs = ([normal(*side) for _ in range(3)] for side in ((N, K), (r, K), (N, r)))
    return normal(M, K), weights, As, Bs, torch.arange(M, device=DEVICE) % 4 - 1


def _others() -> Iterator[Case]:
    """The other products, forward and backward, against their own PyTorch path."""
    for dtype, (M, N, K, r) in product(HALF, SHAPES[2:]):
        normal = partial(_normal, dtype)
        x, weights, As, Bs, rows = _three(dtype, (M, N, K, r))
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


def _of_experts() -> Iterator[Case]:
    """Mixtures of experts, a projection, also over codes, and a whole one."""
    for dtype, shape in product(HALF, SHAPES[2:]):
        x, weights, As, Bs, rows = _three(dtype, shape)
        leaves = [x, *As, *Bs]
        for leaf in leaves:
            leaf.requires_grad_()
        functions: dict[str, Callable[..., torch.Tensor]] = {
            "experts": _experts,
            "experts in int8": partial(_experts, weights_of=quantize_int8),
            "a mixture of experts": _mixture,
        }
        for name, function in functions.items():
            call = partial(function, x, weights, As, Bs, torch.stack((rows, rows + 1), dim=1))
            yield f"{dtype} M, N, K, r {shape} {name}", partial(_same_on_both, call, leaves)


def _experts(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    As: list[torch.Tensor],
    Bs: list[torch.Tensor],
    index: torch.Tensor,
    *,
    weights_of: Callable[[torch.Tensor], Any] = torch.Tensor.detach,
    backend: Literal["triton", "torch"],
) -> torch.Tensor:
    """x [M, K] by two experts for each of its rows."""
    stacks = (weights_of(torch.stack(weights)), torch.stack(As), torch.stack(Bs))
    return lora_linear_experts(x, *stacks, expert_indices=index, scaling=1.0, backend=backend)


def _mixture(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    As: list[torch.Tensor],
    Bs: list[torch.Tensor],
    index: torch.Tensor,
    *,
    backend: Literal["triton", "torch"],
) -> torch.Tensor:
    """x [M, K] by experts whose projections are [N, K] and half of that the other way round."""
    half = len(weights[0]) // 2
    W, A, B = map(torch.stack, (weights, As, Bs))
    first = Projection(W[:, : 2 * half], None, A, B[:, : 2 * half])
    last = Projection(W[:, :half].mT, None, B[:, :half].mT, A.mT)
    p = torch.full(index.shape, 0.5, dtype=x.dtype, device=x.device)
    return run_projections(x, index, p, first, last, Middle("silu", None), backend)


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


# In an order in which one that hangs, which ends the program, keeps no other kernel from its turn.
PARTS: dict[str, Callable[[], Iterator[Case]]] = {
    "copies": _copies,
    "groups": _groups,
    "experts": _of_experts,
    "others": _others,
    "layers": _layers,
    "one_by_hand": _one_by_hand,
    "by_hand": _by_hand,
}


def _verdict(case: Callable[[], None]) -> str:
    try:
        case()
    except AssertionError as error:
        return f"wrong, {error}"
    except Exception as error:  # whatever it is, the others are still to be checked
        return f"failed, {type(error).__name__}: {error}"
    return "right"


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if a case is wrong or fails, else 3 if not all of them ran."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=[*PARTS], help="in this order; default: all"
    )
    parser.add_argument("--each", type=int, help="so many cases of each part; default: all")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no case after so many"
    )
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    end = time.monotonic() + args.seconds
    total = right = status = 0
    for name, case in chain.from_iterable(islice(PARTS[part](), args.each) for part in args.parts):
        if time.monotonic() > end:
            status = OUT_OF_TIME
            break
        verdict = _verdict(case)
        total += 1
        right += verdict == "right"
        print(f"{name}: {verdict}", flush=True)  # a sanitizer cut short: how far it came
    where = torch.cuda.get_device_name() if CUDA else "the CPU, in Triton's interpreter"
    print(f"{right} of {total} cases right on {where}")
    return 1 if right < total else status


if __name__ == "__main__":
    sys.exit(main())
