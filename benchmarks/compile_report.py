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
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from fused_lora.cost_model import CEILINGS
from fused_lora.kernels.configs import MAX_GROUP
from fused_lora.kernels.device import SHARED_MEMORY
from fused_lora.kernels.tile_config import is_specialized, is_tma

from .cases import RANKS, Case, cases, heaviest
from .sources import FP8_ARCH, compiled

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
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
class Resources:
    """What the compiled kernel takes and whether that is acceptable."""

    registers: int
    stack: int  # bytes a thread
    spills: int  # instructions in loops that store to it or load from it
    shared: int  # bytes a block
    occupancy: int  # blocks that a multiprocessor holds at a time
    instructions: dict[str, int]
    problem: str  # empty if there is none


def resource_usage(kernel: Any) -> str:
    """A compiled kernel's resources, as cuobjdump writes them."""
    return _cuobjdump("--dump-resource-usage", kernel)


def disassembled(kernel: Any) -> tuple[str, str]:
    """Those and its machine code."""
    return resource_usage(kernel), _cuobjdump("--dump-sass", kernel)


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


def _cuobjdump(option: str, kernel: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [str(CUOBJDUMP), option, cubin.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
    if case.kind == "expand_group":
        return MAX_GROUP * 2 * M * r * N, MAX_GROUP * (h + b) + 2 * y
    if case.kind == "expand":
        return 2 * M * r * N, (4 * M * r if case.form == "multi" else h) + b + 2 * y
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


def sampled(todo: list[Case], size: int) -> list[Case]:
    """So many by chance: one of every form of a kernel before a second one of any."""
    seen: Counter[object] = Counter()

    def before(case: Case) -> int:
        form = case.arch, case.kind, case.form, case.codes, case.sums, case.dora
        seen[form] += 1
        return seen[form]

    return sorted(random.sample(todo, len(todo)), key=before)[:size]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", default="sm_80,sm_89,sm_90,sm_100", help="e.g. sm_80,sm_90")
    parser.add_argument("--dtype", default="bf16,fp32", help="of bf16, fp16, fp32")
    parser.add_argument("--kind", default=",".join(RANKS), help=f"of {', '.join(RANKS)}")
    parser.add_argument(
        "--heaviest", action="store_true", help="of each tile the operands that take the most only"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="N cases by chance, of many forms")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    args = parser.parse_args()
    archs = [int(arch.removeprefix("sm_")) for arch in args.arch.split(",")]
    unknown = sorted(set(archs) - set(SHARED_MEMORY))
    if unknown:
        parser.error(f"--arch: got {unknown}, wanted some of {sorted(SHARED_MEMORY)}")
    kinds = args.kind.split(",")
    todo = [case for case in cases(archs, args.dtype.split(",")) if case.kind in kinds]
    todo = heaviest(todo) if args.heaviest else todo
    todo = sampled(todo, args.sample) if args.sample else todo
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
