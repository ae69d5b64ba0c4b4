"""What test_launch.py runs in a process of its own: what is compiled for odd operands, of a rank.

Rows that do not begin at multiples of 16 elements are loaded element by element, and what spills
then can be miscompiled where it multiplies by wgmma: on an H200, ptxas of Triton 3.6. So nothing of
the kind may spill. A stand-in for the GPU takes the launches.
"""

import itertools
import random
import sys

import torch
import triton.compiler
import triton.compiler.compiler as compiler
from triton.runtime import driver

from benchmarks import compile_report, launch_overhead
from fused_lora import quantize_int8
from fused_lora.kernels import configs, expand, experts, gemm, grads, group, multi, skinny
from fused_lora.kernels.device import SHARED_MEMORY, DeviceInfo
from fused_lora.kernels.dropout import Dropout
from fused_lora.kernels.rows import (
    AdapterStack,
    adapter_table,
    groups_of_indices,
    groups_of_runs,
)
from fused_lora.kernels.sizes import padded

HOPPER = DeviceInfo(capability=90, num_sms=132, shared_memory=SHARED_MEMORY[90])
M, N, K = 133, 261, 70
DROPOUT = Dropout(torch.zeros(1, dtype=torch.int64), 6554)
compiled = []
_compile = compiler.compile


def _kept(*args, **kwargs):
    kernel = _compile(*args, **kwargs)
    compiled.append(kernel)
    return kernel


def largest(kind, r, dropout=False):
    """The largest tile, since smaller ones have fewer elements a thread; each third time one more.

    By chance, of the next one and those on trial: all of them took two minutes more.
    """
    shipped = configs.ship(kind, r, 2, dropout, HOPPER)
    others = shipped[1:2] + configs.tunable(kind, r, 2, dropout, HOPPER)[len(shipped) :]
    more = others and random.random() < 1 / 3
    return shipped[:1] + ((random.choice(others),) if more else ())


def launch_all(r):
    """Forward and input gradient, gradients of the adapter: each with its largest tiles."""
    x, w, b = (torch.randn(s).bfloat16() for s in ((M, K), (K, N), (r, N)))
    a, h, g = (torch.randn(s).bfloat16() for s in ((K, r), (M, r), (M, N)))
    shifted = torch.randn(M * 64 + 4).bfloat16()[4:].view(M, 64)  # 8 bytes
    beside = torch.randn(M, r + 72).bfloat16()[:, :r]  # of a group's h
    apart = torch.randn(M, 2048).bfloat16()[:, ::16]
    aligned_x, aligned_w = torch.randn(M, 64).bfloat16(), torch.randn(64, 256).bfloat16()
    h_only = torch.randn(r, 256)
    for config in largest("one_pass", r):
        gemm.gemm_one_pass(config, x, w, a, b, bias=None, scale=1.0, store_h=True)
        aligned_a = torch.randn(64, padded(r))
        even_b = torch.randn(padded(r), 256)
        gemm.gemm_one_pass(
            config, shifted, aligned_w, aligned_a, even_b, bias=None, scale=1.0, store_h=True
        )
    for config in largest("second", r):
        gemm.gemm_add_lora(config, x, w, h, b)
        gemm.gemm_add_lora(config, aligned_x, aligned_w, h, h_only)  # the rank alone is odd
        gemm.gemm_add_lora(config, aligned_x, aligned_w, beside, h_only)
    for config in largest("second", r, True):
        gemm.gemm_add_lora(config, g, w.t(), h, a.t(), dropout=DROPOUT)
    for config, dropout in itertools.chain(
        ((c, None) for c in largest("plain", r)), ((c, DROPOUT) for c in largest("plain", r, True))
    ):
        gemm.gemm_scaled(config, x, a, scale=1.0, dropout=dropout)
    for dropout in (None, DROPOUT):
        kept = {"dtype_a": torch.float32, "dtype_b": torch.float32, "dropout": dropout}
        for config in largest("grad", r, bool(dropout)):
            grads.lora_grads(config, x, h, g, h, **kept)
            grads.lora_grads(config, apart, h, apart, h, **kept)
        for config in largest("expand", r, bool(dropout)):
            expand.add_lora(config, g.clone(), h, b, dropout=dropout)
        config = largest("group", r, bool(dropout))[0]
        ranks_alone = [aligned_x], [aligned_w], [h], [h_only], [dropout]
        group.gemm_group(config, *(2 * given for given in ranks_alone))
        group.gemm_group(config, [g, g], [w.t()] * 2, [h, h], [a.t()] * 2, [dropout] * 2)
    table, runs = adapter_table([a.t()] * 2, [b.t()] * 2, [1.0, 2.0]), ((0, 60), (1, M - 60))
    rows = groups_of_runs(runs, x.device)
    for config in largest("plain", r):
        multi.shrink(config, x, rows, table, use_A=True)
        multi.shrink(config, g, rows, table, use_A=False)
    config = largest("multi_grad", r)[0]
    multi.multi_grads(config, x, h, rows, table, use_A=True)
    multi.multi_grads(config, g, h, rows, table, use_A=False)
    config = configs.ship("skinny", r, 2, False, HOPPER)[-1]
    skinny.skinny(config, x[:64], w, a, b, bias=None, scale=1.0, dropout=None, drop_x=True)


