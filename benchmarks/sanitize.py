"""Every kernel on small, odd-shaped calls, forward and backward: a program for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.sanitize

Without PyTorch's caching allocator every tensor is an allocation of its own, beyond whose end
nothing is. Results are checked too; without a GPU the kernels run in Triton's interpreter.
"""

from __future__ import annotations

import os
import sys

import torch

if not torch.cuda.is_available():  # read by Triton when a kernel is defined
    os.environ["TRITON_INTERPRET"] = "1"

from oracle import check, fused, problem, run

from fused_lora.dispatch import Plan, Strategy

CUDA = torch.cuda.is_available()
# M, N, K, r: nothing divides a tile, some fall short of one, some need several. (Not M = r = 1: the
# one rounding of the one element of dh would be compared with PyTorch's, which is luck.)
SHAPES = [(1, 61, 17, 9), (23, 7, 3, 1), (17, 33, 65, 16), (70, 129, 63, 5), (131, 65, 190, 33)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32) if CUDA else (torch.float32, torch.float16)


def _cases() -> list[tuple[Strategy, float]]:
    return [("one_pass", 0.0), ("split", 0.0), ("split", 0.3)]


def main() -> int:
    """Runs all cases; returns 1 if a result is wrong."""
    device = torch.device("cuda" if CUDA else "cpu")
    wrong = 0
    for dtype in DTYPES:
        for M, N, K, r in SHAPES:
            for strategy, dropout_p in _cases():
                p = problem(
                    M,
                    N,
                    K,
                    r,
                    dtype=dtype,
                    adapter_dtype=torch.float32,
                    device=device,
                    dropout_p=dropout_p,
                )
                name = f"{dtype} M {M} N {N} K {K} r {r} {strategy} dropout {dropout_p}"
                try:
                    check(run(fused(Plan("triton", strategy, strategy)), p), p)
                except AssertionError as error:
                    wrong += 1
                    print(f"wrong: {name}: {error}")
    total = len(DTYPES) * len(SHAPES) * len(_cases())
    where = torch.cuda.get_device_name() if CUDA else "the CPU, in Triton's interpreter"
    print(f"{total - wrong} of {total} cases right on {where}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
