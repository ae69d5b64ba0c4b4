"""A table for LoRAFusion's grid and Llama-3.1-8B: `python -m benchmarks.tune [--seconds 490]`.

What `fused-lora tune` does, but for all lists of problems in one program, which needs no more than
torch and triton. The table, tuned_GPU.json, is written after each problem, so that whatever ends
the program loses nothing; it ships from fused_lora/tables/GPU.json. What is most used comes first.
At the limit a problem that still has candidates is taken out of the table: the cost model may know
better than the best of the others.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fused_lora import tables
from fused_lora.device_time import median_seconds
from fused_lora.kernels.device import device_info
from fused_lora.tables import Choice
from fused_lora.tune import Measurement, Timer, measured, problems_of, processes

from . import OUT_OF_TIME, rows

LAYERS = ((4096, 4096), (5120, 5120), (8192, 8192), (1024, 4096), (14336, 4096), (4096, 14336))


class Batch(NamedTuple):
    """Layers [N, K] of one rank, with so many rows of x."""

    M: int
    r: int
    dropouts: tuple[bool, ...] = (False,)
    layers: tuple[tuple[int, int], ...] = LAYERS


BATCHES = (
    Batch(8192, 16, (False, True)),
    Batch(2048, 16, (False, True)),
    Batch(512, 16),
    Batch(8192, 64),
    Batch(2048, 64),
)


def _say_problem(done: int, total: int, m: Measurement) -> None:
    if m.problem:
        print(f"{m.key} {m.strategy or ''} {m.config}: left out: {m.problem}", flush=True)


def _say_choices(new: Mapping[str, Choice], old: Mapping[str, Choice]) -> None:
    for key, choice in new.items():
        if choice != old.get(key):
            us = choice.seconds * 1e6
            print(f"{key:56} {choice.strategy or 'tile':13} {us:9.1f} us", flush=True)


def tune_all(
    batches: Sequence[Batch],
    path: Path,
    device: torch.device,
    *,
    deadline: float,
    workers: int,
    dtype: torch.dtype = torch.bfloat16,
    timer: Timer = median_seconds,
) -> bool:
    """Writes the table of what can be measured until the deadline; True if that is all."""
    gpu = device_info(device).name
    todo = [
        problems_of(
            [(batch.M, N, K) for N, K in batch.layers],
            ranks=[batch.r],
            dtypes=[dtype],
            dropouts=batch.dropouts,
            device=device,
        )
        for batch in batches
    ]
    table: dict[str, Choice] = {}
    later = {key for problems in todo for key in problems}
    with processes(workers) if workers else contextlib.nullcontext() as pool:
        for problems in todo:
            later -= problems.keys()
            for best, left in measured(problems, timer=timer, progress=_say_problem, pool=pool):
                _say_choices(best, table)
                table |= best
                tables.write(path, gpu, table)
                if (left or later) and time.monotonic() > deadline:
                    whole = {key: choice for key, choice in table.items() if key not in left}
                    tables.write(path, gpu, whole)
                    print(f"out of time: {len(left | later)} problems left", flush=True)
                    return False
    return True


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 if all was measured, OUT_OF_TIME if the limit came first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=rows.RESULTS, help="folder for the table")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--workers", type=int, default=0, help="processes that compile first")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a GPU: on a CPU the kernels run in an interpreter")
    deadline = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", torch.cuda.current_device())
    # What makes y and dx is measured with the tiles that were found for h, which it finds in the
    # user's table: one of this run's own.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        path = args.out / f"tuned_{tables.user_path(device_info(device).name).name}"
        print(f"-> {path}", flush=True)
        if tune_all(BATCHES, path, device, deadline=deadline, workers=args.workers):
            return 0
        return OUT_OF_TIME


if __name__ == "__main__":
    sys.exit(main())
