"""What every shipped kernel configuration compiles to, without a GPU.

    python -m benchmarks.compile_report --arch sm_80,sm_89,sm_90,sm_100 [--heaviest] [--json FILE]

For each kernel form x configuration that the model or a tuned table can choose: registers, stack,
spills, shared memory, occupancy and tensor-core and copy-engine instructions, read from the
compiled cubin; and for a layer of M, N, K = 8192, 4096, 4096 (a skinny kernel: M as it takes) the
operations, the fewest bytes, and the time that they take on the measured ceilings of an H100 and an
H200. Exits with 1 if one spills (see `spills`), does not fit, or lost its tensor-core instructions.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_lora.dispatch import CEILINGS, gluon_problem
from fused_lora.kernels import expand, gemm, grads, group, multi, persistent, pieces, skinny
from fused_lora.kernels.configs import (
    MAX_GROUP,
    MAX_SPLIT_K,
    Kind,
    TileConfig,
    is_specialized,
    is_tma,
    padded,
    tunable,
)
from fused_lora.kernels.device import SHARED_MEMORY, DeviceInfo

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
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
    "multi_grad": (16, 32, 64),
    "tma_one_pass": (16, 64),
    "tma_second": (16, 64, 128),
    "tma_produced": (16, 64, 128),
    "ws_second": (16, 64),
    "ws_produced": (16, 64),
    "ws_group": (16,),
}
# The kinds whose kernels come in a form for many adapters, and those that have no other. That of
# "quantized" is the base product alone.
MULTI: dict[Kind, tuple[bool, ...]] = {
    "second": (False, True),
    "quantized": (False, True),
    "plain": (False, True),
    "expand": (False, True),
    "multi_grad": (True,),
}
# Of each format of a quantised W0: its codes, its tables, and its blocks. NF4 is doubly quantised.
CODES: dict[str, tuple[str, tuple[str | None, ...], tuple[int, int]]] = {
    "nf4": ("*u8", ("*u8", "*fp32", "*fp32", "*fp32", "*fp32"), (1, 64)),
    "int8": ("*i8", ("*fp32", None, None, None, None), (1, 0)),
    "fp8": ("*fp8e4nv", ("*fp32", None, None, None, None), (128, 128)),
    "fp8 rows": ("*fp8e4nv", ("*fp32", None, None, None, None), (1, 0)),
}
FP8_ARCH = 89  # from there on there is the type, and a product in it
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?) ?;", re.MULTILINE)  # address, instruction
BRANCH = re.compile(r"\bBRA\b.*(0x[0-9a-f]+)")
# Warp-group products on Hopper, tcgen05 on Blackwell, warp products elsewhere and in small tiles,
# in 16 bits (H) and fp8 (Q); loads and stores by the copy engine; registers handed to other warps.
INSTRUCTION = re.compile(r"\b(HGMMA|QGMMA|UTCHMMA|UTCQMMA|HMMA|QMMA|UTMALDG|UTMASTG|USETMAXREG)\b")
TENSOR_CORE = {"HGMMA", "UTCHMMA", "HMMA"}
FP8_TENSOR_CORE = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA"}
LAYER = (8192, 4096, 4096)  # M, N, K
REGISTERS_PER_SM, THREADS_PER_SM = 65_536, 2_048
# Blocks by shared memory: what a multiprocessor has beyond one block's limit is 1 KB, which each
# block takes for itself.
RESERVED_SHARED = 1_024
ASIDE = 16  # bytes of stack that a kernel may have, if it is not in loops that it is used


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
    multi: bool = False  # many adapters: rows through `order`, adapters through a table
    codes: str = ""  # of a quantised W0

    def __str__(self) -> str:
        c = self.config
        flags = "+sum" * self.sums + "+dropout" * self.dropout + "+transposed" * self.transposed
        flags += "+dora" * self.dora + "+multi" * self.multi
        tile = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}w{c.num_warps}s{c.num_stages}"
        if c.SUBTILES:
            tile += f"/{c.SUBTILES}" + "+coop" * bool(c.COOPERATIVE)
            tile += f"+lead{c.LEAD}" * bool(c.LEAD) + "+halves" * bool(c.HALVES)
        dtypes = f"{self.dtype}/{self.adapter_dtype}"
        kind = f"{self.kind} {self.codes}".strip()
        return f"sm_{self.arch} {kind}{flags} {dtypes} r{self.r} {tile}"


@dataclass(frozen=True)
class Resources:
    """What the compiled kernel takes and whether that is acceptable."""

    registers: int
    stack: int  # bytes a thread
    spills: int  # instructions in loops that store to it or load from it
    shared: int  # bytes a block
    occupancy: int  # blocks that a multiprocessor holds at a time
    instructions: dict[str, int]
    problem: str  # empty if there is none


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
                    forms = MULTI.get(kind, (False,))
                    if dora or (kind == "quantized" and dropout):
                        forms = (False,)
                    which = [(c, False, many) for c in tiles for many in forms]
                    which += [(c, True, False) for c in summed]
                    for (config, sums, many), codes in product(which, _codes(kind)):
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
                            many,
                            codes,
                        )


def _codes(kind: Kind) -> tuple[str, ...]:
    if kind == "fp8":
        return ("fp8", "fp8 rows")
    return ("nf4", "int8", "fp8") if kind == "quantized" else ("",)


def heaviest(todo: list[Case]) -> list[Case]:
    """One case of each tile, and with DoRA, and with many adapters: those that take the most.

    They have fp32 adapters, the largest rank, and W0 as dx reads it. A third of all: what
    the tests have the time for.
    """
    ordered = sorted(todo, key=lambda c: (c.adapter_dtype == "fp32", c.r, c.transposed))
    tiles = {
        (c.arch, c.kind, c.codes, c.dtype, c.config, c.dropout, c.dora, c.sums, c.multi): c
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
    if kind == "group":
        return [("fp32", True, False)] + [(dtype, True, False)] * sampled
    operands = [("fp32", False, False)]
    if kind != "plain":
        operands += [("fp32", True, False)]  # dx, which never has DoRA
    if kind in ("one_pass", "second", "quantized") and not dropout:
        operands += [("fp32", False, True)]
    return operands + [(dtype, False, False)] * sampled


def _group_source(case: Case) -> ASTSource:
    """dx of as many members as a launch takes; their operands are tuples."""
    x, adapter = f"*{case.dtype}", f"*{case.adapter_dtype}"
    constants: dict[str, object] = {k: v for k, v in case.config.meta().items() if k.isupper()}
    constants |= {"GROUP_M": gemm.GROUP_M, "EVEN_K": True, "PRECISION": "ieee"}
    constants["BLOCK_R"] = min(padded(case.r), case.config.BLOCK_K)
    contiguous = ("i32", 1)  # the strides of a row-major matrix
    types = {
        "x_ptrs": x,
        "w_ptrs": x,
        "h_ptrs": x,
        "b_ptrs": adapter,
        "seed_ptrs": "*i64" if case.dropout else None,
        "Ks": "i32",
        "Rs": "i32",
        "strides_x": contiguous,
        "strides_w": contiguous,
        "strides_b": contiguous,
        "scales": "fp32",
        "thresholds": "i32",
    }
    flat = {"y_ptr": x, "M": "i32", "N": "i32", "stride_hm": "i32"}
    values = flat | {name: (kind,) * MAX_GROUP for name, kind in types.items()} | constants
    signature, constexprs, attrs = {}, {}, {}

    def describe(name: str, path: tuple[int, ...], value: object) -> object:
        if isinstance(value, tuple):
            return tuple(describe(name, (*path, i), v) for i, v in enumerate(value))
        if name in constants or not isinstance(value, str):
            constexprs[path] = value
            return "constexpr"
        if name not in ("scales", "thresholds", "seed_ptrs"):
            attrs[path] = [["tt.divisibility", 16]]
        return value

    for index, name in enumerate(group.lora_group_kernel.arg_names):
        signature[name] = describe(name, (index,), values[name])
    return ASTSource(group.lora_group_kernel, signature, constexprs, attrs)


def _gemm_source(case: Case) -> tuple[Any, dict[str, Any], dict[str, object]]:
    """The kernel, its pointers and its constants, beside the tile's."""
    x, adapter = f"*{case.dtype}", f"*{case.adapter_dtype}"
    pointers: dict[str, Any] = {
        "x_ptr": x,
        "w_ptr": adapter if case.kind == "plain" else x,
        "y_ptr": x,
    }
    constants: dict[str, object] = {"stride_xk": 1, "GROUP_M": gemm.GROUP_M, "EVEN_K": True}
    constants["stride_wn" if case.transposed else "stride_wk"] = 1
    constants["BLOCK_R"] = padded(case.r)
    base_alone = case.kind == "quantized" and case.multi  # h B is added by another kernel
    if base_alone:
        pointers["bias_ptr"], constants["stride_bias"] = x, 1
    elif case.kind != "plain":
        pointers |= {"h_ptr": x, "b_ptr": adapter, "bias_ptr": x}
        constants["stride_bias"] = 1
        constants["stride_bn" if case.transposed else "stride_br"] = 1
    if case.kind == "one_pass":
        pointers["a_ptr"] = adapter
        constants["stride_ar" if case.transposed else "stride_ak"] = 1
    elif case.kind != "plain":
        constants["BLOCK_R"] = min(padded(case.r), case.config.BLOCK_K)
    if case.dropout:
        pointers["seed_ptr"] = "*i64"
    if case.multi and not base_alone:
        pointers |= MULTI_POINTERS
        constants |= {"USE_A": case.transposed, "ALIGNED": True, "RANK_DIVISOR": 16}
        constants["BLOCK_R"] = min(padded(case.r), case.config.BLOCK_K, pieces.MAX_BLOCK_R)
    if case.dora:
        pointers |= {"col_scale_ptr": "*fp32", "z_ptr": x}
    constants |= {"w_tables": None, "W_LAYOUT": None}
    if case.codes:
        pointers["w_ptr"], pointers["w_tables"], block = CODES[case.codes]
        del constants["w_tables"]
        constants |= {"stride_wk": 0, "stride_wn": 0}
        constants["W_LAYOUT"] = (*block, not case.transposed)  # the forward reads W0^T
        if case.arch < FP8_ARCH and pointers["w_ptr"] == "*fp8e4nv":
            pointers["w_ptr"] = "*u8"
    if case.kind == "fp8":
        pointers["x_scale_ptr"] = "*fp32"
        pointers["x_ptr"] = "*fp8e4nv" if case.arch >= FP8_ARCH else "*fp16"
    return gemm.lora_gemm_kernel, pointers, constants


