"""The kernels one by one: every tile configuration, what each compiles to, and wide offsets."""

import json
from typing import get_args

import pytest
import torch
from outside import run_outside

from fused_lora import reference
from fused_lora.kernels import configs, tile_config
from fused_lora.kernels.copy import aligned_copy
from fused_lora.kernels.device import INTERPRETED, SHARED_MEMORY, DeviceInfo
from fused_lora.kernels.dropout import Dropout
from fused_lora.kernels.expand import add_lora
from fused_lora.kernels.gemm import gemm_add_lora, gemm_one_pass, gemm_scaled
from fused_lora.kernels.grads import grad_lora_a, grad_lora_b, lora_grads
from fused_lora.strategies import gluon_problem

M, N, K, R = 133, 261, 70, 20
DTYPES = [(torch.float32, 1e-6), (torch.float16, 2e-3)]  # of the result's norm: a few roundings
H100 = DeviceInfo(capability=90, num_sms=132, shared_memory=SHARED_MEMORY[90])


def _configs(kind, itemsize, dropout=False):
    tiles = configs.ship(kind, R, itemsize, dropout, INTERPRETED)
    assert tiles
    return tiles


def _normal(device, dtype, *shape):
    return torch.randn(*shape).to(device, dtype)


def _assert_close(got, exact, tolerance):
    assert ((got.double() - exact).norm() / exact.norm()).item() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_one_pass_in_every_configuration(device, dtype, tolerance):
    x, w = _normal(device, dtype, M, K), _normal(device, dtype, K, N)
    a, b = _normal(device, dtype, K, R), _normal(device, dtype, R, N)
    bias = _normal(device, dtype, N)
    h64 = 0.5 * x.double() @ a.double()
    y64 = x.double() @ w.double() + h64 @ b.double() + bias.double()
    for config in _configs("one_pass", dtype.itemsize):
        y, h = gemm_one_pass(config, x, w, a, b, bias=bias, scale=0.5, store_h=True)
        _assert_close(h, h64, tolerance)
        _assert_close(y, y64, tolerance)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_split_in_every_configuration(device, dtype, tolerance, p):
    x, w = _normal(device, dtype, M, K), _normal(device, dtype, K, N)
    a, b = _normal(device, dtype, K, R), _normal(device, dtype, R, N)
    dropout, keep_k, keep_n = None, 1.0, 1.0
    if p:
        dropout = Dropout(torch.tensor([5], device=device), round(p * 65536))
        keep_k = reference.keep_mask(*dropout, M, K).double() * dropout.keep_scale
        keep_n = reference.keep_mask(*dropout, M, N).double() * dropout.keep_scale
    h64 = 0.5 * (keep_k * x.double()) @ a.double()
    for config in _configs("plain", dtype.itemsize, p > 0):
        _assert_close(gemm_scaled(config, x, a, scale=0.5, dropout=dropout), h64, tolerance)
    h = h64.to(dtype)
    y64 = x.double() @ w.double() + keep_n * (h.double() @ b.double())
    for config in _configs("second", dtype.itemsize, p > 0):
        _assert_close(gemm_add_lora(config, x, w, h, b, dropout=dropout), y64, tolerance)


@pytest.mark.parametrize("r", [1, 16, 20, 65, 512])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_adding_to_a_product_in_every_configuration(device, dtype, tolerance, p, r):
    m, n = 45, 133  # more than one tile of 32 x 128, and a rest: 16 s for all, with M and N 88
    h, b = _normal(device, dtype, m, r + 3)[:, 3:], _normal(device, dtype, r, n)
    wide = _normal(device, dtype, m, n + 5)
    dropout, keep = None, 1.0
    if p:
        dropout = Dropout(torch.tensor([5], device=device), round(p * 65536))
        keep = reference.keep_mask(*dropout, m, n).double() * dropout.keep_scale
    y64 = wide[:, 2:-3].double() + keep * (h.double() @ b.double())
    for config in _configs("expand", dtype.itemsize, p > 0):
        for of_b in (b, b.t().contiguous().t(), b.float()):
            result = wide.clone()
            add_lora(config, result[:, 2:-3], h, of_b, dropout=dropout)
            _assert_close(result[:, 2:-3], y64, tolerance)
            assert torch.equal(result[:, :2], wide[:, :2])
            assert torch.equal(result[:, -3:], wide[:, -3:])


