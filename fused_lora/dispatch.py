"""Which backend and strategy a call takes, and why not the others."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import checks, recall, tables
from .kernels.configs import (
    ALIGNED,
    MAX_RANK,
    MAX_SKINNY_M,
    MIN_DOT,
    TMA_ALIGNMENT,
    Kind,
    TileConfig,
    cdiv,
    choose_config,
    computed,
    for_odd_rows,
    is_odd_rank,
    is_transposed,
    padded,
    ship,
    split_k,
    tma_obstacle,
    tunable,
)
from .kernels.device import DeviceInfo, device_info, has_fp8
from .quantize import Layout, QuantizedWeight
from .reference import FP8_BLOCK
from .tables import Direction, Product
from .tables import Strategy as Strategy  # for those who make a Plan

if TYPE_CHECKING:
    from .kernels.replay import Replays

Backend = Literal["auto", "triton", "torch"]

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# Measured ceilings of the model: bf16 operations and bytes a second. Other GPUs get the H100's.
CEILINGS = {"H100": (798e12, 3.0e12), "H200": (788e12, 4.3e12)}
# What a large product in a kernel has of cuBLAS's speed, by the GPU's generation: on Hopper as
# measured on an H200 (`benchmarks.base_product` at 8192 x 4096 x 4096) in gemm.py, persistent.py
# (less where it multiplies by A too) and specialized.py; elsewhere estimates, from what others have
# measured of Triton's tutorial: 0.89 to 0.96 on an A100 (triton-lang/triton issue 6523).
_OF_CUBLAS = {8: 0.92}
_OF_CUBLAS_NEWER = 0.85
_OF_CUBLAS_ON_HOPPER: dict[Kind, float] = {
    "tma_one_pass": 0.82,
    "tma_second": 0.92,
    "tma_produced": 0.92,
    "ws_second": 0.98,
    "ws_produced": 0.98,
}
_OF_CUBLAS_ON_HOPPER_BY_POINTERS = 0.71
_ODD_OF_CUBLAS = 0.3  # with the tile that odd rows get: an estimate
# Few rows. Up to here PyTorch's own nodes beat one of ours on a CPU, which saves passes but costs
# 25 us; and members of a group are faster apart.
FEW_ROWS = 64
_LAUNCH = 4e-6  # seconds that a second, dependent launch adds: an estimate
_LATENCY = 0.7e-6  # seconds that a load from a busy memory takes: an estimate
# Codes that become values in the K loop in a second: about 12 instructions each, on 132 SMs of 128
# lanes at 1.7 GHz. Counted, not measured.
_DECODED = 2.4e12


class Way(NamedTuple):
    """What a strategy is, besides fast or slow."""

    kind: Kind | None = None  # of the launch that makes y; None: cuBLAS's product
    h: Literal["before", "same launch", "same pass"] = "before"  # where it is made
    by_hand: bool = False  # in Gluon
    # What reads through tensor descriptors becomes this where a tensor cannot have one. Then rows
    # begin anywhere, where cuBLAS is better still than a kernel that loads element by element.
    without_tma: Strategy | None = None


WAYS: dict[Strategy, Way] = {
    "one_pass": Way("one_pass", "same pass"),
    "split": Way("second"),
    "library": Way(),
    "tma_one_pass": Way("tma_one_pass", "same pass", without_tma="one_pass"),
    "tma_split": Way("tma_second", without_tma="library"),
    "one_launch": Way("tma_produced", "same launch", without_tma="library"),
    "ws_split": Way("ws_second", by_hand=True, without_tma="library"),
    "ws_one_launch": Way("ws_produced", "same launch", by_hand=True, without_tma="library"),
    "skinny": Way("skinny", "same launch"),
    "in_loop": Way("quantized"),
}
# What is made by one kernel and tuned by itself.
PARTS: dict[Product, Kind] = {"h": "plain", "grads": "grad"}
# A layer on its own; with DoRA, whose column scale an epilogue must have; a part of a group, or of
# many adapters in a batch, whose h was made before.
Form = Literal["layer", "dora", "part"]
_TAKES: dict[Form, tuple[Strategy, ...]] = {
    "layer": get_args(Strategy),
    "dora": ("one_pass", "split", "ws_split", "in_loop"),
    "part": ("split", "in_loop", "library", "tma_split", "ws_split"),
}
# What is chosen between while no table says more, but for Hopper, where that is all: no other GPU
# has measured the rest.
_BY_MODEL: tuple[Strategy, ...] = ("one_pass", "split", "skinny", "in_loop", "library")


@dataclass(frozen=True)
class Call:
    """All that the choice depends on; hashable, so that a shape is decided once."""

    M: int
    N: int
    K: int
    r: int
    dtype: torch.dtype
    device: torch.device
    dropout: bool
    # No subclasses (DTensor, quantised weights of others, ...), no lazily negated z.conj().imag
    plain_tensors: bool
    quantized: Layout | None = None  # W0's, if it is a QuantizedWeight
    direction: Direction = "forward"  # for dx, N and K are the other way round: see `transposed`
    adapter_dtypes: tuple[torch.dtype, ...] = ()  # A's and B's: no choice depends on them


@dataclass(frozen=True)
class Plan:
    """The decision for one call."""

    backend: Literal["triton", "torch"]
    strategy: Strategy  # of the forward; always "library" on the torch backend
    strategy_dx: Strategy  # of the input gradient, whose N is the forward's K
    config: TileConfig | None = None  # of the launch that makes y; None: `choose_config`'s
    config_dx: TileConfig | None = None
    composed: bool = False  # of operators that PyTorch's autograd records, without a node of ours


@dataclass(frozen=True)
class Explanation:
    """What `fused_lora.explain` returns; ``print`` it to read it."""

    backend: Literal["triton", "torch"]
    strategy: str  # a `Strategy`, or one of many adapters' own
    strategy_dx: str
    reasons: dict[str, str]  # backend or strategy -> why it is taken or not

    def __str__(self) -> str:
        head = f"backend {self.backend}, forward {self.strategy}, dx {self.strategy_dx}"
        return "\n".join([head, *(f"  {name}: {why}" for name, why in self.reasons.items())])


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def kernel_obstacle(call: Call) -> Exception | None:
    """Why the Triton kernels cannot take this call, as the exception to raise; None if they can."""
    if not TRITON_INSTALLED:
        return RuntimeError("triton is not installed")
    if not call.plain_tensors:
        return TypeError(
            "an argument is a tensor subclass or a view that is negated when it is read; the "
            "kernels take plain tensors"
        )
    if call.device.type == "cpu" and not _interpreting():
        return RuntimeError("the tensors are on the CPU and TRITON_INTERPRET=1 is not set")
    if call.device.type not in ("cpu", "cuda"):
        return RuntimeError(f"the tensors are on {call.device}, wanted a CUDA device")
    if call.device.type == "cuda" and torch.version.hip:
        return RuntimeError("ROCm GPUs are untested")
    if call.device.type == "cuda" and device_info(call.device).capability < 80:
        return RuntimeError("the GPU is older than compute capability 8.0")
    if call.dtype == torch.float64:
        return TypeError("x: got dtype torch.float64, wanted bfloat16, float16 or float32")
    if call.dtype == torch.bfloat16 and call.device.type == "cpu":
        return RuntimeError(
            "x: got dtype torch.bfloat16 under TRITON_INTERPRET=1, where Triton's dot returns "
            "garbage; wanted float16 or float32"
        )
    if call.r > MAX_RANK:
        return ValueError(f"lora_A: got r = {call.r}, wanted at most {MAX_RANK}")
    if call.quantized is not None and not call.quantized.tiled:
        return ValueError(
            f"weight: got K = {call.K}, wanted a multiple of its block size, "
            f"{call.quantized.block[1]}: its blocks go over the ends of rows"
        )
    if call.quantized is not None and rounds_input(call) and call.quantized.block[1] % FP8_BLOCK:
        return ValueError(
            f"weight: got a scale for each {call.quantized.block[1]} columns, wanted one for "
            f"{FP8_BLOCK}, a multiple or all of them, as an x in fp8 has"
        )
    if max(call.M, call.N, call.K) >= 2**31 - 2**10:
        return ValueError(f"x, weight: got M, N, K = {call.M}, {call.N}, {call.K}, wanted < 2^31")
    return None


@functools.cache
def gluon_problem() -> str | None:
    """Why the kernel in Gluon, an experimental part of Triton, cannot be had; None if it can."""
    try:
        importlib.import_module(".kernels.specialized", __package__)
    except Exception as error:  # a part of it may be missing or changed in any way
        return f"this Triton's Gluon is not the one it is written in ({error})"
    return None


def specialized_obstacle(on: torch.device, device: DeviceInfo) -> str | None:
    """Why the hand-scheduled kernel does not run on a device; None if it does."""
    if on.type != "cuda":
        return "Triton's interpreter does not run Gluon"
    if not 90 <= device.capability < 100:
        return f"wgmma is Hopper's, and the GPU's compute capability {device.capability / 10:.1f}"
    return gluon_problem()


_NO_DESCRIPTORS = "no tensor descriptors"


def _masks_y(call: Call) -> bool:
    """Whether the launch that makes y drops h B; the forward drops x, where h is made."""
    return call.dropout and call.direction == "dx"


def obstacle(call: Call, strategy: Strategy, device: DeviceInfo) -> str | None:
    """Why a strategy cannot take a call, whatever its operands are like; None if it can."""
    way, itemsize = WAYS[strategy], call.dtype.itemsize
    if rounds_input(call) and strategy != "in_loop":
        return "x is to be rounded to fp8, which only in_loop does"
    if strategy == "in_loop" and call.quantized is None:
        return "W0 is not quantised"
    if call.M * call.N * call.K == 0 and strategy not in ("split", "library"):
        return "there is nothing to compute"
    if strategy == "skinny" and call.M > MAX_SKINNY_M:
        return f"M = {call.M} is over {MAX_SKINNY_M}"
    if way.by_hand and (why := specialized_obstacle(call.device, device)):
        return why
    if way.without_tma is not None:
        if itemsize != 2:
            return f"its kernel takes 16-bit products, not {call.dtype}"
        if device.capability < 90:
            return "the GPU is older than compute capability 9.0"
        if call.N * itemsize % TMA_ALIGNMENT or call.K * itemsize % TMA_ALIGNMENT:
            return f"{_NO_DESCRIPTORS}: rows are no multiples of {TMA_ALIGNMENT} bytes"
    if why := _rank_obstacle(way, call.r):
        return why
    if call.dropout and way.h == "same pass":
        return "it would draw each dropout decision once per tile"
    if way.by_hand and (_masks_y(call) or (call.dropout and way.h == "same launch")):
        return "its kernel draws no dropout decisions"
    if way.kind and not ship(way.kind, call.r, itemsize, _masks_y(call), device):
        return f"h's accumulator for r = {call.r} does not fit a tile"
    return None


def _rank_obstacle(way: Way, r: int) -> str | None:
    if way.without_tma is not None and not way.by_hand and is_odd_rank(r):  # by hand it is padded
        return f"lora_A: got r = {r}, wanted at most {MIN_DOT} or a multiple of it"
    return None


def no_descriptors(strategy: Strategy, x: Tensor, w: Tensor, a: Tensor) -> str | None:
    """Why the copy engine cannot read x [M, K], w [K, N], a [K, r]; None if it can or need not."""
    way = WAYS[strategy]
    if way.without_tma is None:
        return None
    why = _rank_obstacle(way, a.shape[1])
    if why is None and (why := tma_obstacle(x, w, None if way.h == "before" else a)):
        why = f"{_NO_DESCRIPTORS}: {why}"
    return why


def runs_as(
    strategy: Strategy,
    config: TileConfig | None,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    form: Form = "layer",
) -> tuple[Strategy, TileConfig | None]:
    """A strategy and its tile; or what it becomes for x, w and a that have no descriptors."""
    if strategy not in _TAKES[form]:
        return "split", None
    instead = WAYS[strategy].without_tma
    if instead is None or no_descriptors(strategy, x, w, a) is None:
        return strategy, config
    if instead not in _TAKES[form]:  # with few ranks A costs less in the same pass
        instead = "one_pass" if padded(a.shape[1]) == MIN_DOT else "split"
    return instead, None


def ceilings(device: DeviceInfo) -> tuple[float, float]:
    """Operations and bytes a second that the model counts with."""
    known = (found for gpu, found in CEILINGS.items() if gpu in device.name)
    return next(known, CEILINGS["H100"])


def of_cublas(device: DeviceInfo, kind: Kind) -> float:
    """What a kernel's multiplications are expected to reach of cuBLAS's speed."""
    if device.capability // 10 == 9:
        return _OF_CUBLAS_ON_HOPPER.get(kind, _OF_CUBLAS_ON_HOPPER_BY_POINTERS)
    return _OF_CUBLAS.get(device.capability // 10, _OF_CUBLAS_NEWER)


def predicted_seconds(call: Call, device: DeviceInfo) -> dict[Strategy, float]:
    """Time of each strategy that can take the call, by the design's model on measured ceilings.

    one_pass    the base product; the tensor cores also multiply by A: r_pad / BLOCK_N
    split       one more read of x and one more launch
    one_launch  one more read of x
    skinny      one read of W; parts of y written and read; one more launch
    library     as split, and one more read and write of y and a third launch: by cuBLAS, or, where
                the input gradient drops h B, by a kernel of ours

    The base product takes whole rounds of tiles (`configs.computed`). However few bytes move, a
    program goes through K a BLOCK_K at a time, and num_stages - 1 of these are on their way while
    it waits for one. skinny has K in ranges. cuBLAS's tiles are taken to be ours, and its
    multiplications faster than a kernel's (`of_cublas`), in which tma_ and ws_ strategies differ
    from their namesakes. The launch of y does not pay here for a mask that it draws.

    Only in_loop takes an x that is rounded to fp8 as well: codes are written once, nothing decoded.

    A quantised W0 adds to each of them N K (c + s) / bandwidth and a launch, for its scratch of
    values, with c and s the bytes of a code and of an element of x. in_loop instead is split with
    c for s in the base product's traffic, and each tile of W0 becomes values once for every BLOCK_M
    rows of x: ceil(M / BLOCK_M) N K / DECODED more. That grows with M where the scratch does not:
    in_loop is for few rows. An estimate: no GPU has measured DECODED, an instruction count.
    """
    M, N, K, r = call.M, call.N, call.K, call.r
    itemsize = call.dtype.itemsize
    flops, bandwidth = ceilings(device)
    odd = bool(N % ALIGNED or K % ALIGNED)

    def loading(tile: TileConfig, moved: float, K: int = K) -> float:
        """Seconds to move ``moved`` bytes, by programs that go through K of the reduction."""
        waiting = _LATENCY * cdiv(K, tile.BLOCK_K) / (tile.num_stages - 1)
        return max(moved / bandwidth, waiting)

    def product(kind: Kind, N: int, dropout: bool = False) -> tuple[TileConfig, float]:
        """Tile of the launch for y [M, N], and its multiplications in seconds."""
        tile = choose_config(kind, M, N, r, itemsize, dropout, device)
        rate = of_cublas(device, kind)
        if odd and kind in ("one_pass", "second"):
            tile, rate = for_odd_rows(tile, itemsize), _ODD_OF_CUBLAS
        return tile, 2 * computed(tile, M, N, device) * K / (flops * rate)

    touch_y = 2 * itemsize * M * N / bandwidth
    if M * N * K == 0:
        return {"split": _LAUNCH, "library": touch_y + 2 * _LAUNCH}
    moved = itemsize * (M * K + K * N + M * N)
    read_x = itemsize * M * K / bandwidth
    if rounds_input(call):
        native = has_fp8(call.device)
        moved = itemsize * (M * N + 2 * M * K) + N * K + 2 * M * K * (1 if native else itemsize)
        tile, gemm = product("fp8", N)
        return {"in_loop": max(gemm / (2 if native else 1), loading(tile, moved)) + 2 * _LAUNCH}

    def time(strategy: Strategy) -> float:
        way = WAYS[strategy]
        if way.kind is None:
            tile = choose_config("second", M, N, r, itemsize, False, device)
            gemm = 2 * computed(tile, M, N, device) * K / flops
            return max(gemm, loading(tile, moved)) + read_x + touch_y + 2 * _LAUNCH
        if strategy == "skinny":
            tile = choose_config(way.kind, M, N, r, itemsize, False, device)
            splits = split_k(tile, N, K, r, device)
            parts = 2 * 4 * M * (N + r) * splits
            return loading(tile, moved + parts, cdiv(K, splits)) + _LAUNCH
        if strategy == "in_loop":
            tile, gemm = product(way.kind, N, call.dropout)
            decoding = cdiv(M, tile.BLOCK_M) * N * K / _DECODED
            saved = N * K * (itemsize - code_bytes)
            return max(gemm, loading(tile, moved - saved)) + read_x + _LAUNCH + decoding
        tile, gemm = product(way.kind, N)
        if way.h == "same pass":
            return max(gemm * (1 + padded(r) / tile.BLOCK_N), loading(tile, moved))
        making_h = read_x + (_LAUNCH if way.h == "before" else 0)
        return max(gemm, loading(tile, moved)) + making_h

    code_bytes = 0.5 if call.quantized and call.quantized.format in ("nf4", "fp4") else 1.0
    scratch = N * K * (code_bytes + itemsize) / bandwidth + _LAUNCH if call.quantized else 0.0
    possible = [s for s in WAYS if obstacle(call, s, device) is None]
    return {s: time(s) + (0.0 if s == "in_loop" else scratch) for s in possible}


def _model_chooses(strategy: Strategy, call: Call) -> bool:
    """Whether the model may choose a strategy that no table has measured."""
    if call.device.type != "cuda" or device_info(call.device).capability != 90:
        return strategy in _BY_MODEL
    # With a mask to draw it has lost to tma_split and ws_split on every shape on an H200.
    return not (call.dropout and strategy == "one_launch")


def _by_model(call: Call, form: Form = "layer") -> Strategy:
    seconds = predicted_seconds(call, device_info(call.device))
    known = (s for s in seconds if s in _TAKES[form] and _model_chooses(s, call))
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
    tiles = tunable(kind, call.r, itemsize, _masks_y(call), device, dora)
    return tuple(c for c in tiles if strategy != "skinny" or call.M <= c.BLOCK_M)


def _choose(call: Call, form: Form = "layer") -> tuple[Strategy, TileConfig | None]:
    """The table's choice, else the model's."""
    device = device_info(call.device)
    if call.quantized is not None and _by_model(call, form) == "in_loop":
        return "in_loop", None  # the tables are of plain weights: of what follows a scratch
    found = tables.table(device.name).get(table_key(call, call.direction))
    if found is not None and found.strategy in _TAKES[form]:
        tiles = (None, *tiles_of(call, found.strategy, form))  # None: the default one
        if obstacle(call, found.strategy, device) is None and found.config in tiles:
            return found.strategy, found.config
    return _by_model(call, form), None


def transposed(call: Call) -> Call:
    """The call as its input gradient sees it. Gradients are not rounded to fp8."""
    layout = call.quantized and replace(call.quantized, activations=None)
    return replace(call, N=call.K, K=call.N, quantized=layout, direction="dx")


def rounds_input(call: Call) -> bool:
    """Whether x is rounded to fp8 before it is multiplied by W0."""
    return call.quantized is not None and call.quantized.activations == "fp8"


def _auto_avoids_kernels(call: Call) -> str | None:
    """Why "auto" leaves a call that the kernels could take to PyTorch."""
    if call.device.type == "cpu":
        return 'the tensors are on the CPU; the interpreter is there to check backend="triton"'
    if call.dtype == torch.float32:
        return "the kernels' fp32 product is exact, without tensor cores, and cuBLAS's is faster"
    return None


def better_apart(x: Tensor, dropout: bool, backend: Backend) -> bool:
    """Whether `lora_linear` for each member of a group is faster than the group.

    For few rows: a group saves reads of x, which are nothing then (on a CPU it has 0.80 of the
    speed), and launches more in the forward. From how many rows on it pays on a GPU, none has
    measured (`benchmarks.groups`). On a CPU with dropout, whose masks a group draws twice (0.76 of
    the speed at M 512).
    """
    if backend == "triton":  # asked for
        return False
    return x.shape[:-1].numel() <= FEW_ROWS or (dropout and x.device.type == "cpu")


@functools.lru_cache(maxsize=4096)
def plan(call: Call, backend: Backend, form: Form = "layer") -> Plan:
    """The decision for ``call``; raises the obstacle if "triton" was asked for and stands."""
    problem = kernel_obstacle(call) if backend != "torch" else None
    if backend == "triton" and problem is not None:
        raise type(problem)(f'backend="triton" cannot take this call: {problem}')
    if backend == "torch" or problem or (backend == "auto" and _auto_avoids_kernels(call)):
        few = call.device.type == "cpu" and call.M <= FEW_ROWS and call.quantized is None
        return Plan("torch", "library", "library", composed=few)
    strategy, config = _choose(call, form)
    # DoRA's input gradient is a layer's.
    strategy_dx, config_dx = _choose(transposed(call), "layer" if form == "dora" else form)
    return Plan("triton", strategy, strategy_dx, config, config_dx)


def group_dx(
    plans: Sequence[Plan],
    gs: Sequence[Tensor],
    weights: Sequence[Tensor | QuantizedWeight],
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
    values = [_as_values(W, gs[0].dtype) for W in weights]
    alike = len({is_transposed(W) for W in values}) == 1
    return "library" if not alike or any(map(tma_obstacle, gs, values)) else "ws_split"


def _describe(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout: bool,
) -> Call:
    N, K = weight.shape
    quantized = weight.layout if isinstance(weight, QuantizedWeight) else None
    tensors = (x, weight if isinstance(weight, Tensor) else None, lora_A, lora_B, bias)
    return Call(
        M=x.numel() // K if K else x.shape[:-1].numel(),
        N=N,
        K=K,
        r=lora_A.shape[0],
        dtype=x.dtype,
        device=x.device,
        dropout=dropout,
        plain_tensors=all(
            t is None or (type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg())
            for t in tensors
        ),
        quantized=quantized,
        adapter_dtypes=(lora_A.dtype, lora_B.dtype),
    )


def _facts(tensor: Tensor | QuantizedWeight) -> tuple[object, ...]:
    negated = isinstance(tensor, Tensor) and tensor.is_neg()
    return tensor.shape, tensor.dtype, tensor.device, tensor.layout, type(tensor), negated


class Decision(NamedTuple):
    """All that there is to know of a call before it runs."""

    call: Call
    plan: Plan
    scaling: float
    threshold: int  # of its dropout
    replays: Replays | None = None


_calls: dict[tuple[object, ...], Call] = {}  # a checked call by the facts about its arguments
_MAX_CALLS = 4096


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


def checked_call(
    x: Tensor,
    weight: Tensor | QuantizedWeight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    dropout: bool,
) -> Call:
    """What the call is, or the TypeError or ValueError of `checks.check_tensors`.

    What was checked once is not checked again: 5 instead of 11 us a call.
    """
    try:
        facts = (_facts(x), _facts(weight), _facts(lora_A), _facts(lora_B))
        key = (facts, None if bias is None else _facts(bias), dropout)
        call = _calls.get(key)
    except (AttributeError, RuntimeError):  # not a tensor, or nested ones: the checks say which
        call = None
    if call is None:
        checks.check_tensors(x, weight, lora_A, lora_B, bias)
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        call = _calls[key] = _describe(x, weight, lora_A, lora_B, bias, dropout)
    return call


Operands = tuple[Any, ...]  # x, W0, A and B, or nothing
Matrices = tuple[Tensor, Tensor, Tensor]


def _as_values(weight: Tensor | QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """W0, or one like the scratch tensor of a quantised one, without data."""
    if isinstance(weight, Tensor):
        return weight
    return torch.empty(weight.shape, dtype=dtype, device="meta")


def as_products(operands: Operands, dtype: torch.dtype) -> tuple[Matrices, Matrices]:
    """x, w and a of y = x w + (x a) b, and of dx's product, whose x is the gradient, contiguous."""
    x, weight, lora_A, lora_B = operands
    weight = _as_values(weight, dtype)
    x = x.flatten(0, -2) if x.ndim > 1 else x[None]
    g = torch.empty((len(x), len(weight)), dtype=dtype, device="meta")
    return (x, weight.t(), lora_A.t()), (g, weight, lora_B)


