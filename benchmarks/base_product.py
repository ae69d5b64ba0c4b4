"""The base product alone against cuBLAS: `python -m benchmarks.base_product [--shapes M,N,K ...]`.

What a LoRA layer can cost at best: every tile of each kernel's plain form, y = x W0^T without an
adapter, as TFLOP/s and as cuBLAS's time over its own. Each result is compared with cuBLAS's before
it is timed. A kernel's tiles are measured one after another, then the fastest and cuBLAS again in
turns, which decides: a GPU that has become warm is slower. The kernels that a compiler schedules
come first, those in Gluon last: one that hangs ends the program.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from fused_lora.device_time import median_seconds
from fused_lora.kernels import gemm, persistent
from fused_lora.kernels.configs import tunable
from fused_lora.kernels.device import device_info
from fused_lora.kernels.tile_config import Kind, TileConfig
from fused_lora.strategies import specialized_obstacle
from fused_lora.tune import Timer, checked_seconds, fastest, in_processes, shape

from . import rows

SHAPES = ((8192, 4096, 4096), (2048, 4096, 4096), (8192, 8192, 8192), (4096, 5120, 5120))
RANK = 16  # the tiles are those of a layer of this rank

Product = Callable[[TileConfig, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """A tile's time for y [M, N] = x [M, K] W0^T."""

    M: int
    N: int
    K: int
    kernel: str
    tile: str
    seconds: float | None  # None where ``problem`` says why
    of_cublas: float | None  # its speed over cuBLAS's
    problem: str = ""
    in_turns: bool = False  # once more, with cuBLAS and the other tiles that were fastest


def products(device: torch.device) -> dict[str, tuple[Kind, Product]]:
    """The plain form of each kernel that can run on the device, and whose tiles it has."""

    def blocks(config: TileConfig, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return gemm.gemm_scaled(config, x, w, scale=1.0)

    found: dict[str, tuple[Kind, Product]] = {
        "gemm": ("second", blocks),
        "persistent": ("tma_second", persistent.persistent_plain),
    }
    if specialized_obstacle(device, device_info(device)) is None:
        from fused_lora.kernels.specialized import specialized_plain

        found["specialized"] = ("ws_second", specialized_plain)
    return found


def _tiles(kind: Kind, dtype: torch.dtype, device: torch.device) -> tuple[TileConfig, ...]:
    return tunable(kind, RANK, dtype.itemsize, False, device_info(device))


def _compile(job: tuple[str, TileConfig, torch.dtype, torch.device]) -> None:
    name, config, dtype, device = job
    x, W = (torch.zeros(512, 512, dtype=dtype, device=device) for _ in range(2))
    with contextlib.suppress(Exception):  # the measurement will meet it again and report it
        products(device)[name][1](config, x, W.t())


def compile_all(dtype: torch.dtype, device: torch.device, workers: int) -> None:
    """Fills Triton's cache on disk by several processes; but with no kernel that might hang."""
    jobs = [
        (name, config, dtype, device)
        for name, (kind, _) in products(device).items()
        if name != "specialized"
        for config in _tiles(kind, dtype, device)
    ]
    in_processes(_compile, jobs, workers)


def measure(
    shapes: list[tuple[int, int, int]],
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer = median_seconds,
) -> Iterator[Measured]:
    """Every tile of every kernel for each shape; of a kernel all shapes before the next kernel."""
    operands = {}
    for M, N, K in shapes:
        x, W = (torch.randn(rows, K, dtype=dtype, device=device) for rows in (M, N))
        operands[M, N, K] = x, W * K**-0.5
    for name, (kind, product) in products(device).items():
        for sizes, (x, W) in operands.items():
            expected = F.linear(x, W).float()
            (cublas,) = timer([partial(F.linear, x, W)])
            found: dict[Measured, TileConfig] = {}
            for config in _tiles(kind, dtype, device):
                run = partial(product, config, x, W.t())
                wrong = "is wrong by {:.1e} of the norm"
                seconds, problem = checked_seconds(run, expected, timer, wrong)
                speed = None if seconds is None else cublas / seconds
                m = Measured(*sizes, name, str(config), seconds, speed, problem)
                found[m] = config
                yield m  # at once, so that what hangs loses nothing
            last = fastest(found)
            runs = [partial(product, found[m], x, W.t()) for m in last]
            cublas, *times = timer([partial(F.linear, x, W), *runs])
            for m, seconds in zip(last, times, strict=True):
                yield replace(m, seconds=seconds, of_cublas=cublas / seconds, in_turns=True)


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if a tile is wrong or fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", action="append", metavar="M,N,K", type=shape)
    parser.add_argument("--out", type=Path, default=rows.RESULTS, help="folder for the rows")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile first")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a GPU: on a CPU the kernels run in an interpreter")
    shapes = args.shapes or list(SHAPES)
    device = torch.device("cuda", torch.cuda.current_device())
    environment = rows.environment(device, "CUDA events", "")
    path = args.out / rows.file_name(environment).replace(".json", "-base.csv")
    print(f"of cuBLAS's speed, bf16, on {device_info(device).name} -> {path}")
    if args.workers:
        compile_all(torch.bfloat16, device, args.workers)
    failed = False
    with path.open("w", newline="") as file:
        table: csv.DictWriter[str] | None = None
        for m in measure(shapes, torch.bfloat16, device):
            row = asdict(m) | environment
            if table is None:
                table = csv.DictWriter(file, row)
                table.writeheader()
            table.writerow(row)
            file.flush()  # so that what hangs loses nothing
            failed |= bool(m.problem)
            reached = m.problem
            if m.seconds and m.of_cublas:
                speed = 2 * m.M * m.N * m.K / m.seconds / 1e12
                reached = f"{m.of_cublas:.3f}x {speed:6.1f} TFLOP/s{' in turns' * m.in_turns}"
            print(f"{m.M},{m.N},{m.K} {m.kernel:11} {reached}  {m.tile}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
