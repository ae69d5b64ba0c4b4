"""CPU time of a call on the kernel path, without a GPU: `python -m benchmarks.launch_overhead`.

All that Python and Triton do is done, up to the driver's launch, for which a stand-in returns at
once; kernels are compiled for sm_90 and never run. Of y, h and workspaces the allocation is a
CPU's. What a real driver adds is the same for everybody who launches a kernel.
"""

from __future__ import annotations

import os

if os.environ.pop("TRITON_INTERPRET", None):
    raise SystemExit("TRITON_INTERPRET is set: the interpreter has no launches to time")

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_lora import dispatch, lora_linear, quantize_nf4
from fused_lora.kernels.device import SHARED_MEMORY
from fused_lora.tables import Strategy

from . import measure

SIDE, RANK, ARCH = 64, 16, 90
STRATEGIES: tuple[Strategy, ...] = ("one_pass", "split", "skinny", "in_loop", "one_launch")

Launch = tuple[str, tuple[Any, ...], tuple[Any, ...]]  # kernel, grid, arguments
launches: list[Launch] | None = None  # the stand-in puts them here, where there is a list


class _Launcher:
    """What Triton calls with grid, stream, function, metadata (2), hooks (2) and arguments."""

    def __init__(self, source: Any, _: object) -> None:
        self.name = source.fn.__name__

    def __call__(self, *given: Any) -> None:
        metadata, enter, leave = given[6:9]
        for hook in (enter, leave):
            if hook is not None:
                hook(metadata)
        if launches is not None:
            launches.append((self.name, given[:3], given[9:]))


class _Utils:
    def load_binary(self, name: str, *_: object) -> tuple[object, ...]:
        return object(), name, 1, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[ARCH]}


class StandIn:
    """A Triton driver of one GPU that is not there."""

    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)


def kernel_path(
    strategy: Strategy, dropout_p: float = 0.0
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer of SIDE x SIDE in bf16 that takes the kernels, and one strategy, on CPU tensors.

    For "in_loop" its weight is in nf4.
    """
    driver.set_active(StandIn())
    decided = {
        "kernel_obstacle": lambda call: None,
        "_auto_avoids_kernels": lambda call: None,
        "_choose": lambda call, form: (strategy, None),
    }
    vars(dispatch).update(decided)
    dispatch.forget_plans()
    plain = torch.randn(SIDE, SIDE, dtype=torch.bfloat16)
    weight = quantize_nf4(plain) if strategy == "in_loop" else plain
    A = torch.randn(RANK, SIDE, dtype=torch.bfloat16, requires_grad=True)
    B = torch.randn(SIDE, RANK, dtype=torch.bfloat16, requires_grad=True)
    return lambda x: lora_linear(x, weight, A, B, scaling=2.0, dropout_p=dropout_p)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, gradient = torch.randn(2, 1, SIDE, dtype=torch.bfloat16)
    trained = x.clone().requires_grad_()
    found = {}

    def both(layer: Callable[[torch.Tensor], torch.Tensor]) -> None:
        layer(trained).backward(gradient)

    for strategy in STRATEGIES:
        layer = kernel_path(strategy)
        call = partial(layer, x)
        calls: dict[str, measure.Call] = {
            "no_grad": torch.no_grad()(call),
            "grad": call,
            "both": partial(both, layer),
        }
        samples = measure.side_by_side(calls, x.device, seconds=1.0, overhead=True)
        found[strategy] = {mode: statistics.median(times) for mode, times in samples.items()}
    if args.json:
        print(json.dumps({"triton": triton.__version__, "torch": torch.__version__, **found}))
        return
    print(f"M 1, {SIDE} x {SIDE}, r {RANK}, bf16, Triton {triton.__version__}: us a call")
    for strategy, times in found.items():
        print(f"{strategy:10s}", *(f"{mode} {time:6.1f}  " for mode, time in times.items()))


if __name__ == "__main__":
    main()