def _grad_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    x = f"*{case.dtype}"
    if case.sums:
        names = ("partial_ptr", "partial2_ptr", "out_ptr", "out2_ptr")
        constants: dict[str, object] = {"BLOCK": grads.REDUCE_BLOCK}
        return grads.sum_partials_kernel, dict.fromkeys(names, "*fp32"), constants
    pointers = dict.fromkeys(("q_ptr", "l_ptr", "q2_ptr", "l2_ptr"), x)
    pointers |= {"out_ptr": "*fp32", "out2_ptr": "*fp32"}
    if case.dropout:
        pointers["seed_ptr"] = "*i64"
    constants = {"stride_qc": 1, "stride_or": 1, "stride_q2c": 1, "stride_o2r": 1, "EVEN_K": True}
    return grads.lora_grad_kernel, pointers, constants


def _skinny_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    x, adapter = f"*{case.dtype}", f"*{case.adapter_dtype}"
    pointers = {"partial_ptr": "*fp32"}
    if case.dropout and case.transposed == case.sums:  # on x in the parts, or on y in the sum
        pointers["seed_ptr"] = "*i64"
    if case.sums:
        pointers |= {"bias_ptr": x, "h_ptr": x, "b_ptr": adapter, "y_ptr": x}
        constants: dict[str, object] = {"stride_bias": 1, "CHUNK_R": padded(case.r)}
        constants["SPLIT_K"] = MAX_SPLIT_K
        constants |= {"BLOCK_M": case.config.BLOCK_M, "BLOCK_N": skinny.SUM_BLOCK_N}
        constants["stride_bn" if case.transposed else "stride_br"] = 1
        return skinny.skinny_sum_kernel, pointers, constants
    pointers |= {"x_ptr": x, "w_ptr": x, "a_ptr": adapter}
    constants = {"stride_xk": 1, "EVEN_K": True}
    constants["stride_wn" if case.transposed else "stride_wk"] = 1
    constants["stride_ar" if case.transposed else "stride_ak"] = 1
    return skinny.skinny_partial_kernel, pointers, constants


