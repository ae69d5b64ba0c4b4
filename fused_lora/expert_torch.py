"""The PyTorch path of a mixture of experts: rows of some experts at a time, in their order.

Same contract as expert_backends. It waits for a GPU, to know how many rows the experts have. Of
weights in codes a tile of one expert's values is there at a time, and no expert's without rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .expert_stack import Experts
from .kernels.alignment import rows_obstacle
from .kernels.rows import RowGroups
from .products import WITHOUT_INSTRUCTIONS, addmm_, mm
from .quantized_weight import Weight
from .reference import keep_mask
from .torch_backend import add_base_dx, base_product, masked

Index = slice | Tensor


def summed(dx: Tensor, fan: int) -> Tensor:
    """dx [M / fan, K] of [M, K], each sum rounded once."""
    return dx if fan == 1 else dx.view(len(dx) // fan, fan, dx.shape[1]).sum(1)


class _Chunk(NamedTuple):
    """Neighbouring experts with few rows, or one with many."""

    experts: slice
    first: int  # position
    last: int
    ends: list[int]  # of each expert's rows, from the first on


# Positions whose rows are there in the experts' order at a time. One expert after the other, a
# mixture of 32 with 16 rows each took 1.4 times as long on a CPU (a few small operators for each);
# all at once, one with 256 rows each held 1.2 times the memory.
_CHUNK = 1024


def _chunks(layer: Experts) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    for expert, first, last in layer.rows.spans:
        if chunks and last - chunks[-1].first <= _CHUNK:
            experts, start, end, ends = chunks[-1]
            idle = [end - start] * (expert - experts.stop)  # experts without rows
            ends += [*idle, last - start]
            chunks[-1] = _Chunk(slice(experts.start, expert + 1), start, last, ends)
        else:
            chunks.append(_Chunk(slice(expert, expert + 1), first, last, [last - first]))
    if len(chunks) == 1 and chunks[0].last - chunks[0].first <= _CHUNK:  # of all experts, then
        experts, first, last, ends = chunks[0]
        E = layer.weight.shape[0]
        after = [last - first] * (E - experts.stop)
        chunks = [_Chunk(slice(0, E), first, last, [*[0] * experts.start, *ends, *after])]
    return chunks


def _can_group(*matrices: Tensor) -> bool:
    """Whether PyTorch's own product of groups takes them, and is as fast as one for each."""
    dtype, device = matrices[0].dtype, matrices[0].device
    if dtype not in (
        (torch.float32, torch.bfloat16) if device.type == "cpu" else (torch.bfloat16,)
    ):
        return False
    if device.type == "cpu" and dtype in WITHOUT_INSTRUCTIONS:
        return False
    return not any(rows_obstacle(t if t.ndim == 2 else t[0], t.stride(-1) != 1) for t in matrices)


def _each(chunk: _Chunk) -> Iterator[tuple[int, slice]]:
    """The chunk's experts and their rows in it."""
    start = 0
    for i, end in enumerate(chunk.ends):
        yield i, slice(start, end)
        start = end


