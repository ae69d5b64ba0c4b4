"""Which backend and strategy a call takes: tuned tables, else the cost model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from . import recall, tables
from .arguments import Arguments
from .calls import Backend, Call, as_values, transposed
from .cost_model import predicted_seconds
from .kernels.alignment import is_transposed, tma_obstacle
from .kernels.configs import choose_config, tunable
from .kernels.device import DeviceInfo, device_info
from .kernels.tile_config import TileConfig
from .products import has_instructions, in_fp32
from .quantized_weight import Weight
from .strategies import (
    PARTS,
    TAKES,
    WAYS,
    Form,
    kernel_obstacle,
    masks_y,
    obstacle,
    specialized_obstacle,
)
from .tables import Product, Strategy

if TYPE_CHECKING:
    from .kernels.replay import Replays

# Few rows: PyTorch's own nodes beat one of ours on a CPU, and members of a group are faster apart.
FEW_ROWS = 64
# And so do they where x and y have up to so many elements together. A node of ours saves passes
# over dx and y, and costs 50 to 150 us: its Python comes from memory after each product. Their
# time, of ours, by M, N x K, on a Xeon with AMX in bf16, in bf16 under fp32 adapters and in fp32:
# 96, 192 x 576 0.87, 0.78, 0.89; 64, 2048 x 2048 0.98, 0.98, 0.95; with twice as many elements,
# 256, 576 x 576 0.98, 1.10, 0.96, and PEFT's memory, of which a node takes 0.6. With dropout 0.8 to
# 0.96 of the time. On an EPYC in fp32 96, 192 x 576 0.84; 256, 576 x 576 0.98.
_FEW_ELEMENTS = 1 << 18
# Against members of a group, which has one node for all, x has up to so many for each byte of one.
# (On an EPYC 0.87 to 1 of the group's time in fp32, and 1.02 to 1.16 with twice as many; over
# quantised W0s 1 to 1.08. On a Xeon with AMX in bf16 0.95 to 1, with twice as many 1.04 to 1.14.)
_FEW_OF_GROUP = 1 << 15
# What is chosen between while no table says more, but for Hopper, where that is all: no other GPU
# has measured the rest.
_BY_MODEL: tuple[Strategy, ...] = ("one_pass", "split", "skinny", "in_loop", "library")


@dataclass(frozen=True)
class Plan:
    """The decision for one call."""

    backend: Literal["triton", "torch"]
    strategy: Strategy  # of the forward; always "library" on the torch backend
    strategy_dx: Strategy  # of the input gradient, whose N is the forward's K
    config: TileConfig | None = None  # of the launch that makes y; None: `choose_config`'s
    config_dx: TileConfig | None = None
    composed: bool = False  # of operators that PyTorch's autograd records, without a node of ours


def model_chooses(strategy: Strategy, call: Call) -> bool:
    """Whether the model may choose a strategy that no table has measured."""
    if call.device.type != "cuda" or device_info(call.device).capability != 90:
        return strategy in _BY_MODEL
    # With a mask to draw it has lost to tma_split and ws_split on every shape on an H200.
    return not (call.dropout and strategy == "one_launch")


def _by_model(call: Call, form: Form = "layer") -> Strategy:
    seconds = predicted_seconds(call, device_info(call.device))
    known = (s for s in seconds if s in TAKES[form] and model_chooses(s, call))
    return min(known, key=seconds.__getitem__)


def table_key(call: Call, product: Product) -> str:
    """The call's name in tuned tables; for dx, ``call`` has N and K swapped already."""
    dtype = str(call.dtype).removeprefix("torch.")
    N = call.r if product == "h" else call.N
    return tables.key(product, call.M, N, call.K, call.r, dtype, call.dropout)


@functools.lru_cache(maxsize=4096)
def part_config(
    product: Literal["h", "grads"],
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    dropout: bool,
    device: DeviceInfo,
) -> TileConfig:
    """The table's tile for h [M, r] = x [M, K] A, or for dA and dB; else a default one."""
    kind = PARTS[product]
    name = str(dtype).removeprefix("torch.")
    found = tables.table(device.name).get(tables.key(product, M, N, K, r, name, dropout))
    if found is not None and found.config in tunable(kind, r, dtype.itemsize, dropout, device):
        return found.config
    return choose_config(
        kind, M, max(N, K) if kind == "grad" else r, r, dtype.itemsize, dropout, device
    )


def tiles_of(call: Call, strategy: Strategy, form: Form = "layer") -> tuple[TileConfig | None, ...]:
    """What a table may choose for the launch that makes y; None where it is cuBLAS's."""
    kind, device = WAYS[strategy].kind, device_info(call.device)
    if kind is None:
        return (None,)
    itemsize, dora = call.dtype.itemsize, form == "dora"
    tiles = tunable(kind, call.r, itemsize, masks_y(call), device, dora)
    return tuple(c for c in tiles if strategy != "skinny" or call.M <= c.BLOCK_M)


def _choose(call: Call, form: Form = "layer") -> tuple[Strategy, TileConfig | None]:
    """The table's choice, else the model's."""
    device = device_info(call.device)
    if call.quantized is not None and _by_model(call, form) == "in_loop":
        return "in_loop", None  # the tables are of plain weights: of what follows a scratch
    found = tables.table(device.name).get(table_key(call, call.direction))
    if found is not None and found.strategy in TAKES[form]:
        tiles = (None, *tiles_of(call, found.strategy, form))  # None: the default one
        if obstacle(call, found.strategy, device) is None and found.config in tiles:
            return found.strategy, found.config
    return _by_model(call, form), None


