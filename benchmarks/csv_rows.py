"""Rows as CSV: one for each mode of a case, with a column for each provider."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import measure, rows

Medians = dict[str, float]  # by provider, in us or bytes


def like() -> torch.Tensor:
    """On the device that there is, in bf16, which many CPUs cannot multiply: there in fp32."""
    if torch.cuda.is_available():
        return torch.empty(0, dtype=torch.bfloat16, device="cuda")
    return torch.empty(0, dtype=torch.float32, device="cpu")


def write(
    kind: str,
    todo: Iterable[Any],
    measured: Callable[[Any], Iterator[tuple[str, Medians]]],
    out: Path,
    *,
    versus: str,
) -> int:
    """Measures all cases, into `<device>-<date>-<commit>-<kind>.csv`; 1 if one of them fails.

    The cases are NamedTuples, and ``measured`` gives each mode of one with its medians, of which
    ours is the first: how many times as long ``versus`` takes is printed beside them.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    environment = rows.environment(device, "CUDA events" if cuda else measure.clock().__name__, "")
    path = out / rows.file_name(environment).replace(".json", f"-{kind}.csv")
    out.mkdir(parents=True, exist_ok=True)
    print(f"{kind} on {environment['device']} -> {path}")
    failed = False
    table: csv.DictWriter[str] | None = None
    with contextlib.ExitStack() as files:
        for case in todo:
            try:
                for mode, medians in measured(case):
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
