"""Rows on disk: one JSON file a run, `<device>-<date>-<commit>.json`.

    {"environment": {"device": ..., "commit": ...}, "rows": [{"provider": ...}, ...],
     "not_measured": [{"provider": ..., "why": ...}, ...]}

`load` gives every row its run's environment, so that a row says by itself where it comes from.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]

# What every row has, once loaded.
ENVIRONMENT = (
    "device",
    "driver",
    "threads",
    "clock",
    "python",
    "torch",
    "triton",
    "peft",
    "bitsandbytes",
    "commit",
    "dirty",
    "date",
    "note",
)
MEASURED = (
    "provider",
    "layer",
    "M",
    "N",
    "K",
    "r",
    "dropout",
    "dtype",
    "adapter_dtype",
    "format",
    "adapters",
    "ragged",
    "mode",
    "unit",
    "median",
    "q20",
    "q80",
    "samples",
    "choice",
)

# What older files do not say, because there was nothing else.
_IMPLIED = {"bitsandbytes": None, "format": "none", "adapters": 1, "ragged": False}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    """With what it multiplies by: machines of one name differ in that, and in bf16 by 50 times."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(device: torch.device, clock: str, note: str = "") -> Row:
    """The machine, the versions and the commit, as every row of a run has them.

    The commit is that of the checkout; or $COMMIT, for a copy of one that came with no history, or
    an older one. Dirty is whether the library differs from it, None where that cannot be known.
    """
    cuda = device.type == "cuda"
    given = os.environ.get("COMMIT")
    changed = (
        None if given else _output("git", "status", "--porcelain", "--", "fused_lora", "kernels")
    )
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "driver": (_output(*query) or "unknown").split("\n")[0] if cuda else None,
        "threads": None if cuda else torch.get_num_threads(),
        "clock": clock,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
        "bitsandbytes": _version("bitsandbytes"),
        "commit": given or _output("git", "rev-parse", "--short=8", "HEAD") or "unknown",
        "dirty": None if changed is None else bool(changed),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "note": note,
    }


def file_name(environment: Row) -> str:
    """`nvidia-h100-80gb-hbm3-2026-11-24-1a2b3c4d.json`."""
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return f"{device}-{environment['date'][:10]}-{environment['commit']}.json"


def save(path: Path, environment: Row, rows: Iterable[Row], not_measured: Iterable[Row]) -> None:
    """Writes a run, a row a line; whole or not at all."""

    def lines(items: Iterable[Row]) -> str:
        return "[\n" + ",\n".join(json.dumps(item) for item in items) + "\n]"

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        f'{{"environment": {json.dumps(environment, indent=1)},\n"rows": {lines(rows)},\n'
        f'"not_measured": {lines(not_measured)}}}\n'
    )
    temporary.replace(path)


def resumed(path: Path, environment: Row) -> list[Row]:
    """The rows of a run that one with this environment may go on with, as if they were its own.

    Raises ValueError if what a time depends on was another then.
    """
    rows = load(path)
    then = rows[0] if rows else environment
    differ = [
        f"{name} {then[name]}, not {environment[name]}"
        for name in ("device", "driver", "torch", "triton", "commit")
        if then[name] != environment[name]
    ]
    if differ:
        raise ValueError(f"{path}: its rows are of another run than this: {'; '.join(differ)}")
    return rows


def load(path: Path) -> list[Row]:
    """The rows of a run, each with its environment. Raises ValueError if the file is no run's."""
    try:
        run = json.loads(path.read_text())
        rows = [{**_IMPLIED, **run["environment"], **row} for row in run["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of benchmark rows ({error!r})") from error
    for row in rows:
        missing = [key for key in (*ENVIRONMENT, *MEASURED) if key not in row]
        if missing:
            raise ValueError(f"{path}: a row lacks {', '.join(missing)}")
    return rows