@pytest.mark.parametrize(("m", "n"), [(0, 5), (5, 0)])
def test_adding_to_an_empty_product(device, m, n):
    """No launch of an empty grid, which CUDA refuses."""
    y, h, b = (torch.randn(shape, device=device) for shape in ((m, n), (m, R), (R, n)))
    add_lora(_configs("expand", 4)[0], y, h, b, dropout=None)
    assert y.shape == (m, n)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_gradients_in_every_configuration(device, dtype, tolerance, p):
    x, g = _normal(device, dtype, M, K), _normal(device, dtype, M, N)
    h = _normal(device, dtype, M, R)
    dropout, keep = None, 1.0
    if p:
        dropout = Dropout(torch.tensor([5], device=device), round(p * 65536))
        keep = reference.keep_mask(*dropout, M, K).double() * dropout.keep_scale
    dA64 = h.double().t() @ (keep * x.double())
    for config in _configs("grad", dtype.itemsize, p > 0):
        dA = grad_lora_a(config, x, h, dtype=torch.float32, dropout=dropout)
        _assert_close(dA, dA64, tolerance)
        dB = grad_lora_b(config, g, h, dtype=dtype)
        _assert_close(dB, g.double().t() @ h.double(), tolerance)
        both = lora_grads(config, x, h, g, h, dtype_a=torch.float32, dtype_b=dtype, dropout=dropout)
        _assert_close(both[0], dA64, tolerance)
        _assert_close(both[1], g.double().t() @ h.double(), tolerance)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 5, 6), (7, 0, 6), (7, 5, 0), (7, 0, 0)])
def test_gradients_of_empty_problems(device, m, k, n):
    (config,) = _configs("grad", 4)
    x, g, h = (torch.randn(m, size, device=device) for size in (k, n, R))
    dA, dB = lora_grads(
        config, x, h, g, h, dtype_a=torch.float32, dtype_b=torch.float32, dropout=None
    )
    _assert_shape_and_value(dA, h.t() @ x)
    _assert_shape_and_value(dB, g.t() @ h)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (130, 16), (16, 4100), (0, 4), (7, 0)])
def test_copies_that_descriptors_can_have(device, size, dtype):
    wide = torch.randn(size[0], 2 * size[1] + 3).to(device, dtype)
    for t in (wide[:, 1 : 1 + size[1]], wide[:, 3::2], wide.t()[: size[1]].t()):
        assert t.shape == size
        got = aligned_copy(t, torch.float16)
        assert torch.equal(got, t.half())
        assert not got.numel() or (got.stride(0) % 8, got.stride(1)) == (0, 1)


def _assert_shape_and_value(got, exact):
    assert got.shape == exact.shape
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("capability", sorted(SHARED_MEMORY))
def test_every_rank_has_a_configuration_on_every_gpu(capability, itemsize, dropout):
    device = DeviceInfo(capability, num_sms=100, shared_memory=SHARED_MEMORY[capability])
    for r in (1, 16, 17, 64, 65, configs.MAX_RANK):
        for kind in ("second", "plain", "grad", "group", "expand", "expand_group", "multi_grad"):
            assert configs.ship(kind, r, itemsize, dropout, device)
    assert configs.ship("one_pass", 16, itemsize, False, device)


def test_choice_of_a_tile():
    def choose(M, N, r=16, kind="one_pass"):
        return configs.choose_config(kind, M, N, r, 2, False, H100)

    assert (choose(8192, 4096).BLOCK_M, choose(8192, 4096).BLOCK_N) == (128, 256)
    assert choose(1, 4096).BLOCK_M == 16
    # One round of the larger tile instead of two of the smaller one, and one that is full.
    assert (choose(1024, 4096).BLOCK_M, choose(1024, 4096).BLOCK_N) == (128, 256)
    assert (choose(512, 1024).BLOCK_M, choose(512, 1024).BLOCK_N) == (64, 64)
    # 2.4 rounds of 128 x 256 take as long as 3; 4.8 of 128 x 128 as long as 5 halves.
    assert (choose(2048, 5120).BLOCK_M, choose(2048, 5120).BLOCK_N) == (128, 128)
    with pytest.raises(ValueError, match="no one_pass tile configuration takes rank 65"):
        choose(8192, 4096, r=65)


