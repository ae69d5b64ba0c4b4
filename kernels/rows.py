"""Rows that take different adapters: which tile has which of them, and where each adapter lies.

Rows are visited in an order in which those of one adapter are together; a row's place in it is its
position. A piece is a range of at most BLOCK positions of one adapter: no row is padded or copied.
There are at most cdiv(M, BLOCK) + groups pieces, so that their table has a size the host knows even
where the indices are on the GPU, and nothing waits for them. Pieces begin at each adapter's first
position; or, for a product with one W0 for all, at each tile's too, and a tile that straddles
adapters has several.

Adapters are read where they lie, through a table of their addresses: stacking them would read and
write all of them in each call, of which a decoding step is little more than reading those that its
rows have. The table depends on addresses, ranks and scalings alone and is kept between calls.
Those of a model's experts are a stack from the start, and need no table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import torch

# Batches that are remembered, since every layer of a model asks for the same one. Each can be a
# pair of numbers a row, half a MB for 8192 rows, and training has a new one in every step.
KEPT = 32

Run = tuple[int, int]  # an adapter's index, -1 for none, and how many rows in a row take it
T = TypeVar("T")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(table: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that the host does not wait for."""
    if _capturing(device):  # a replay would copy again, from memory that is another's by then
        raise RuntimeError(
            "lora_linear_multi: under CUDA graph capture with segments and adapters that it has no "
            "tables of; make the same calls once before, on any stream"
        )
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


class Pieces(NamedTuple):
    """Pieces of up to as many positions, and whose they are."""

    table: torch.Tensor  # int32 [P, 3]: adapter (-1: none), first position, last position + 1
    first: torch.Tensor  # int32 [groups or tiles + 1]: group g has pieces first[g] up to the next


@dataclass(frozen=True, eq=False)
class RowGroups:
    """The rows of each adapter. All tensors are int32 and on x's device."""

    M: int
    order: torch.Tensor | None  # [M]: the row at each position; None: its own
    adapters: torch.Tensor  # [groups]: an adapter's index or -1, each once
    offsets: torch.Tensor  # [groups + 1]: the first position of each group, and M
    on_host: tuple[torch.Tensor, torch.Tensor] | None  # both on the CPU, where they are known
    _pieces: dict[tuple[int, bool], Pieces] = field(default_factory=dict)

    @property
    def num_groups(self) -> int:
        """How many adapters there are at most, "none" being one."""
        return len(self.adapters)

    @functools.cached_property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """(adapter, first position, last + 1) of every adapter with rows; waits for the GPU."""
        adapters, offsets = self.on_host or (self.adapters.cpu(), self.offsets.cpu())
        ends = offsets.tolist()
        spans = zip(adapters.tolist(), ends[:-1], ends[1:], strict=True)
        return tuple(span for span in spans if span[0] >= 0 and span[1] < span[2])

    def rows(self, first: int, last: int) -> slice | torch.Tensor:
        """The rows at a range of positions, as an index."""
        return slice(first, last) if self.order is None else self.order[first:last]

    @functools.cached_property
    def sorted(self) -> RowGroups:
        """The same of rows that are in the order already."""
        return replace(self, order=None)  # with the same pieces

    def pieces(self, block: int, *, in_tiles: bool = False) -> Pieces:
        """Pieces of up to ``block`` positions of each group; or ``in_tiles`` of as many. Made once.

        On a GPU whose indices the host has not seen some are empty, and some of no adapter.
        """
        key = (block, in_tiles)
        if key not in self._pieces:
            self._pieces[key] = self._cut(block, in_tiles)
        return self._pieces[key]

    def _cut(self, block: int, in_tiles: bool) -> Pieces:
        if self.on_host is None:
            if in_tiles:
                return _cut_tiles(self.M, block, self.adapters, self.offsets)
            from .cut import cut

            return Pieces(*cut(self.M, block, self.adapters, self.offsets))
        if in_tiles:
            made = _without_empty(_cut_tiles(self.M, block, *self.on_host))
        else:
            made = _cut_groups(block, *self.on_host)
        return Pieces(*(_upload(t, self.offsets.device) for t in made))


def _cut_groups(block: int, adapters: torch.Tensor, offsets: torch.Tensor) -> Pieces:
    """On the host."""
    table: list[tuple[int, int, int]] = []
    first = [0]
    ends = offsets.tolist()
    for adapter, start, end in zip(adapters.tolist(), ends[:-1], ends[1:], strict=True):
        if adapter >= 0:
            table += [(adapter, at, min(at + block, end)) for at in range(start, end, block)]
        first.append(len(table))
    made = torch.tensor(table, dtype=torch.int32, device="cpu").view(len(table), 3)
    return Pieces(made, torch.tensor(first, dtype=torch.int32, device="cpu"))