def _auto_avoids_kernels(call: Call) -> str | None:
    """Why "auto" leaves a call that the kernels could take to PyTorch."""
    if call.device.type == "cpu":
        return 'the tensors are on the CPU; the interpreter is there to check backend="triton"'
    if call.dtype == torch.float32:
        return "the kernels' fp32 product is exact, without tensor cores, and cuBLAS's is faster"
    return None


def why_torch(call: Call, backend: Backend) -> object:
    """What sends a call to PyTorch; None if the kernels take it."""
    if backend == "torch":
        return 'backend="torch" was asked for'
    return kernel_obstacle(call) or _auto_avoids_kernels(call)


def multiplied_in_fp32(call: Call) -> bool:
    """Whether PyTorch's path multiplies a call's 16-bit tensors in fp32: see products.py."""
    return in_fp32(call.dtype, call.device, call.M, call.N, call.K)


def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a CPU has instructions for products in 32 or 16 bits."""
    return device.type == "cpu" and dtype.itemsize <= 4 and has_instructions(dtype)


def _is_small(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether PyTorch's own nodes are faster for a layer on a CPU."""
    return M <= FEW_ROWS or (_multiplies(dtype, device) and M * (N + K) <= _FEW_ELEMENTS)


def is_small(x: Tensor, member: Arguments) -> bool:
    """Whether PyTorch's own nodes are faster for a layer's x, or it has few rows."""
    M = x.shape[:-1].numel()
    if not isinstance(member.weight, Tensor):
        return M <= FEW_ROWS
    N, K = member.weight.shape
    return _is_small(M, N, K, x.dtype, x.device)


def better_apart(x: Tensor, member: Arguments) -> bool:
    """Whether `lora_linear` for each member of a group is faster than the group, of this one.

    For few rows: a group saves reads of x, which are nothing then (on a CPU it has 0.80 of the
    speed), and launches more in the forward. From how many rows on it pays on a GPU, none has
    measured (`benchmarks.groups`). On a CPU with dropout, whose masks a group draws twice (0.76 of
    the speed at M 512).
    """
    if member.backend == "triton":  # asked for
        return False
    if x.shape[:-1].numel() <= FEW_ROWS or (x.device.type == "cpu" and member.dropout_p > 0.0):
        return True
    few = _multiplies(x.dtype, x.device) and x.numel() <= _FEW_OF_GROUP * x.itemsize
    return few and isinstance(member.weight, Tensor)


def _composes(call: Call) -> bool:
    """Whether a call that PyTorch takes is recorded by its autograd operator by operator."""
    if call.device.type != "cpu" or call.quantized is not None or multiplied_in_fp32(call):
        return False  # the last is ours
    return _is_small(call.M, call.N, call.K, call.dtype, call.device)


def takes_kernels(call: Call, backend: Backend) -> bool:
    """Whether the kernels take a call; raises why not if "triton" was asked for."""
    problem = kernel_obstacle(call) if backend != "torch" else None
    if backend == "triton" and problem is not None:
        raise type(problem)(f'backend="triton" cannot take this call: {problem}')
    return not (backend == "torch" or problem or (backend == "auto" and _auto_avoids_kernels(call)))


@functools.lru_cache(maxsize=4096)
def plan(call: Call, backend: Backend, form: Form = "layer") -> Plan:
    """The decision for ``call``; raises the obstacle if "triton" was asked for and stands."""
    if not takes_kernels(call, backend):
        return Plan("torch", "library", "library", composed=_composes(call))
    strategy, config = _choose(call, form)
    # DoRA's input gradient is a layer's.
    strategy_dx, config_dx = _choose(transposed(call), "layer" if form == "dora" else form)
    return Plan("triton", strategy, strategy_dx, config, config_dx)


def group_dx(
    plans: Sequence[Plan],
    gs: Sequence[Tensor],
    weights: Sequence[Weight],
    device: torch.device,
) -> Literal["split", "library", "ws_split"]:
    """How a group's one dx = sum_i g_i W0_i is made, by how each member would make its own.

    split      one launch of group.py, where that is gemm.py's loop
    library    cuBLAS's products, each added to the one before, where it is cuBLAS's
    ws_split   one launch of specialized.py, where it is that, persistent.py or cuBLAS: on Hopper
               group.py's loop has 0.71 of cuBLAS's speed. Where it does not run, library.

    ``gs``: gradients [M, N_i], or tensors like them without data.
    """
    ways = {plan.strategy_dx for plan in plans}
    if not ways <= {"library", "tma_split", "ws_split"}:
        return "split"
    if ways == {"library"} or specialized_obstacle(device, device_info(device)):
        return "library"
    values = [as_values(W, gs[0].dtype) for W in weights]
    alike = len({is_transposed(W) for W in values}) == 1
    return "library" if not alike or any(map(tma_obstacle, gs, values)) else "ws_split"


class Decision(NamedTuple):
    """All that there is to know of a call before it runs."""

    call: Call
    plan: Plan
    scaling: float
    threshold: int  # of its dropout
    replays: Replays | None = None


def replays_of(shape: torch.Size, *layers: Decision) -> Replays | None:
    """Shared by all calls that these facts are all of, but for addresses and strides.

    None where there is nothing to replay.
    """
    for layer in layers:
        # tf32 is a setting of torch, and not of the call.
        if layer.plan.backend == "torch" or layer.call.dtype == torch.float32:
            return None
    return _replays(shape, layers)


@functools.lru_cache(maxsize=1024)  # 20 KB each, with both directions
def _replays(shape: torch.Size, layers: tuple[Decision, ...]) -> Replays:
    from .kernels.replay import Replays

    return Replays()


def forget_plans() -> None:
    """Lets every call be decided anew: a table has changed."""
    plan.cache_clear()
    part_config.cache_clear()
    _replays.cache_clear()
    recall.forget()