def _products(chunk: _Chunk, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows of a [m, K] times their experts' b [experts, K, N], into ``out`` if it is given."""
    if len(b) == 1:
        return mm(a, b[0], out=out)
    if out is None and _can_group(a, b):  # which has no ``out``, and a copy costs what it saves
        return F.grouped_mm(a, b, offs=torch.tensor(chunk.ends, dtype=torch.int32, device=a.device))
    out = a.new_empty((len(a), b.shape[2])) if out is None else out
    for i, rows in _each(chunk):
        mm(a[rows], b[i], out=out[rows])
    return out


def _outer_products(chunk: _Chunk, a: Tensor, b: Tensor) -> Tensor:
    """a^T b [experts, m, n] over each expert's rows of a [rows, m] and b [rows, n]."""
    if len(chunk.ends) == 1:
        return mm(a.t(), b)[None]
    if _can_group(a, b):
        ends = torch.tensor(chunk.ends, dtype=torch.int32, device=a.device)
        return F.grouped_mm(a.t(), b, offs=ends)
    return torch.stack([mm(a[rows].t(), b[rows]) for _, rows in _each(chunk)])


def _index(rows: RowGroups, first: int, last: int, fan: int) -> Index:
    """The rows of a matrix at these positions."""
    found = rows.rows(first, last)
    return found if fan == 1 or isinstance(found, slice) else found // fan


def _rows(t: Tensor, index: Index) -> Tensor:
    """t[index]; as advanced indexing it takes 4 times as long on a CPU."""
    return t[index] if isinstance(index, slice) else t.index_select(0, index)


def _mask(layer: Experts) -> tuple[Tensor | None, float]:
    if layer.dropout is None:
        return None, 1.0
    seed, threshold = layer.dropout
    M, K = layer.rows.M // layer.fan, layer.weight.shape[2]
    return keep_mask(seed, threshold, M, K), layer.dropout.keep_scale


def _zero_the_rest(y: Tensor, layer: Experts, rows: RowGroups) -> None:
    """The rows of no expert, which are the first."""
    spans = layer.rows.spans  # not those of ``rows``, which would wait for a GPU once more
    first = spans[0][1] if spans else rows.M
    if first:
        y[rows.rows(0, first)] = 0


def _adapters(layer: Experts, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, float]:
    """A and B in ``dtype``: one operation where the experts' own would be hundreds."""
    A, B = layer.lora_A, layer.lora_B
    if A is None or B is None:
        return None, None, 1.0
    return A.to(dtype), B.to(dtype), layer.scaling


def project(x: Tensor, layer: Experts, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """y [M, N] and h = scaling * (D o x) A^T [M, r]."""
    of_x, of_y = layer.of_x(), layer.of_y()
    A, B, scaling = _adapters(layer, x.dtype)
    M = layer.rows.M
    y = x.new_empty((M, layer.weight.shape[1]))
    h = None if A is None else x.new_empty((M, A.shape[1]))
    keep, keep_scale = _mask(layer)
    _zero_the_rest(y, layer, of_y)
    for chunk in _chunks(layer):
        experts, first, last, _ = chunk
        source, target = _index(of_x, first, last, layer.fan), of_y.rows(first, last)
        rows = _rows(x, source)
        whole = isinstance(target, slice) and (first, last) == (0, M)
        out = None if whole or isinstance(target, Tensor) else y[target]
        part = _base_products(chunk, rows, layer.weight, out)
        if bias is not None:
            for i, own in _each(chunk):
                part[own] += bias[experts.start + i]
        if A is not None and B is not None and h is not None:
            rows = rows if keep is None else masked(rows, _rows(keep, source))
            h_part = _products(chunk, rows, A[experts].mT)
            h_part *= scaling * keep_scale
            h[first:last] = h_part
            _add_products(part, chunk, h_part, B[experts].mT)
        if whole:
            y = part
        elif out is None:
            y[target] = part
    return y, h


def _add_products(y: Tensor, chunk: _Chunk, a: Tensor, b: Tensor) -> None:
    """y += the products."""
    if len(b) == 1:
        addmm_(y, a, b[0])
    else:
        y += _products(chunk, a, b)


def _base_products(chunk: _Chunk, x: Tensor, weight: Weight, out: Tensor | None) -> Tensor:
    """The rows of x times their experts' W0^T, as `_products`."""
    if isinstance(weight, Tensor):
        return _products(chunk, x, weight[chunk.experts].mT, out)
    out = x.new_empty((len(x), weight.shape[1])) if out is None else out
    for i, rows in _each(chunk):
        if rows.start < rows.stop:
            out[rows] = base_product(x[rows], weight, None, chunk.experts.start + i)
    return out


def _add_base_products_back(dx: Tensor, chunk: _Chunk, g: Tensor, weight: Weight) -> None:
    """dx += the rows of g times their experts' W0."""
    if isinstance(weight, Tensor):
        _add_products(dx, chunk, g, weight[chunk.experts])
        return
    for i, rows in _each(chunk):
        if rows.start < rows.stop:
            add_base_dx(dx[rows], g[rows], weight, chunk.experts.start + i)


def project_back(
    g: Tensor, layer: Experts, *, need_dx: bool, need_dh: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dx, like x, and dh = scaling * g B [M, r]; dh is made for dx too."""
    weight, of_x, of_g = layer.weight, layer.of_x(), layer.of_y()
    A, B, scaling = _adapters(layer, g.dtype)
    M, K = layer.rows.M, weight.shape[2]
    # On a CPU sums in fp32 need no row for each of the order.
    at_once = layer.fan > 1 and g.device.type == "cpu" and g.dtype.itemsize >= 4
    dx = dh = None
    if need_dx:
        dx = g.new_zeros((M // layer.fan, K)) if at_once else g.new_empty((M, K))
        if not at_once:
            _zero_the_rest(dx, layer, of_x)
    if B is not None and (need_dh or need_dx):
        dh = g.new_empty((M, B.shape[2]))
    keep, keep_scale = _mask(layer) if dh is not None else (None, 1.0)
    for chunk in _chunks(layer) if dx is not None or dh is not None else ():
        experts, first, last, _ = chunk
        g_part = _rows(g, _index(of_g, first, last, layer.fan_g))
        dh_part = None
        if dh is not None and B is not None:
            dh_part = _products(chunk, g_part, B[experts])
            dh_part *= scaling * keep_scale
            dh[first:last] = dh_part
        if dx is None:
            continue
        source = _index(of_x, first, last, layer.fan)
        if isinstance(weight, Tensor) and keep is None:
            part = _products(chunk, g_part, weight[experts])
            if dh_part is not None and A is not None:
                _add_products(part, chunk, dh_part, A[experts])
        else:
            if dh_part is not None and A is not None:
                part = _products(chunk, dh_part, A[experts])
            else:
                part = g.new_zeros((last - first, K))
            if keep is not None:
                masked(part, _rows(keep, source), out=part)
            _add_base_products_back(part, chunk, g_part, weight)
        if at_once and isinstance(source, Tensor):
            dx.index_add_(0, source, part)
        elif not layer.gathers and (first, last) == (0, M):
            dx = part
        else:
            dx[of_x.rows(first, last)] = part
    if dx is not None and not at_once:
        dx = summed(dx, layer.fan)
    return dx, dh


def grad_A(x: Tensor, dh: Tensor, layer: Experts) -> Tensor:
    """dA [E, r, K]."""
    assert layer.lora_A is not None
    of_x = layer.of_x()
    keep, _ = _mask(layer)

    def part(chunk: _Chunk) -> Tensor:
        source = _index(of_x, chunk.first, chunk.last, layer.fan)
        rows = _rows(x, source)
        rows = rows if keep is None else masked(rows, _rows(keep, source))
        return _outer_products(chunk, dh[chunk.first : chunk.last], rows)

    return _of_all(layer, layer.lora_A, part)


def grad_B(g: Tensor, h: Tensor, layer: Experts) -> Tensor:
    """dB [E, N, r]."""
    assert layer.lora_B is not None
    of_g = layer.of_y()

    def part(chunk: _Chunk) -> Tensor:
        g_part = _rows(g, _index(of_g, chunk.first, chunk.last, layer.fan_g))
        return _outer_products(chunk, g_part, h[chunk.first : chunk.last])

    return _of_all(layer, layer.lora_B, part)


def _of_all(layer: Experts, like: Tensor, part: Callable[[_Chunk], Tensor]) -> Tensor:
    """A gradient, of which ``part`` makes the chunks'."""
    chunks = _chunks(layer)
    if len(chunks) == 1 and len(chunks[0].ends) == len(like):
        return part(chunks[0]).to(like.dtype)
    gradient = torch.zeros_like(like, memory_format=torch.contiguous_format)
    for chunk in chunks:
        gradient[chunk.experts] = part(chunk)
    return gradient
