"""What every shipped kernel configuration compiles to, without a GPU.

    python -m benchmarks.compile_report --arch sm_80,sm_90,sm_100 [--json FILE]

For each kernel form x configuration that `choose_config` can return: registers, stack (spills),
shared memory and tensor-core instructions, read from the compiled cubin. Exits with 1 if one
spills, does not fit, or lost its tensor-core instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_lora.kernels.configs import MAX_GROUP, Kind, TileConfig, padded, ship
from fused_lora.kernels.device import SHARED_MEMORY, DeviceInfo
from fused_lora.kernels.gemm import GROUP_M, lora_gemm_kernel
from fused_lora.kernels.grads import lora_grad_kernel
from fused_lora.kernels.group import lora_group_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# One rank for each width of tile that a rank is padded to within its kind.
RANKS: dict[Kind, tuple[int, ...]] = {
    "one_pass": (16, 32, 64),
    "second": (16, 64),
    "plain": (16, 64),
    "grad": (16, 32, 64),
    "group": (16, 64),
}
# Warp-group products on Hopper, tcgen05 on Blackwell, warp products elsewhere and in small tiles.
TENSOR_CORE = re.compile(r"\b(HGMMA|UTCHMMA|HMMA)\b")


@dataclass(frozen=True)
class Case:
    """One compilation."""

    arch: int
    kind: Kind
    dtype: str
    adapter_dtype: str
    r: int
    dropout: bool
    transposed: bool  # W0 as dx reads it: the other dimension is contiguous
    dora: bool  # with the column scale in the epilogue
    config: TileConfig

    def __str__(self) -> str:
        c = self.config
        flags = "+dropout" * self.dropout + "+transposed" * self.transposed + "+dora" * self.dora
        tile = f"{c.BLOCK_M}x{c.BLOCK_N}x{c.BLOCK_K}w{c.num_warps}s{c.num_stages}"
        dtypes = f"{self.dtype}/{self.adapter_dtype}"
        return f"sm_{self.arch} {self.kind}{flags} {dtypes} r{self.r} {tile}"


@dataclass(frozen=True)
class Resources:
    """What the compiled kernel takes and whether that is acceptable."""

    registers: int
    stack: int  # bytes a thread: anything but 0 is a spill
    shared: int  # bytes a block
    tensor_core: dict[str, int]
    problem: str  # empty if there is none


def cases(archs: list[int], dtypes: list[str]) -> Iterator[Case]:
    """Every kernel form x configuration that ships, for each architecture."""
    for arch in archs:
        device = DeviceInfo(capability=arch, num_sms=132, shared_memory=SHARED_MEMORY[arch])
        for dtype in dtypes:
            itemsize = 4 if dtype == "fp32" else 2
            for kind, ranks in RANKS.items():
                for r, dropout in product(ranks, (False, True)):
                    for adapter, transposed, dora in _operands(kind, dtype, r, dropout):
                        for config in ship(kind, r, itemsize, dropout, device, dora):
                            yield Case(
                                arch, kind, dtype, adapter, r, dropout, transposed, dora, config
                            )


def _operands(kind: Kind, dtype: str, r: int, dropout: bool) -> list[tuple[str, bool, bool]]:
    """Adapter dtype, layout of W0, DoRA. fp32 adapters take the most; x's own dtype is sampled."""
    if kind == "grad":
        return [(dtype, False, False)]  # reads neither
    if kind == "group":
        return [("fp32", True, False)] + [(dtype, True, False)] * (r == 16 and dtype != "fp32")
    operands = [("fp32", False, False)]
    if kind != "plain":
        operands += [("fp32", True, False)]  # dx, which never has DoRA
        operands += [("fp32", False, True)] * (not dropout)
    return operands + [(dtype, False, False)] * (r == 16 and dtype != "fp32")


def _group_source(case: Case) -> ASTSource:
    """dx of as many members as a launch takes; their operands are tuples."""
    x, adapter = f"*{case.dtype}", f"*{case.adapter_dtype}"
    constants: dict[str, object] = {k: v for k, v in case.config.meta().items() if k.isupper()}
    constants |= {"GROUP_M": GROUP_M, "EVEN_K": True, "PRECISION": "ieee"}
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

    for index, name in enumerate(lora_group_kernel.arg_names):
        signature[name] = describe(name, (index,), values[name])
    return ASTSource(lora_group_kernel, signature, constexprs, attrs)