BY_COPIES = {*get_args(tile_config.TmaKind), *get_args(tile_config.SpecializedKind)}
ELSEWHERE = {"quantized", "fp8"}  # in test_quantize.py and test_fp8.py
OTHERS = {*get_args(tile_config.Kind)} - BY_COPIES - ELSEWHERE


# New ones in each run, on Hopper of every form of a kernel: compiling and disassembling one takes
# two seconds, on a slow machine four. `make kernels` compiles every case for every architecture.
@pytest.mark.parametrize(
    ("arch", "kinds", "sample"),
    [
        ("sm_80", OTHERS, 7),
        ("sm_90", OTHERS, 19),
        ("sm_90", BY_COPIES, 8),
        ("sm_100", OTHERS | BY_COPIES, 7),
    ],
    ids=["sm_80", "sm_90", "sm_90 by copies", "sm_100"],
)
def test_what_ships_fits_and_keeps_its_tensor_cores(arch, kinds, sample, tmp_path):
    rows_file = tmp_path / "rows.json"
    by_hand = set(get_args(tile_config.SpecializedKind))
    if gluon_problem():
        kinds = kinds - by_hand
    options = ["--arch", arch, "--heaviest", "--dtype", "bf16", "--kind", ",".join(kinds)]
    options += ["--sample", str(sample)]
    run_outside("-m", "benchmarks.compile_report", *options, "--json", str(rows_file))
    rows = json.loads(rows_file.read_text())
    assert len(rows) == sample
    assert not any(row["problem"] for row in rows)
    assert all(row["predicted_us"].keys() == {"H100", "H200"} for row in rows)
    if arch == "sm_90":
        tma = set(get_args(tile_config.TmaKind))
        assert {row["kind"] for row in rows} == kinds
        large = [r for r in rows if r["dtype"] == "bf16" and r["config"]["BLOCK_M"] >= 64]
        large = [r for r in large if not r["sums"]]
        assert large
        assert all("HGMMA" in row["instructions"] for row in large)
        tma_rows = [row for row in rows if row["kind"] in tma]
        assert all({"UTMALDG", "UTMASTG"} <= row["instructions"].keys() for row in tma_rows)
        specialised = [row["instructions"].keys() for row in rows if row["kind"] in by_hand]
        assert all({"UTMALDG", "UTMASTG", "USETMAXREG"} <= found for found in specialised)


def test_a_spill_is_what_a_loop_does_to_the_stack():
    program = """
from benchmarks.compile_report import spills
def sass(*lines):
    return "".join(f"        /*{16 * i:04x}*/    {line} ;   /* 0x0 */" + chr(10)
                   for i, line in enumerate(lines))
loop = ["STL [R1], R2", "IADD3 R4, R4, 0x1", "@!P0 BRA 0x10", "LDL.LU R2, [R1]", "EXIT"]
assert spills(sass(*loop)) == 0
assert spills(sass(*loop[:2], "LDL R3, [R1]", *loop[2:])) == 1
assert spills(sass("NOP", *loop[:2], "@!P0 BRA 0x10", *loop[3:])) == 1  # the store is in it
# A wait out of line, which comes back: what follows it is not in a loop.
wait = ["STL [R1], R2", "@P0 BRA 0x50", "LDL R2, [R1]", "EXIT", "NOP", "@!P1 BRA 0x50", "BRA 0x20"]
assert spills(sass(*wait)) == 0
"""
    run_outside("-c", program)


def test_offsets_are_64_bit():
    """No 32-bit product of an index and a stride: it would wrap beyond 2^31 elements."""
    kinds = ["one_pass", "second", "grad", "group", "skinny", "expand", "expand_group"]
    kinds += ["tma_second"]  # all in one process: 47 s in one for each
    program = f"""
import re
from benchmarks.cases import cases
from benchmarks.sources import source
import triton
from triton.backends.compiler import GPUTarget
for kind in {kinds}:
    of_kind = [c for c in cases([90], ["bf16"]) if c.kind == kind and not c.sums]
    case = min(of_kind, key=lambda c: c.dropout)
    ttir = triton.compile(source(case), target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    # Every offset that reaches a pointer must have been computed in 64 bits.
    offsets = re.findall(r"tt.addptr [^:]*: [^,]*, (\\S+)", ttir)
    assert offsets, ttir
    assert all("i64" in offset for offset in offsets), (kind, sorted(set(offsets)))
"""
    run_outside("-c", program)