def _cut_tiles(M: int, block: int, adapters: torch.Tensor, offsets: torch.Tensor) -> Pieces:
    tiles = torch.arange(0, M, block, dtype=torch.int32, device=offsets.device)
    end = torch.full((1,), M, dtype=torch.int32, device=offsets.device)
    starts = torch.cat((tiles, offsets[:-1])).sort().values
    stops = torch.cat((starts, end))[1:]
    groups = torch.searchsorted(offsets, starts, right=True) - 1
    table = torch.stack((adapters[groups.clamp_(max=len(adapters) - 1)], starts, stops), dim=1)
    return Pieces(table, torch.searchsorted(starts, torch.cat((tiles, end)), out_int32=True))


def _without_empty(pieces: Pieces) -> Pieces:
    table, first = pieces
    kept = (table[:, 0] >= 0) & (table[:, 1] < table[:, 2])
    before = torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), kept.cumsum(0)))
    return Pieces(table[kept], before[first].to(torch.int32))


def stream_of(device: torch.device) -> int:
    """The current stream's handle: a table is kept for the stream that its copy is in order on."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


_captured: list[object] = []  # tables that graphs have the addresses of: never freed


def _kept(by_stream: dict[int, T], device: torch.device, make: Callable[[], T]) -> T:
    """The current stream's table, made if there is none.

    A capture is on a stream of its own and takes any: what it follows has been waited for.
    """
    stream = stream_of(device)
    if _capturing(device) and by_stream:
        table = by_stream.get(stream) or next(iter(by_stream.values()))
        _captured.append(table)
        return table
    if stream not in by_stream:
        by_stream[stream] = make()
    return by_stream[stream]


def groups_of_runs(runs: tuple[Run, ...], device: torch.device) -> RowGroups:
    """The groups of rows that the host knows; kept, since every layer of a model asks for them."""
    return _kept(_of_runs(runs, device), device, lambda: _groups_of_runs(runs, device))


@functools.lru_cache(maxsize=KEPT)
def _of_runs(runs: tuple[Run, ...], device: torch.device) -> dict[int, RowGroups]:
    return {}


def _groups_of_runs(runs: tuple[Run, ...], device: torch.device) -> RowGroups:
    totals: dict[int, int] = {}  # in order of appearance, so that sorting moves as little as it can
    for adapter, rows in runs:
        totals[adapter] = totals.get(adapter, 0) + rows
    rank = {adapter: i for i, adapter in enumerate(totals)}
    keys = [rank[adapter] for adapter, _ in runs]
    order = None
    if keys != sorted(keys):
        lengths = torch.tensor([rows for _, rows in runs], device="cpu")
        of_rows = torch.tensor(keys, device="cpu").repeat_interleave(lengths)
        order = _upload(of_rows.argsort(stable=True).int(), device)
    adapters = torch.tensor(list(totals), dtype=torch.int32, device="cpu")
    ends = torch.tensor([0, *totals.values()], dtype=torch.int32, device="cpu")
    offsets = ends.cumsum(0, dtype=torch.int32)
    return RowGroups(
        M=int(offsets[-1]),
        order=order,
        adapters=_upload(adapters, device),
        offsets=_upload(offsets, device),
        on_host=(adapters, offsets),
    )


def groups_of_indices(indices: torch.Tensor, num_adapters: int) -> RowGroups:
    """The groups of rows by an integer tensor [M], -1 for none; waits for no GPU."""
    ordered, order = indices.to(torch.int32).sort(stable=True)
    adapters = torch.arange(-1, num_adapters, dtype=torch.int32, device=indices.device)
    M = indices.shape[0]  # and not len(), which would be a constant of a graph
    end = torch.full((1,), M, dtype=torch.int32, device=indices.device)
    offsets = torch.cat((torch.searchsorted(ordered, adapters, out_int32=True), end))
    return RowGroups(M, order.int(), adapters, offsets, on_host=None)


@dataclass(frozen=True, eq=False)
class AdapterLayout:
    """Where contiguous adapters A_i [r_i, K] and B_i [N, r_i] lie, without the tensors."""

    addresses: tuple[int, ...]  # of every A, then of every B
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    device: torch.device
    _tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @functools.cached_property
    def max_rank(self) -> int:
        """The rank that h is made for."""
        return max(self.ranks)

    @functools.cached_property
    def total_rank(self) -> int:
        """Of all adapters side by side."""
        return sum(self.ranks)

    @functools.cached_property
    def specialisation(self) -> dict[str, int | bool]:
        """What `load_adapter` may know of every address and every rank."""
        aligned = all(address % 16 == 0 for address in self.addresses)
        return {"ALIGNED": aligned, "RANK_DIVISOR": math.gcd(16, *self.ranks)}

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`AdapterTable`'s entries and scalings, made once for each stream."""
        return _kept(self._tables, self.device, self._make)

    def _make(self) -> tuple[torch.Tensor, torch.Tensor]:
        rank = torch.tensor(self.ranks, device="cpu")
        pointers = torch.tensor(self.addresses, device="cpu").view(2, len(rank))
        entries = torch.stack((pointers[0], pointers[1], rank, rank.cumsum(0) - rank), dim=1)
        scalings = torch.tensor(self.scalings, dtype=torch.float32, device="cpu")
        return _upload(entries, self.device), _upload(scalings, self.device)