def _source(case: Case) -> ASTSource:
    if case.kind == "group":
        return _group_source(case)
    x, adapter = f"*{case.dtype}", f"*{case.adapter_dtype}"
    constexprs: dict[str, object] = {k: v for k, v in case.config.meta().items() if k.isupper()}
    # None (no such operand) and 1 (contiguous) are specialised by the launcher: constants here.
    if case.kind == "grad":
        kernel = lora_grad_kernel
        pointers = {"q_ptr": x, "l_ptr": x, "out_ptr": "*fp32"}
        if case.dropout:
            pointers["seed_ptr"] = "*i64"
        constexprs |= {"stride_qc": 1, "stride_or": 1, "EVEN_K": True, "PRECISION": "ieee"}
        floats = {"scale"}
    else:
        kernel = lora_gemm_kernel
        pointers = {"x_ptr": x, "w_ptr": adapter if case.kind == "plain" else x, "y_ptr": x}
        constexprs |= {"stride_xk": 1, "GROUP_M": GROUP_M, "EVEN_K": True, "PRECISION": "ieee"}
        constexprs["stride_wn" if case.transposed else "stride_wk"] = 1
        constexprs["BLOCK_R"] = padded(case.r)
        if case.kind != "plain":
            pointers |= {"h_ptr": x, "b_ptr": adapter, "bias_ptr": x}
            constexprs |= {"stride_bias": 1}
            constexprs["stride_bn" if case.transposed else "stride_br"] = 1
        if case.kind == "one_pass":
            pointers["a_ptr"] = adapter
            constexprs["stride_ar" if case.transposed else "stride_ak"] = 1
        elif case.kind == "second":
            constexprs["BLOCK_R"] = min(padded(case.r), case.config.BLOCK_K)
        if case.dropout:
            pointers["seed_ptr"] = "*i64"
        if case.dora:
            pointers |= {"col_scale_ptr": "*fp32", "z_ptr": x}
        floats = {"scale"}
    return specialised(kernel, pointers, constexprs, floats)


def specialised(
    kernel: Any, pointers: dict[str, str], constexprs: dict[str, object], floats: set[str]
) -> ASTSource:
    """A kernel as its launcher specialises it: everything aligned, absent pointers constants."""
    names = kernel.arg_names
    signature, attrs = {}, {}
    for index, name in enumerate(names):
        if name.endswith("_ptr") and name not in pointers:
            constexprs[name] = None
        if name in constexprs:
            signature[name] = "constexpr"
        else:
            signature[name] = pointers.get(name, "fp32" if name in floats else "i32")
            if name not in floats | {"threshold"}:
                attrs[(index,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in constexprs.items()}
    return ASTSource(kernel, signature, constants, attrs)


def resources(case: Case) -> Resources:
    """Compiles one case for its architecture and reads the cubin."""
    config = case.config
    compiled = triton.compile(
        _source(case),
        target=GPUTarget("cuda", case.arch, 32),
        options={k: v for k, v in config.meta().items() if not k.isupper()},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("--dump-resource-usage", cubin.name)
        sass = _cuobjdump("--dump-sass", cubin.name)
    registers, stack = (int(re.findall(rf"{key}:(\d+)", usage)[0]) for key in ("REG", "STACK"))
    found = TENSOR_CORE.findall(sass)
    tensor_core = {name: found.count(name) for name in sorted(set(found))}
    shared = compiled.metadata.shared
    return Resources(
        registers, stack, shared, tensor_core, _problem(case, stack, shared, tensor_core)
    )


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run(
        [str(CUOBJDUMP), option, path], check=True, capture_output=True, text=True
    ).stdout


def _problem(case: Case, stack: int, shared: int, tensor_core: dict[str, int]) -> str:
    if stack:
        return f"spills: {stack} bytes of stack a thread"
    if shared > SHARED_MEMORY[case.arch]:
        return f"needs {shared} bytes of shared memory, {SHARED_MEMORY[case.arch]} are there"
    if case.dtype == "fp32":
        return ""  # fp32 without tf32 has no tensor-core product
    if case.arch == 90 and case.config.BLOCK_M >= 64 and "HGMMA" not in tensor_core:
        return "no HGMMA"
    return "" if tensor_core else "no tensor-core instruction"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_80,sm_90,sm_100", help="e.g. sm_80,sm_90")
    parser.add_argument("--dtype", default="bf16,fp32", help="of bf16, fp16, fp32")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    archs = [int(arch.removeprefix("sm_")) for arch in args.arch.split(",")]
    unknown = sorted(set(archs) - set(SHARED_MEMORY))
    if unknown:
        parser.error(f"--arch: got {unknown}, wanted some of {sorted(SHARED_MEMORY)}")
    todo = list(cases(archs, args.dtype.split(",")))
    rows = []
    with ProcessPoolExecutor() as pool:
        for case, found in zip(todo, pool.map(resources, todo, chunksize=4), strict=True):
            rows.append({"case": str(case), **asdict(case), **asdict(found)})
            cores = " ".join(f"{n} {name}" for name, n in found.tensor_core.items())
            print(
                f"{case!s:72} {found.registers:4} regs {found.stack:4} stack "
                f"{found.shared:7} shared  {cores}  {found.problem}",
                flush=True,
            )
    bad = [row for row in rows if row["problem"]]
    print(f"{len(rows)} kernels compiled with triton {triton.__version__}, {len(bad)} rejected")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
