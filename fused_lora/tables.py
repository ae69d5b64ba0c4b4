"""Tuned tables: which strategy and tile measured best, by GPU and problem.

A table is a JSON file named after its GPU. `fused_lora/tables/` holds those that ship; the user's
own, in the user's cache folder, go before them. A user's table counts only for the GPU, the Triton
version and the kernel sources that it was measured with; one that is stale or cannot be read is
ignored, with one warning. What ships belongs to the release, whose tests look at it, and counts
with any Triton.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

from .files import write_atomically
from .kernels.tile_config import TileConfig

# "in_loop" is for a quantised W0, whose tiles it makes values as it reads them, and otherwise as
# "split". With any other strategy the whole of a quantised W0 goes to a scratch tensor first.
Strategy = Literal[
    "one_pass",
    "split",
    "library",
    "tma_one_pass",
    "tma_split",
    "one_launch",
    "ws_split",
    "ws_one_launch",
    "skinny",
    "in_loop",
]
Direction = Literal["forward", "dx"]
# What is tuned: y, dx, h where it is made by a launch of its own (dh as well), dA and dB together.
Product = Literal["forward", "dx", "h", "grads"]

SHIPPED = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Choice:
    """What measured best for one problem."""

    strategy: Strategy | None  # None for "h" and "grads", which are made in one way
    config: TileConfig | None  # of the main product; None where a library has it
    seconds: float


def bucket(M: int) -> int:
    """The power of two that stands for M rows: a new sequence length is no new problem."""
    return 1 << max(M - 1, 0).bit_length()


def key(product: Product, M: int, N: int, K: int, r: int, dtype: str, dropout: bool) -> str:
    """The name of a problem in a table; N and K are the product's own: dx has them swapped, and of
    h [M, r] N is r.
    """
    return f"{product} M{bucket(M)} N{N} K{K} r{r} {dtype}{' dropout' * dropout}"


@functools.cache
def _stamp() -> dict[str, str]:
    """What a table must agree with to count."""
    import triton

    source = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        source.update(path.read_bytes())
    return {
        "triton": triton.__version__,
        "kernels": source.hexdigest()[:16],
    }


def _slug(gpu: str) -> str:
    return re.sub(r"\W+", "_", gpu).strip("_")


def user_path(gpu: str) -> Path:
    """The user's own table for a GPU."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fused_lora" / "tables" / f"{_slug(gpu)}.json"


def _choice(entry: Mapping[str, Any]) -> Choice:
    config, strategy = entry["config"], entry["strategy"]
    return Choice(
        None if strategy is None else cast(Strategy, str(strategy)),
        None if config is None else TileConfig(**config),
        float(entry["seconds"]),
    )


def _read(path: Path, gpu: str, *, ships: bool = False) -> dict[str, Choice]:
    """The table's entries; none, and a warning, if it does not count."""
    try:
        table = json.loads(path.read_text())
        stamp = {"gpu": gpu} if ships else {"gpu": gpu, **_stamp()}
        found = {name: table.get(name) for name in stamp}
        entries = {name: _choice(entry) for name, entry in table["entries"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"cannot be read ({type(error).__name__}: {error})"
    else:
        if found == stamp:
            return entries
        why = f"was measured with {found}, and this is {stamp}"
    warnings.warn(f"tuned table {path} is ignored: it {why}", RuntimeWarning, stacklevel=2)
    return {}


@functools.cache
def table(gpu: str) -> dict[str, Choice]:
    """All entries for a GPU, the user's own before the shipped; read once a process."""
    shipped = _read(SHIPPED / f"{_slug(gpu)}.json", gpu, ships=True)
    return {**shipped, **_read(user_path(gpu), gpu)}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # not on Windows, where there is no triton either

    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write(path: Path, gpu: str, entries: Mapping[str, Choice]) -> None:
    """A table file of these entries; readers see all of it or what was there."""
    content = {
        "gpu": gpu,
        **_stamp(),
        "entries": {name: asdict(choice) for name, choice in sorted(entries.items())},
    }
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda to: Path(to).write_text(text))


def save(gpu: str, entries: Mapping[str, Choice]) -> Path:
    """Adds entries to the user's table. Readers and other writers see all of it or nothing."""
    path = user_path(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        write(path, gpu, {**_read(path, gpu), **entries})
    table.cache_clear()
    return path