def launch_experts(r):
    """y's rows alone are odd: of an odd N, and of one that is no multiple of 16."""
    x, rows = torch.randn(M, 64).bfloat16(), groups_of_indices(torch.arange(M) % 2, 2)
    given = {"h": torch.randn(M, r).bfloat16(), "order_x": rows.order, "order_y": rows.order}
    for odd, config in itertools.product((N, 264), largest("second", r)):
        W, A, B = torch.randn(2, odd, 64).bfloat16(), torch.randn(2, r, 64), torch.randn(2, odd, r)
        adapters = AdapterStack(A, B, 1.0)
        experts.gemm_experts(config, x, W.mT, rows, adapters=adapters, use_A=False, **given)


def launch_codes(r):
    """A layer's products and experts', over int8 codes of odd rows; nf4's rows are even."""
    x, g, h = (torch.randn(M, n).bfloat16() for n in (K, N, r))
    A, B = torch.randn(2, r, K), torch.randn(2, N, r)
    codes = quantize_int8(torch.randn(N, K)).matrix()
    stack = quantize_int8(torch.randn(2, N, K)).matrix()
    rows = groups_of_indices(torch.arange(M) % 2, 2)
    given = {"h": h, "adapters": AdapterStack(A, B, 1.0)}
    given |= {"order_x": rows.order, "order_y": rows.order}
    for config in largest("quantized", r):
        gemm.gemm_add_lora(config, x, codes.t(), h, B[0].t())
        experts.gemm_experts(config, x, stack.t(), rows, use_A=False, **given)
    for config in largest("quantized", r, True):
        gemm.gemm_add_lora(config, g, codes, h, A[0], dropout=DROPOUT)
        experts.gemm_experts(config, g, stack, rows, use_A=True, dropout=DROPOUT, **given)


if __name__ == "__main__":
    driver.set_active(launch_overhead.StandIn())
    compiler.compile = triton.compiler.compile = _kept
    rank = int(sys.argv[1])
    launch_all(rank)
    launch_experts(rank)
    launch_codes(rank)
    bad = []
    for kernel in compiled:
        usage = compile_report.resource_usage(kernel)
        if not (stack := compile_report.used(usage, "STACK")):
            continue  # nothing is on it: machine code takes half a second to disassemble
        sass = compile_report.disassembled(kernel)[1]
        spilled = compile_report.spills(sass)
        if "HGMMA" in sass and (spilled or stack > compile_report.ASIDE):
            bad.append(
                f"{kernel.metadata.name}: {stack} bytes, {spilled} in loops {kernel.src.constants}"
            )
    assert len(compiled) > 10
    assert not bad, "\n".join(bad)