def why_torch(call: Call, backend: Backend) -> object:
    """What sends a call to PyTorch; None if the kernels take it."""
    if backend == "torch":
        return 'backend="torch" was asked for'
    return kernel_obstacle(call) or _auto_avoids_kernels(call)


def explain_call(
    call: Call, backend: Backend, operands: Operands, form: Form = "layer"
) -> Explanation:
    """The plan with the reason for and against every backend and strategy.

    ``operands``: their layouts decide whether tensor descriptors can be made of them.
    """
    chosen = plan(call, backend, form)
    reasons: dict[str, str] = {}
    if chosen.backend == "torch":
        reasons["triton"] = f"not taken: {why_torch(call, backend)}"
        reasons["library"] = "taken: F.linear, then addmm_ in place on its own output"
        if chosen.composed:
            reasons["library"] = "taken: F.linear, the adapter's part added in place"
            reasons["autograd"] = f"PyTorch's own nodes: up to {FEW_ROWS} rows they cost less"
        if call.quantized is not None:
            reasons["quantised W0"] = describe_quantized(call, "torch", False)
        if rounds_input(call):
            reasons["x in fp8"] = "rounded to it, and multiplied in its own dtype"
        return Explanation(chosen.backend, chosen.strategy, chosen.strategy_dx, reasons)
    device = device_info(call.device)
    seconds = predicted_seconds(call, device)
    found = tables.table(device.name).get(table_key(call, "forward"))
    reasons["torch"] = "not taken: the kernels take this call"
    of_y, of_dx = as_products(operands, call.dtype)
    taken, _ = runs_as(chosen.strategy, None, *of_y, form=form)
    taken_dx, _ = runs_as(chosen.strategy_dx, None, *of_dx)
    for strategy in get_args(Strategy):
        why_not = obstacle(call, strategy, device)
        if why_not is None or why_not.startswith(_NO_DESCRIPTORS):  # which tensor has none
            why_not = no_descriptors(strategy, *of_y) or why_not
        if form == "dora" and strategy not in _TAKES[form]:
            why_not = why_not or "its launch has no column scale, which DoRA needs"
        if why_not:
            reasons[strategy] = f"not taken: {why_not}"
            continue
        verdict = "taken" if strategy == taken else "not taken"
        why = f"predicted {seconds[strategy] * 1e6:.1f} us"
        if found is not None and strategy == found.strategy:
            why += f", measured {found.seconds * 1e6:.1f} us on this GPU"
        elif not _model_chooses(strategy, call):
            why += "; taken only where a tuned table says so"
        reasons[strategy] = f"{verdict}: {why}"
    flops, bandwidth = ceilings(device)
    if call.quantized is not None:
        in_loop = chosen.strategy == "in_loop"
        reasons["quantised W0"] = describe_quantized(call, "triton", in_loop)
    reasons["model"] = f"ceilings of {flops / 1e12:.0f} TFLOP/s and {bandwidth / 1e12:.1f} TB/s"
    return Explanation(chosen.backend, taken, taken_dx, reasons)


def describe_quantized(call: Call, backend: str, in_loop: bool) -> str:
    """A quantised W0's format, and how the forward turns its codes into values."""
    assert call.quantized is not None
    format = call.quantized.format
    if backend == "torch":
        tiles = "some rows or columns" if call.quantized.tiled else "the whole of it"
        return f"{format}, made values {tiles} at a time"
    if rounds_input(call):
        how = "codes by codes" if has_fp8(call.device) else "as values: the GPU has no fp8 products"
        return f"{format}, and x is rounded to fp8 first; multiplied {how}"
    if in_loop:
        return f"{format}, tiles become values in the K loop"
    return f"{format}, turned into values once, in a scratch tensor"
