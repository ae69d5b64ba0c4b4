"""What the hand-scheduled kernel compiles to: order between threads, which the emulator has not.

An arrival at an mbarrier, a flag and a copy's start are one thread's doing. They stand for the
whole group only because Triton puts a barrier before them, and its rules for that have changed
between versions.
"""

import re

import pytest
from outside import run_outside

from benchmarks.compile_report import LINE

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

DUMP = """
import sys
from pathlib import Path
from benchmarks.cases import cases
from benchmarks.compile_report import disassembled
from benchmarks.sources import compiled
for case in cases([90], ["bf16"]):
    config = case.config
    one_of_each = {"ws_second": config.LEAD, "ws_produced": not config.LEAD}
    wanted = case.r == 16 and not case.dropout and case.transposed == config.COOPERATIVE
    if wanted and one_of_each.get(case.kind) or "all" in sys.argv:
        kernel = compiled(case)
        name = Path(sys.argv[1]) / str(case).replace("/", "-")
        Path(f"{name}.ptx").write_text(kernel.asm["ptx"])
        Path(f"{name}.sass").write_text(disassembled(kernel)[1])
"""
# What matters of the PTX, a letter each.
LETTERS = {
    "bar.sync": "B",
    "bar.warp.sync": "b",
    "wgmma.wait_group": "w",
    "mbarrier.arrive.expect_tx": "e",
    "mbarrier.arrive": "a",
    "mbarrier.try_wait": "t",
    "stmatrix": "s",
    "st.shared": "s",
    "st.global": "g",
    "fence.proxy.async.shared": "f",
    "fence.proxy.async.global;": "F",
    "cp.async.bulk.tensor.2d.shared": "L",
    "cp.async.bulk.tensor.2d.global": "S",
    "cp.async.bulk.commit": "c",
    "cp.async.bulk.wait_group.read": "r",
    "atom.global.gpu.release.exch": "P",
    "ld.global.gpu.acquire": "A",
}


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """PTX and SASS by case."""
    folder = tmp_path_factory.mktemp("code")
    run_outside("-c", DUMP, str(folder))
    return {
        f.stem: (f.read_text(), f.with_suffix(".sass").read_text()) for f in folder.glob("*.ptx")
    }


def _order(ptx):
    words = re.compile("|".join(re.escape(word) for word in LETTERS))
    return "".join(LETTERS[word] for word in words.findall(ptx))


def _instructions(sass):
    return [instruction for _, instruction in LINE.findall(sass)]


def test_all_threads_are_there_before_one_speaks_for_them(dumps):
    for case, (ptx, _) in dumps.items():
        order = _order(ptx)
        arrivals = order.count("a")
        assert arrivals >= 6, case
        assert len(re.findall("[Bb]a", order)) == arrivals, (case, order)


def test_a_store_by_the_copy_engine(dumps):
    """Its memory is free, for all threads, and what they stored is fenced, by each, before it."""
    for case, (ptx, _) in dumps.items():
        order = _order(ptx)
        stores = order.count("c")
        assert stores >= 2, case
        assert len(re.findall("rBs+fBS+c", order)) == stores, (case, order)


def test_h_is_published_and_read_across_proxies(dumps):
    produced = {case: ptx for case, (ptx, _) in dumps.items() if "produced" in case}
    assert len(produced) >= 2
    for case, ptx in produced.items():
        order = _order(ptx)
        assert len(re.findall("g+FB+P", order)) == order.count("P") == 2, (case, order)
        reads = 1 + ("halves" in case)  # whole tiles of y, and halves
        assert len(re.findall("Fb?tb?ebL", order)) == order.count("F") - 2 == reads, (case, order)
        assert "A" in order


def test_products_stay_in_flight(dumps):
    """Nothing touches an accumulator between a product and the wait for it, else ptxas waits."""
    for case, (_, sass) in dumps.items():
        flying, waits = set(), 0
        for instruction in _instructions(sass):
            if product := re.match(r"HGMMA\.64x(\d+)x16\S* R(\d+)", instruction):
                columns, first = map(int, product.groups())
                flying |= set(range(first, first + columns // 2))
            elif "WARPGROUP.DEPBAR.LE gsb0, 0x0" in instruction:
                flying, waits = set(), waits + 1
            else:
                touched = {int(r) for r in re.findall(r"(?<![U\w])R(\d+)", instruction)}
                assert not touched & flying, (case, instruction)
        tiles = 1 + ("halves" in case) + ("produced" in case)  # of y, halves of it, of h
        assert waits == 2 * tiles, case  # of both consumers


def test_the_loader_has_its_registers_and_the_consumers_theirs(dumps):
    from fused_lora.kernels.specialized import (
        CONSUMER_REGISTERS,
        CONSUMERS,
        LOADER_REGISTERS,
        MAX_REGISTERS,
    )

    few, many = LOADER_REGISTERS.value, CONSUMER_REGISTERS.value
    groups = CONSUMERS.value + 1
    assert CONSUMERS.value * many + few <= groups * MAX_REGISTERS <= 65_536 // 128
    for case, (_, sass) in dumps.items():
        limit, seen = MAX_REGISTERS, set()
        for instruction in _instructions(sass):
            if "USETMAXREG" in instruction:
                limit = int(instruction.split()[-1], 16)
                seen.add(limit)
            elif limit in (few, many):
                used = [int(r) for r in re.findall(r"(?<![U\w])R(\d+)", instruction)]
                assert max(used, default=0) < limit, (case, instruction)
        assert {few, many} <= seen, case