def _expand_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    x = f"*{case.dtype}"
    pointers = {"y_ptr": x, "h_ptr": x, "b_ptr": f"*{case.adapter_dtype}"}
    if case.dropout:
        pointers["seed_ptr"] = "*i64"
    constants: dict[str, object] = {"BLOCK_K": min(padded(case.r), case.config.BLOCK_K)}
    constants["stride_bn" if case.transposed else "stride_br"] = 1
    return expand.add_lora_kernel, pointers, constants


def _tma_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    config, forward = case.config, not case.transposed
    BLOCK_R, CHUNK_R = persistent.rank_blocks(case.r, case.dropout and case.transposed)

    def descriptor(dtype: str, rows: int, columns: int, transposed: bool = False) -> str:
        block = [columns, rows] if transposed else [rows, columns]
        return f"tensordesc<{dtype}{block}>"

    pointers = {
        "x_desc": descriptor(case.dtype, config.BLOCK_M, config.BLOCK_K),
        "w_desc": descriptor(case.dtype, config.BLOCK_K, config.BLOCK_N, forward),
        "y_desc": descriptor(case.dtype, config.BLOCK_M, config.BLOCK_N // (config.SUBTILES or 1)),
        "bias_ptr": f"*{case.dtype}",
        "h_ptr": f"*{case.dtype}",
        "b_ptr": f"*{case.adapter_dtype}",
    }
    if case.kind != "tma_second":
        pointers["a_desc"] = descriptor(case.adapter_dtype, config.BLOCK_K, BLOCK_R, forward)
    if case.kind == "tma_produced":
        pointers["sync_ptr"] = "*i32"
    if case.dropout:
        pointers["seed_ptr"] = "*i64"
    constants: dict[str, object] = {
        "stride_bias": 1,
        "stride_br" if forward else "stride_bn": 1,
        "BLOCK_R": BLOCK_R,
        "CHUNK_R": CHUNK_R,
        "ONE_CHUNK": case.r <= CHUNK_R,
        "W_TRANSPOSED": forward,
        "A_TRANSPOSED": forward,
        "DROP_X": forward,
    }
    return persistent.lora_persistent_kernel, pointers, constants


def _specialized_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    from triton.experimental.gluon import language as gl

    from fused_lora.kernels import specialized

    config, forward = case.config, not case.transposed
    dtype = gl.float16 if case.dtype == "fp16" else gl.bfloat16
    rows = config.BLOCK_M // 2 if config.COOPERATIVE else config.BLOCK_M
    BLOCK_N, BLOCK_K, SUBTILES = config.BLOCK_N, config.BLOCK_K, config.SUBTILES or 1
    width = BLOCK_N // 2 if config.HALVES else BLOCK_N

    def descriptor(rows: int, columns: int, transposed: bool = False) -> str:
        block = [columns, rows] if transposed else [rows, columns]
        layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
        return f"tensordesc<{case.dtype}{block},{layout!r}>"

    pointers = {
        "x_desc": descriptor(rows, BLOCK_K),
        "w_desc": descriptor(BLOCK_K, width, forward),
        "h_desc": descriptor(rows, BLOCK_K),
        "b_desc": descriptor(BLOCK_K, width, forward),
        "y_desc": descriptor(rows, BLOCK_N // SUBTILES),
        "bias_ptr": f"*{case.dtype}",
    }
    if case.kind == "ws_group":  # of as many members as a launch takes
        pointers |= {f"{name}{i}_desc": pointers[f"{name}_desc"] for name in "xw" for i in (2, 3)}
    if case.dora:
        pointers |= {"z_desc": pointers["y_desc"], "col_scale_ptr": "*fp32"}
    if case.kind == "ws_produced":
        pointers["a_desc"] = descriptor(BLOCK_K, BLOCK_K, forward)
        pointers |= {"h_ptr": f"*{case.dtype}", "sync_ptr": "*i32"}
    constants: dict[str, object] = {
        "stride_bias": 1,
        "DEPTH_R": min(padded(case.r), BLOCK_K),
        "STAGES": config.num_stages,
        "HALVES": bool(config.HALVES),
        "W_TRANSPOSED": forward,
    }
    return specialized.lora_specialized_kernel, pointers, constants


_UNSPECIALISED = ("scale", "keep_scale", "threshold", "halved")


MULTI_POINTERS = {
    "order_ptr": "*i32",
    "pieces_ptr": "*i32",
    "tile_first_ptr": "*i32",
    "table_ptr": "*i64",
    "scalings_ptr": "*fp32",
}


def _multi_source(case: Case) -> tuple[Any, dict[str, str], dict[str, object]]:
    x = f"*{case.dtype}"
    pointers = MULTI_POINTERS | {"w_ptr": f"*{case.adapter_dtype}"}
    if case.dropout:
        pointers["seed_ptr"] = "*i64"
    constants: dict[str, object] = {"USE_A": not case.transposed}
    if case.kind == "multi_grad":
        pointers |= {"q_ptr": x, "l_ptr": x, "out_ptr": "*fp32"}
        return multi.multi_grad_kernel, pointers, constants | {"stride_qc": 1}
    constants |= {"ALIGNED": True, "RANK_DIVISOR": 16}
    if case.kind == "plain":
        pointers |= {"x_ptr": x, "h_ptr": "*fp32"}
        return multi.shrink_kernel, pointers, constants | {"stride_xk": 1, "EVEN_K": True}
    pointers |= {"h_ptr": "*fp32", "y_ptr": x, "h_sum_ptr": x}
    constants["BLOCK_K"] = min(padded(case.r), case.config.BLOCK_K)
    return multi.expand_kernel, pointers, constants


def source(case: Case) -> ASTSource:
    """The case's kernel with contiguous rows, as the launcher specialises it."""
    if case.kind == "group":
        return _group_source(case)
    if is_tma(case.kind):
        build = _tma_source
    elif is_specialized(case.kind):
        build = _specialized_source
    elif case.multi and case.kind not in ("second", "quantized"):
        build = _multi_source
    else:
        special = {"grad": _grad_source, "skinny": _skinny_source, "expand": _expand_source}
        build = special.get(case.kind, _gemm_source)
    kernel, pointers, constants = build(case)
    names = kernel.arg_names
    tile: dict[str, object] = {k: v for k, v in case.config.meta().items() if k in names}
    if "PRECISION" in names:
        tile["PRECISION"] = "ieee"
    return specialised(kernel, pointers, {**tile, **constants})


def specialised(kernel: Any, pointers: dict[str, Any], constants: dict[str, object]) -> ASTSource:
    """A kernel as the launcher specialises it: everything aligned, absent pointers constants."""
    names = kernel.arg_names
    constants = dict(constants)
    signature: dict[str, object] = {}
    attrs: dict[tuple[int, ...], object] = {}
    indexed: dict[tuple[int, ...], object] = {}
    for index, name in enumerate(names):
        # None (no such operand) and 1 (contiguous) are specialised by the launcher: constants here.
        if name.endswith(("_ptr", "_desc")) and name not in pointers:
            constants[name] = None
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = pointers.get(name, "fp32" if name.endswith("scale") else "i32")
        if isinstance(kind, tuple):  # of pointers, some of them absent
            signature[name] = tuple(part or "constexpr" for part in kind)
            indexed |= {(index, i): None for i, part in enumerate(kind) if part is None}
            attrs |= {(index, i): [["tt.divisibility", 16]] for i, p in enumerate(kind) if p}
            continue
        signature[name] = kind
        if name not in _UNSPECIALISED and not name.endswith("_desc"):
            attrs[(index,)] = [["tt.divisibility", 16]]
    indexed |= {(names.index(name),): value for name, value in constants.items()}
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(kernel, signature, indexed, attrs)
    return ASTSource(kernel, signature, indexed, attrs)


def compiled(case: Case) -> Any:
    """The case's kernel, compiled for its architecture."""
    options = {k: v for k, v in case.config.meta().items() if not k.isupper()}
    if case.sums:
        options["num_warps"] = 4
    if is_specialized(case.kind):
        from fused_lora.kernels.specialized import MAX_REGISTERS

        options["maxnreg"] = MAX_REGISTERS
    return triton.compile(source(case), target=GPUTarget("cuda", case.arch, 32), options=options)


def disassembled(kernel: Any) -> tuple[str, str]:
    """A compiled kernel's resources and its machine code, as cuobjdump writes them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("--dump-resource-usage", cubin.name)
        return usage, _cuobjdump("--dump-sass", cubin.name)


def used(usage: str, what: str) -> int:
    """REG or STACK of a kernel's resources."""
    return int(re.findall(rf"{what}:(\d+)", usage)[0])


def resources(case: Case) -> Resources:
    """Compiles one case for its architecture and reads the cubin."""
    kernel = compiled(case)
    usage, sass = disassembled(kernel)
    registers, stack = used(usage, "REG"), used(usage, "STACK")
    found = INSTRUCTION.findall(sass)
    instructions = {name: found.count(name) for name in sorted(set(found))}
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    occupancy = min(
        # A warp's registers are handed out by 256.
        REGISTERS_PER_SM // (warps * -(-registers * 32 // 256) * 256),
        (SHARED_MEMORY[case.arch] + RESERVED_SHARED) // (shared + RESERVED_SHARED),
        THREADS_PER_SM // (32 * warps),
    )
    spilled = spills(sass)
    problem = _problem(case, stack, spilled, shared, occupancy, instructions)
    return Resources(registers, stack, spilled, shared, occupancy, instructions, problem)


def spills(sass: str) -> int:
    """Instructions in loops that store to the stack or load from it.

    Outside of loops ptxas puts up to four words aside by its own choice, to have registers for
    another block: at 40 of 255, for two stores and two loads a thread, and no two versions in the
    same kernels. So an instruction counts if it can come to be executed again.
    """
    code = [(int(address, 16), text) for address, text in LINE.findall(sass)]
    after: dict[int, list[int]] = {}
    for i, (address, text) in enumerate(code):
        ends = re.match(r"(BRA|EXIT|RET|BRX)\b", text)  # without a predicate
        after[address] = [] if ends or i + 1 == len(code) else [code[i + 1][0]]
        if branch := BRANCH.search(text):
            after[address].append(int(branch[1], 16))

    def comes_again(start: int) -> bool:
        seen: set[int] = set()
        todo = [*after[start]]
        while todo:
            address = todo.pop()
            if address not in seen:
                seen.add(address)
                todo += after[address]
        return start in seen

    return sum(comes_again(address) for address, text in code if re.search(r"\b(STL|LDL)\b", text))


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run(
        [str(CUOBJDUMP), option, path], check=True, capture_output=True, text=True
    ).stdout


def _problem(
    case: Case,
    stack: int,
    spilled: int,
    shared: int,
    occupancy: int,
    instructions: dict[str, int],
) -> str:
    if spilled or stack > ASIDE:
        return f"spills: {stack} bytes of stack a thread, {spilled} instructions on it in loops"
    if shared > SHARED_MEMORY[case.arch]:
        return f"needs {shared} bytes of shared memory, {SHARED_MEMORY[case.arch]} are there"
    if occupancy < case.config.programs_per_sm:
        return f"{occupancy} blocks a multiprocessor, {case.config.programs_per_sm} are launched"
    by_hand = is_specialized(case.kind)
    if (is_tma(case.kind) or by_hand) and not {"UTMALDG", "UTMASTG"} <= set(instructions):
        return "no UTMALDG or no UTMASTG"
    if by_hand and "USETMAXREG" not in instructions:
        return "no USETMAXREG: registers are the same for warps that load and that multiply"
    if case.dtype == "fp32" or (case.sums and case.kind == "grad"):
        return ""  # fp32 without tf32 has no tensor-core product, nor has a sum
    large = case.config.BLOCK_M >= 64  # from Hopper on Triton multiplies smaller fp8 tiles in fp16
    if case.kind == "fp8" and case.arch in FP8_TENSOR_CORE and (large or case.arch == FP8_ARCH):
        wanted = FP8_TENSOR_CORE[case.arch]
        return "" if wanted in instructions else f"no {wanted}"
    if case.arch == 90 and large and case.kind != "skinny":
        return "" if "HGMMA" in instructions else "no HGMMA"
    return "" if TENSOR_CORE & set(instructions) else "no tensor-core instruction"


def work(case: Case) -> tuple[int, int]:
    """Operations of a launch on LAYER, and its fewest bytes: each operand read or written once."""
    (M, N, K), r = LAYER, case.r
    size = 4 if case.dtype == "fp32" else 2
    adapter_size = 4 if case.adapter_dtype == "fp32" else 2
    if case.kind == "skinny":
        M = case.config.BLOCK_M
    x, w, y, h = size * M * K, size * N * K, size * M * N, size * M * r
    a, b = adapter_size * K * r, adapter_size * N * r
    part = 4 * M * (N + r)  # of one range of K
    if case.kind == "grad":
        grad = 4 * r * (K + N)
        return (0, 2 * grad) if case.sums else (2 * M * r * (K + N), x + y + 2 * h + grad)
    if case.kind == "skinny":
        if case.sums:
            return 2 * M * r * N, part + b + h + y
        return 2 * M * K * (N + r), x + w + a + part
    if case.kind == "plain":
        return 2 * M * K * r, x + a + h
    if case.kind == "expand":
        return 2 * M * r * N, (4 * M * r if case.multi else h) + b + 2 * y
    if case.kind == "multi_grad":  # one of the two
        return 2 * M * r * K, x + h + 4 * r * K
    if case.kind == "fp8":  # x in codes, as W0 is
        return 2 * M * N * (K + r), M * K + N * K + h + b + y
    if case.kind in ("second", "tma_second", "ws_second"):
        return 2 * M * N * (K + r), x + w + h + b + y
    return 2 * M * (N * K + r * K + r * N), x + w + a + b + h + y


def predicted(case: Case) -> dict[str, float]:
    """Microseconds of a launch on LAYER on each GPU's measured ceilings; fp32 has none."""
    if case.dtype == "fp32":
        return {}
    operations, moved = work(case)
    if case.kind == "fp8":  # at twice the rate of the measured ceilings, which are bf16's
        operations //= 2
    return {
        gpu: round(1e6 * max(operations / flops, moved / bandwidth), 2)
        for gpu, (flops, bandwidth) in CEILINGS.items()
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_80,sm_89,sm_90,sm_100", help="e.g. sm_80,sm_90")
    parser.add_argument("--dtype", default="bf16,fp32", help="of bf16, fp16, fp32")
    parser.add_argument("--kind", default=",".join(RANKS), help=f"of {', '.join(RANKS)}")
    parser.add_argument(
        "--heaviest", action="store_true", help="of each tile the operands that take the most only"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="N cases by chance, of these")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    archs = [int(arch.removeprefix("sm_")) for arch in args.arch.split(",")]
    unknown = sorted(set(archs) - set(SHARED_MEMORY))
    if unknown:
        parser.error(f"--arch: got {unknown}, wanted some of {sorted(SHARED_MEMORY)}")
    kinds = args.kind.split(",")
    todo = [case for case in cases(archs, args.dtype.split(",")) if case.kind in kinds]
    todo = heaviest(todo) if args.heaviest else todo
    todo = random.sample(todo, min(args.sample, len(todo))) if args.sample else todo
    rows = []
    with ProcessPoolExecutor() as pool:
        for case, found in zip(todo, pool.map(resources, todo, chunksize=4), strict=True):
            times = predicted(case)
            operations, moved = work(case)
            rows.append(
                {
                    "case": str(case),
                    **asdict(case),
                    **asdict(found),
                    "flops": operations,
                    "bytes": moved,
                    "predicted_us": times,
                }
            )
            counted = " ".join(f"{n} {name}" for name, n in found.instructions.items())
            on_gpus = " ".join(f"{gpu} {time:.1f} us" for gpu, time in times.items())
            print(
                f"{case!s:76} {found.registers:3} regs {found.stack:3} stack {found.shared:6} "
                f"shared x{found.occupancy}  {counted}  {on_gpus}  {found.problem}",
                flush=True,
            )
    bad = [row for row in rows if row["problem"]]
    print(f"{len(rows)} kernels compiled with triton {triton.__version__}, {len(bad)} rejected")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
