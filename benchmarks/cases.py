"""Every kernel form x configuration that the model or a tuned table can choose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from fused_lora.kernels.configs import tunable
from fused_lora.kernels.device import SHARED_MEMORY, DeviceInfo
from fused_lora.kernels.tile_config import Kind, TileConfig, is_specialized, is_tma
from fused_lora.strategies import gluon_problem

# One rank for each width of tile that a rank is padded to within its kind.
RANKS: dict[Kind, tuple[int, ...]] = {
    "one_pass": (16, 32, 64),
    "second": (16, 64),
    "quantized": (64,),
    "fp8": (64,),
    "plain": (16, 64),
    "grad": (16, 32, 64),
    "group": (16, 64),
    "skinny": (16,),
    "expand": (16, 64),
    "expand_group": (16, 64),
    "multi_grad": (16, 32, 64),
    "tma_one_pass": (16, 64),
    "tma_second": (16, 64, 128),
    "tma_produced": (16, 64, 128),
    "ws_second": (16, 64),
    "ws_produced": (16, 64),
    "ws_group": (16,),
}
# multi: many adapters, rows through `order`, adapters through a table. experts: in a stack, and a
# W0 for each.
Form = Literal["layer", "multi", "experts"]
# The kinds whose kernels come in other forms than a layer's, and those that have no such one. The
# second one of "quantized" is the base product alone.
FORMS: dict[Kind, tuple[Form, ...]] = {
    "second": ("layer", "multi", "experts"),
    "quantized": ("layer", "multi", "experts"),
    "plain": ("layer", "multi", "experts"),
    "expand": ("layer", "multi"),
    "multi_grad": ("multi", "experts"),
}


@dataclass(frozen=True)
class Case:
    """One compilation."""

    arch: int
    kind: Kind
    dtype: str
    adapter_dtype: str
    r: int
    dropout: bool
    transposed: bool  # W0 as the second direction reads it: the other dimension is contiguous
    dora: bool  # with the column scale in the epilogue
    config: TileConfig
    sums: bool = False  # the kernel that adds the parts of a split one
    form: Form = "layer"
    codes: str = ""  # of a quantised W0

    def __str__(self) -> str:
        c = self.config
        flags = "+sum" * self.sums + "+dropout" * self.dropout + "+transposed" * self.transposed
        flags += "+dora" * self.dora + f"+{self.form}" * (self.form != "layer")
        tile = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}w{c.num_warps}s{c.num_stages}"
        if c.SUBTILES:
            tile += f"/{c.SUBTILES}" + "+coop" * bool(c.COOPERATIVE)
            tile += f"+lead{c.LEAD}" * bool(c.LEAD) + "+halves" * bool(c.HALVES)
        dtypes = f"{self.dtype}/{self.adapter_dtype}"
        kind = f"{self.kind} {self.codes}".strip()
        return f"sm_{self.arch} {kind}{flags} {dtypes} r{self.r} {tile}"


def cases(archs: list[int], dtypes: list[str]) -> Iterator[Case]:
    """Every kernel form x configuration that ships, for each architecture."""
    for arch, dtype in product(archs, dtypes):
        device = DeviceInfo(capability=arch, num_sms=132, shared_memory=SHARED_MEMORY[arch])
        itemsize = 4 if dtype == "fp32" else 2
        for kind, ranks in RANKS.items():
            if is_specialized(kind) and gluon_problem():
                continue
            for r, dropout in product(ranks, (False, True)):
                for adapter_dtype, transposed, dora in _operands(kind, dtype, r, dropout):
                    # The persistent launches that make y mask it in the input gradient alone; the
                    # forward masks x, in the produced form.
                    if is_tma(kind) and dropout and not transposed and kind != "tma_produced":
                        continue
                    if kind == "expand_group" and not dropout:  # only what has masks is apart
                        continue
                    if kind == "quantized" and dropout and not transposed:
                        continue
                    if kind == "fp8" and (dropout or transposed):  # only the forward rounds x
                        continue
                    # Beyond one rank, the least and the most that such a kernel takes will do.
                    if kind in ("tma_second", "tma_produced") and r > 16 and dropout != transposed:
                        continue
                    masks = dropout and (transposed or not is_tma(kind))
                    tiles = tunable(kind, r, itemsize, masks, device, dora)
                    # GROUP_M changes the order of the tiles, not the code.
                    if is_tma(kind) or is_specialized(kind):
                        tiles = tuple(dict.fromkeys(replace(c, GROUP_M=8) for c in tiles))
                    summed = tiles if kind == "skinny" else ()
                    if kind == "grad" and not dropout and r == 16:
                        summed = tiles[:1]
                    forms = FORMS.get(kind, ("layer",))
                    if dora:
                        forms = ("layer",)
                    elif kind == "quantized" and dropout:
                        forms = ("layer", "experts")
                    which = [(c, False, form) for c in tiles for form in forms]
                    which += [(c, True, "layer") for c in summed]
                    for (config, sums, form), codes in product(which, _codes(kind)):
                        yield Case(
                            arch,
                            kind,
                            dtype,
                            adapter_dtype,
                            r,
                            dropout,
                            transposed,
                            dora,
                            config,
                            sums,
                            form,
                            codes,
                        )


def _codes(kind: Kind) -> tuple[str, ...]:
    if kind == "fp8":
        return ("fp8", "fp8 rows")
    return ("nf4", "int8", "fp8") if kind == "quantized" else ("",)


def heaviest(todo: list[Case]) -> list[Case]:
    """One case of each tile and form, and with DoRA: those that take the most.

    They have fp32 adapters, the largest rank, and W0 as dx reads it. A third of all: what
    the tests have the time for.
    """
    ordered = sorted(todo, key=lambda c: (c.adapter_dtype == "fp32", c.r, c.transposed))
    tiles = {
        (c.arch, c.kind, c.codes, c.dtype, c.config, c.dropout, c.dora, c.sums, c.form): c
        for c in ordered
    }
    return list(tiles.values())


def _operands(kind: Kind, dtype: str, r: int, dropout: bool) -> list[tuple[str, bool, bool]]:
    """Adapter dtype, layout of W0, DoRA. fp32 adapters take the most; x's own dtype is sampled."""
    if kind in ("grad", "multi_grad"):
        return [(dtype, False, False)]  # reads neither
    if is_specialized(kind):  # other dtypes are copied into it
        forward = [(dtype, False, False)] * (kind != "ws_group")
        return forward + [(dtype, True, False)] + [(dtype, False, True)] * (kind == "ws_second")
    sampled = r == 16 and dtype != "fp32" and not is_tma(kind) and kind != "skinny"
    if kind in ("group", "expand_group"):
        return [("fp32", True, False)] + [(dtype, True, False)] * sampled
    operands = [("fp32", False, False)]
    if kind != "plain":
        operands += [("fp32", True, False)]  # dx, which never has DoRA
    if kind in ("one_pass", "second", "quantized") and not dropout:
        operands += [("fp32", False, True)]
    return operands + [(dtype, False, False)] * sampled
