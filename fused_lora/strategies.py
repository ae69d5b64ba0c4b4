"""The ways to compute a layer, and why the kernels or one of the ways cannot take a call."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .calls import Call, rounds_input
from .kernels.alignment import TMA_ALIGNMENT, is_odd_rank, tma_obstacle
from .kernels.configs import MAX_RANK, MAX_SKINNY_M, ship
from .kernels.device import DeviceInfo, device_info
from .kernels.sizes import MIN_DOT, padded
from .kernels.tile_config import Kind, TileConfig
from .reference import FP8_BLOCK
from .tables import Product, Strategy

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


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
TAKES: dict[Form, tuple[Strategy, ...]] = {
    "layer": get_args(Strategy),
    "dora": ("one_pass", "split", "ws_split", "in_loop"),
    "part": ("split", "in_loop", "library", "tma_split", "ws_split"),
}


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_obstacle(device: torch.device) -> RuntimeError | None:
    """Why no Triton kernel runs on this device; None if they do."""
    if not TRITON_INSTALLED:
        return RuntimeError("triton is not installed")
    if device.type == "cpu" and not _interpreting():
        return RuntimeError("the tensors are on the CPU and TRITON_INTERPRET=1 is not set")
    if device.type not in ("cpu", "cuda"):
        return RuntimeError(f"the tensors are on {device}, wanted a CUDA device")
    if device.type == "cuda" and torch.version.hip:
        return RuntimeError("ROCm GPUs are untested")
    if device.type == "cuda" and device_info(device).capability < 80:
        return RuntimeError("the GPU is older than compute capability 8.0")
    return None


def kernel_obstacle(call: Call) -> Exception | None:
    """Why the Triton kernels cannot take this call, as the exception to raise; None if they can."""
    if not call.plain_tensors:
        return TypeError(
            "an argument is a tensor subclass or a view that is negated when it is read; the "
            "kernels take plain tensors"
        )
    obstacle = device_obstacle(call.device)
    if obstacle is not None:
        return obstacle
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


NO_DESCRIPTORS = "no tensor descriptors"


def masks_y(call: Call) -> bool:
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
            return f"{NO_DESCRIPTORS}: rows are no multiples of {TMA_ALIGNMENT} bytes"
    if why := _rank_obstacle(way, call.r):
        return why
    if call.dropout and way.h == "same pass":
        return "it would draw each dropout decision once per tile"
    if way.by_hand and (masks_y(call) or (call.dropout and way.h == "same launch")):
        return "its kernel draws no dropout decisions"
    if way.kind and not ship(way.kind, call.r, itemsize, masks_y(call), device):
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
        why = f"{NO_DESCRIPTORS}: {why}"
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
    if strategy not in TAKES[form]:
        return "split", None
    instead = WAYS[strategy].without_tma
    if instead is None or no_descriptors(strategy, x, w, a) is None:
        return strategy, config
    if instead not in TAKES[form]:  # with few ranks A costs less in the same pass
        instead = "one_pass" if padded(a.shape[1]) == MIN_DOT else "split"
    return instead, None
