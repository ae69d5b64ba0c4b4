"""Rows as CSV: one for each mode of a case, with a column for each provider."""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fused_lora.tune import in_processes

from . import measure, rows

Medians = dict[str, float]  # by provider, in us or bytes


def like() -> torch.Tensor:
    """On the device that there is, in bf16, which many CPUs cannot multiply: there in fp32."""
    if torch.cuda.is_available():
        return torch.empty(0, dtype=torch.bfloat16, device="cuda")
    return torch.empty(0, dtype=torch.float32, device="cpu")


def difference(ours: Iterable[torch.Tensor], theirs: Iterable[torch.Tensor]) -> float:
    """The largest between a tensor of ours and its counterpart, over the norm of that."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


def times(
    calls: dict[str, measure.Call],
    device: torch.device,
    seconds: float,
    *,
    overhead: bool = False,
) -> Medians:
    """By provider the median in us, all of them in turns."""
    found = measure.undisturbed(calls, device, seconds, overhead=overhead)
    return {name: statistics.median(samples) for name, samples in found.items()}


def memory(calls: dict[str, measure.Call], device: torch.device) -> Medians:
    """By provider the most bytes that a call holds at once."""
    return {name: measure.peak_memory(call, device) for name, call in calls.items()}


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that these benchmarks have in common, which `main` goes by."""
    options = argparse.ArgumentParser(description=doc.split("\n")[0])
    options.add_argument("--rows", type=int, nargs="+", help="M, tokens")
    options.add_argument("--seconds-a-mode", type=float, default=0.15)
    options.add_argument("--out", type=Path, default=rows.RESULTS, help="folder for the rows")
    options.add_argument("--workers", type=int, default=0, help="processes that compile first")
    return options


def main(
    kind: str,
    args: argparse.Namespace,
    todo: list[Any],
    compiled: Callable[[Any], None],
    measured: Callable[[Any, float], Iterator[tuple[str, Medians]]],
    *,
    versus: str,
) -> int:
    """Measures all cases, into `<device>-<date>-<commit>-<kind>.csv`; 1 if one of them fails.

    The cases are NamedTuples, and ``measured(case, seconds)`` gives each mode of one with its
    medians, of which ours is the first: how many times as long ``versus`` takes is printed beside
    them. ``compiled(case)`` leaves a case's kernels in Triton's cache.
    """
    if args.workers:
        in_processes(compiled, todo, args.workers)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    environment = rows.environment(device, "CUDA events" if cuda else measure.clock().__name__, "")
    path = args.out / rows.file_name(environment).replace(".json", f"-{kind}.csv")
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{kind} on {environment['device']} -> {path}")
    failed = False
    table: csv.DictWriter[str] | None = None
    with contextlib.ExitStack() as files:
        for case in todo:
            try:
                for mode, medians in measured(case, args.seconds_a_mode):
                    row = case._asdict() | {"mode": mode} | medians | environment
                    if table is None:  # not before: what an earlier run left may be all there is
                        file = files.enter_context(path.open("w", newline=""))
                        table = csv.DictWriter(file, row)
                        table.writeheader()
                    table.writerow(row)
                    file.flush()  # a limit may end it
                    ratio = medians[versus] / next(iter(medians.values()))
                    times = "  ".join(f"{name} {value:10.1f}" for name, value in medians.items())
                    print(f"{case} {mode:16} {times}  {ratio:.3f}x", flush=True)
            except Exception as error:  # whatever it is, the others are still to be measured
                print(f"{case}: {type(error).__name__}: {error}", flush=True)
                failed = True
    return int(failed)