class AdapterTable(NamedTuple):
    """Adapters A_i [r_i, K] and B_i [N, r_i], contiguous, for kernels that look them up."""

    entries: torch.Tensor  # int64 [adapters, 4]: addresses of A and B, rank, ranks before it
    scalings: torch.Tensor  # fp32 [adapters]
    lora_As: Sequence[torch.Tensor]  # all of one dtype; kept, since the table has addresses only
    lora_Bs: Sequence[torch.Tensor]
    layout: AdapterLayout
    scaling: float = 1.0  # of all of them, beside their own

    @property
    def max_rank(self) -> int:
        """See `AdapterLayout`."""
        return self.layout.max_rank

    def meta(self, use_A: bool) -> dict[str, int | bool]:
        """What `load_adapter` is compiled for."""
        return {"USE_A": use_A, **self.layout.specialisation}

    def gradients(self, C: int, use_A: bool) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Zeros for dA_i [r_i, C] or dB_i [C, r_i]: all in one tensor, and each."""
        like = (self.lora_As if use_A else self.lora_Bs)[0]
        ranks, total_rank = self.layout.ranks, self.layout.total_rank
        flat = like.new_zeros(total_rank * C)
        if use_A:
            return flat, flat.view(total_rank, C).split_with_sizes(ranks)
        if len({*ranks}) == 1:  # one operation, where a view for each would be hundreds
            return flat, flat.view(len(ranks), C, ranks[0]).unbind()
        parts = flat.split_with_sizes([C * r for r in ranks])
        return flat, [part.view(C, r) for part, r in zip(parts, ranks, strict=True)]


class AdapterStack(NamedTuple):
    """`AdapterTable` of experts' adapters [E, r, K] and [E, N, r], contiguous: adapter i is [i]."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    entries: None = None
    scalings: None = None

    @property
    def max_rank(self) -> int:
        """Of all of them."""
        return self.lora_A.shape[1]

    @property
    def lora_As(self) -> Sequence[torch.Tensor]:
        """What a kernel is given for their address and dtype: the stack."""
        return (self.lora_A,)

    @property
    def lora_Bs(self) -> Sequence[torch.Tensor]:
        """Likewise."""
        return (self.lora_B,)

    def meta(self, use_A: bool) -> dict[str, int | bool]:
        """What `load_adapter` is compiled for: Triton knows the rest of the arguments."""
        return {"USE_A": use_A, "ALIGNED": False, "RANK_DIVISOR": 1}

    def gradients(self, C: int, use_A: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Zeros for dA [E, r, C] or dB [E, C, r], twice."""
        zeros = torch.zeros_like(self.lora_A if use_A else self.lora_B)
        return zeros, zeros


Adapters = AdapterTable | AdapterStack


def addresses_of(
    lora_As: Sequence[torch.Tensor], lora_Bs: Sequence[torch.Tensor]
) -> tuple[int, ...]:
    """Of every A, then of every B."""
    return (*map(torch.Tensor.data_ptr, lora_As), *map(torch.Tensor.data_ptr, lora_Bs))


@functools.lru_cache(maxsize=1024)
def adapter_layout(
    addresses: tuple[int, ...],
    ranks: tuple[int, ...],
    scalings: tuple[float, ...],
    device: torch.device,
) -> AdapterLayout:
    """The layout; kept, and with it its tables."""
    return AdapterLayout(addresses, ranks, scalings, device)


def adapter_table(
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
    scalings: Sequence[float],
    layout: AdapterLayout | None = None,
) -> AdapterTable:
    """The table of these adapters; those that are not contiguous are copied.

    ``layout``: theirs, where the caller knows that they are contiguous and where they lie.
    """
    if layout is None:
        lora_As = [a.contiguous() for a in lora_As]
        lora_Bs = [b.contiguous() for b in lora_Bs]
        ranks = tuple(a.shape[0] for a in lora_As)
        addresses = addresses_of(lora_As, lora_Bs)
        layout = adapter_layout(addresses, ranks, tuple(scalings), lora_As[0].device)
    return AdapterTable(*layout.tables(), lora_As, lora_Bs, layout)
