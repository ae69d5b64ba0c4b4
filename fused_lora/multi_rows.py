"""From what a caller says about the rows of a batch, checked, to `RowGroups`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .kernels.rows import KEPT, RowGroups, Run, groups_of_indices, groups_of_runs, stream_of

Segments = Sequence[tuple[int, int]]

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Of a tensor of indices on a GPU, for its version and number of adapters: every layer of a model
# asks. One on the CPU may share its memory with NumPy, whose writes no version counts.
_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_one(adapter_indices: object, segments: object) -> None:
    """Raises ValueError unless one of the two is given."""
    if (adapter_indices is None) == (segments is None):
        both = "neither" if segments is None else "both"
        raise ValueError(f"adapter_indices, segments: got {both}, wanted one of the two")


def row_groups(
    lead: torch.Size,
    device: torch.device,
    num_adapters: int,
    adapter_indices: Tensor | Sequence[int] | None,
    segments: Segments | None,
) -> RowGroups:
    """The groups of the rows of x [*lead, K] on ``device``; TypeError or ValueError if invalid."""
    check_one(adapter_indices, segments)
    M = lead.numel()
    if segments is not None:
        return groups_of_runs(_as_runs(segments, M, num_adapters), device)
    if not isinstance(adapter_indices, Tensor):
        adapter_indices = _as_tensor(adapter_indices)
    if adapter_indices.dtype not in INTEGERS:
        raise TypeError(f"adapter_indices: got dtype {adapter_indices.dtype}, wanted integers")
    if adapter_indices.layout != torch.strided:
        layout = adapter_indices.layout
        raise TypeError(f"adapter_indices: got layout {layout}, wanted a dense tensor")
    if adapter_indices.shape not in (lead, (M,)):
        wanted = f"[{M}]" if len(lead) == 1 else f"[{M}] or {list(lead)}"
        raise ValueError(
            f"adapter_indices: got shape {list(adapter_indices.shape)}, wanted {wanted}, one for "
            "each row of x"
        )
    if adapter_indices.device.type != "cpu" and adapter_indices.device != device:
        raise ValueError(
            f"adapter_indices: is on {adapter_indices.device}, wanted the CPU or {device}"
        )
    if adapter_indices.is_cuda and torch.cuda.is_current_stream_capturing():
        # The graph has to group what the indices will be: nothing from before, and no wait.
        return groups_of_indices(adapter_indices.flatten(), num_adapters)
    if adapter_indices.device.type == "cpu":
        return groups_of_runs(_runs_of(adapter_indices.flatten(), num_adapters), device)
    return _of_tensor(adapter_indices, device, num_adapters)


def _of_tensor(indices: Tensor, device: torch.device, num_adapters: int) -> RowGroups:
    """Of indices on a GPU."""
    version = None if indices.is_inference() else indices._version
    at = (indices.data_ptr(), indices.shape, indices.stride())  # .data = ... changes no version
    key = (version, at, device, stream_of(device), num_adapters)
    if version is not None and indices in _seen and _seen[indices][0] == key:
        found: RowGroups = _seen[indices][1]
        return found
    flat = indices.flatten()
    if flat.numel():
        low, high = torch.stack(flat.aminmax()).tolist()
        for index in (low, high):
            _check_index("adapter_indices", index, num_adapters)
    groups = groups_of_indices(flat, num_adapters)
    if version is not None:
        _seen[indices] = (key, groups)
    return groups


def _as_tensor(indices: object) -> Tensor:
    wanted = "wanted a tensor or a list of integers"
    if not isinstance(indices, (list, tuple)):
        raise TypeError(f"adapter_indices: got {type(indices).__name__}, {wanted}")
    for i, index in enumerate(indices):
        if type(index) is not int:
            raise TypeError(f"adapter_indices[{i}]: got {index!r}, {wanted}")
    return torch.tensor(indices, dtype=torch.int64, device="cpu")


def _check_index(name: str, index: int, num_adapters: int) -> None:
    if not -1 <= index < num_adapters:
        raise ValueError(
            f"{name}: got index {index}, wanted 0 to {num_adapters - 1}, or -1 for no adapter"
        )


def _runs_of(indices: Tensor, num_adapters: int) -> tuple[Run, ...]:
    """The runs of indices [M] on the CPU."""
    values, rows = torch.unique_consecutive(indices, return_counts=True)
    runs = tuple(zip(values.tolist(), rows.tolist(), strict=True))
    _check_runs("adapter_indices", runs, num_adapters)
    return runs


@functools.lru_cache(maxsize=KEPT)
def _check_runs(name: str, runs: tuple[Run, ...], num_adapters: int) -> None:
    for index, _ in runs:
        _check_index(name, index, num_adapters)


def _as_runs(segments: Segments, M: int, num_adapters: int) -> tuple[Run, ...]:
    if not isinstance(segments, (list, tuple)):
        raise TypeError(f"segments: got {type(segments).__name__}, wanted a list of pairs")
    try:  # what was checked before; 1.0 and True are equal to 1
        runs = tuple(segments)
        if {*map(type, chain.from_iterable(runs))} <= {int}:
            return _known_segments(runs, M, num_adapters)
    except TypeError:  # no pairs, or pairs that are lists
        pass
    return _checked_segments(segments, M, num_adapters)


def _checked_segments(segments: Segments, M: int, num_adapters: int) -> tuple[Run, ...]:
    runs = []
    for i, segment in enumerate(segments):
        if (
            not isinstance(segment, (list, tuple))
            or len(segment) != 2
            or not all(type(part) is int for part in segment)
        ):
            raise TypeError(f"segments[{i}]: got {segment!r}, wanted (adapter's index, rows)")
        index, rows = segment
        _check_index(f"segments[{i}]", index, num_adapters)
        if rows < 1:
            raise ValueError(f"segments[{i}]: got {rows} rows, wanted at least 1")
        runs.append((index, rows))
    total = sum(rows for _, rows in runs)
    if total != M:
        raise ValueError(f"segments: have {total} rows in all, wanted x's {M}")
    return tuple(runs)


_known_segments = functools.lru_cache(maxsize=KEPT)(_checked_segments)
