"""The hand-scheduled kernel for Hopper: as it is on a GPU, and anywhere in the emulator."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

import gluon_emulator
from hand_scheduled import H100, TOLERANCE, Operands, all_tiles, check_sum
from oracle import check, fused, problem, run
from pairs import pairs
from pretending import pretend

from fused_lora import dispatch, lora_linear, lora_linear_group, tune
from fused_lora.calls import Call
from fused_lora.cost_model import predicted_seconds
from fused_lora.dispatch import Plan, plan
from fused_lora.explanation import explain_call
from fused_lora.group import LoRALinearGroupFunction
from fused_lora.kernels import persistent, specialized
from fused_lora.kernels.device import INTERPRETED
from fused_lora.kernels.dropout import dropout_threshold
from fused_lora.kernels.sizes import cdiv
from fused_lora.kernels.tile_config import TileConfig
from fused_lora.seeds import draw_seeds

pytestmark = pytest.mark.by_hand
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
TILE = TileConfig(32, 32, 16, 4, 3, GROUP_M=2, SUBTILES=2, COOPERATIVE=True, LEAD=0)
SMALL = [
    pytest.param(TILE, id="cooperative"),
    pytest.param(replace(TILE, num_stages=2, SUBTILES=1, GROUP_M=8), id="cooperative, 2 stages"),
    pytest.param(replace(TILE, LEAD=2), id="cooperative, one ahead"),
    pytest.param(replace(TILE, LEAD=2, num_stages=2), id="cooperative, one as far ahead as it can"),
    pytest.param(replace(TILE, LEAD=2, HALVES=True), id="cooperative, by halves at last"),
    pytest.param(replace(TILE, COOPERATIVE=False), id="ping-pong"),
    pytest.param(replace(TILE, COOPERATIVE=False, HALVES=True), id="ping-pong, by halves at last"),
    pytest.param(
        replace(TILE, COOPERATIVE=False, num_stages=5, BLOCK_N=64, SUBTILES=4), id="ping-pong in 4"
    ),
]
FORMS = ["plain", "second", "produced"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", [*FORMS, "dora"])
@pytest.mark.parametrize("config", all_tiles(), ids=str)
def test_every_configuration(emulated, config, form, transposed):
    emulated()
    Operands(150, 264, 200, 24, transposed=transposed).check(form, config)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", [*FORMS, "dora"])
@pytest.mark.parametrize("config", SMALL)
def test_orders_of_events(emulated, config, form, transposed):
    """More tiles than programs, in two orders by chance: new ones in each run."""
    for _ in range(2):
        emulated(programs=3)
        Operands(70, 136, 40, 24, transposed=transposed).check(form, config)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("config", SMALL)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 8, 8), (1, 8, 3), (33, 40, 100), (64, 64, 32), (20, 72, 17)]
)
def test_odd_sizes(emulated, config, form, transposed, m, n, k):
    emulated()
    Operands(m, n, k, 8, transposed=transposed).check(form, config)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("r", [1, 7, 16, 17, 64, 128])
def test_every_rank(emulated, form, transposed, r):
    """Ranks in one step, in several, and those of which rows are no whole 16 bytes."""
    emulated()
    Operands(40, 72, 48, r, transposed=transposed).check(form, TILE)
    Operands(40, 72, 48, r, transposed=transposed).check(form, replace(TILE, COOPERATIVE=False))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("config", SMALL)
def test_a_sum_of_products(emulated, config, transposed, adapters):
    for Ks in ((40, 72), (136, 16, 24)):
        emulated(programs=3)
        check_sum(config, 70, 136, Ks, adapters=adapters, transposed=transposed)


@pytest.mark.parametrize("programs", [2, 3, 5, 8, 13])
@pytest.mark.parametrize("form", FORMS)
def test_a_last_round_of_halves(emulated, form, programs):
    """All that are halved: none, all that there are, and what lies between."""
    halved = set()
    configs = replace(TILE, HALVES=True), replace(TILE, HALVES=True, LEAD=2, GROUP_M=8)
    sizes = (33, 40), (64, 72), (70, 136), (150, 104)
    for config, (m, n), transposed in pairs(config=configs, size=sizes, transposed=(False, True)):
        emulated(programs=programs)
        Operands(m, n, 40, 24, transposed=transposed).check(form, config)
        tiles_h = cdiv(m, 32) * 2 if form == "produced" else 0
        size = cdiv(m, 32), cdiv(n, 32), tiles_h, programs
        halved.add(specialized.last_round(config, *size))
    assert len(halved) > 1


def test_which_tiles_are_halved():
    """Of y [2048, 5120] there are 2.4 rounds of 132; of [2048, 4096] the last round is full."""
    (config, *_) = (c for c in all_tiles() if c.HALVES)
    assert specialized.last_round(config, 16, 20, 0, 132) == 56
    assert specialized.last_round(config, 16, 20, 16, 132) == 64
    assert specialized.last_round(config, 16, 16, 0, 132) == 0
    assert specialized.last_round(config, 33, 4, 0, 100) == 0  # not all in the last group


@pytest.mark.parametrize("config", SMALL)
@pytest.mark.parametrize("resident", [1, 2, 5])
def test_progress_with_any_number_of_resident_programs(emulated, config, resident):
    for _ in range(2):
        emulated(programs=5, resident=resident)
        Operands(150, 72, 40, 24, transposed=True).check("produced", config)


def test_a_launch_leaves_the_counters_at_zero_and_its_epoch_in_the_flags(emulated):
    """As the persistent kernel does, whose buffer it shares; two flags a tile of h here."""
    o = Operands(70, 72, 40, 24, transposed=True)
    for launch in (1, 2):
        emulated(launch, programs=3)
        o.check("produced", TILE)
        sync = next(iter(persistent._sync_buffers.values()))
        assert sync[:3].tolist() == [launch, 0, 0]
        assert sync[32 : 32 + 3 * 2 * 2].tolist() == [launch] * 12  # 3 rows of tiles, 2 of ranks


# What can go wrong in the kernel itself: one kind of synchronisation is left out of it.
def _without(method, which=lambda *_: True):
    original = getattr(gluon_emulator.Language, method)

    def patched(self, *args, **kwargs):
        return None if which(*args) else original(self, *args, **kwargs)

    return method, patched


FAULTS = {
    "fences of shared memory": _without("fence_async_shared"),
    "fences of global memory": _without("inline_asm_elementwise"),
    "waits for the staging memory": _without("store_wait"),
    "waits for copies": _without("wait", lambda barrier, _: barrier.name.startswith("ready")),
    "waits for places": _without("wait", lambda barrier, _: barrier.name.startswith("empty")),
    "waits for a turn": _without("wait", lambda barrier, _: barrier.name.startswith("turns")),
    "waits for an item": _without("wait", lambda barrier, _: barrier.name.startswith("posted")),
    "giving places back": _without("arrive", lambda b: b.name.startswith("empty")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_missing_synchronisation_is_found(emulated, monkeypatch, fault):
    name, patched = FAULTS[fault]
    monkeypatch.setattr(gluon_emulator.Language, name, patched)
    o = Operands(70, 136, 40, 24, transposed=True)
    found = 0
    for seed in range(12):
        persistent._sync_buffers.clear()
        emulated(seed)
        try:
            o.check("produced", replace(TILE, COOPERATIVE=False, BLOCK_N=64, SUBTILES=4))
        except (AssertionError, RuntimeError, IndexError):
            found += 1
    assert found


STRATEGIES = [
    ("ws_split", ["gemm_scaled", "specialized_add_lora"]),
    ("ws_one_launch", ["specialized_produced"]),
]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("m", "r"), [(1, 8), (37, 8), (37, 64), (130, 24), ((2, 3), 128)])
@pytest.mark.parametrize(("strategy", "kernels"), STRATEGIES)
def test_a_strategy_by_the_oracle(launches, strategy, kernels, m, r, adapter_dtype, bias):
    p = problem(m, 72, 136, r, dtype=torch.float16, adapter_dtype=adapter_dtype, bias=bias)
    check(run(fused(Plan("triton", strategy, strategy)), p), p)
    assert launches == [*kernels, *kernels, "lora_grads"]


@pytest.mark.usefixtures("everywhere")
def test_dropout_of_the_forward_is_drawn_where_h_is_made(launches):
    p = problem(37, 72, 136, 8, dtype=torch.float16, dropout_p=0.3)
    check(run(fused(Plan("triton", "ws_split", "tma_split")), p), p)
    of_y = [name for name in launches if name != "gemm_scaled"]
    assert of_y == ["specialized_add_lora", "persistent_add_lora", "lora_grads"]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("strategies", [("ws_one_launch", "split"), ("split", "ws_split")])
def test_dropout_is_never_forgotten(strategies):
    """No call is planned so, where the kernel would have to draw it."""
    p = problem(37, 72, 136, 8, dtype=torch.float16, dropout_p=0.3)
    with pytest.raises(AssertionError, match="draws no decisions"):
        run(fused(Plan("triton", *strategies)), p)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("strategy", ["ws_split", "ws_one_launch"])
def test_tensors_without_a_descriptor(launches, strategy):
    p = problem(9, 13, 11, 3, dtype=torch.float16)
    check(run(fused(Plan("triton", strategy, strategy)), p), p)
    assert launches == ["gemm_scaled", "gemm_scaled", "lora_grads"]


def check_group(ps, dropout_p, launches):
    """One dx by the hand-scheduled kernel: what cuBLAS's products give with the same masks."""
    x, gs = ps[0].x.requires_grad_(), [p.g for p in ps]
    tensors = [[getattr(p, name) for p in ps] for name in ("weight", "lora_A", "lora_B")]
    scalings = [p.scaling for p in ps]
    launches.clear()
    torch.manual_seed(11)
    options = {"scalings": scalings, "dropout_ps": [dropout_p] * len(ps), "backend": "triton"}
    ys = lora_linear_group(x, *tensors, **options)
    (dx,) = torch.autograd.grad(ys, x, gs)
    assert launches.count("specialized_group") == 1
    assert launches.count("add_group") == bool(dropout_p)
    torch.manual_seed(11)
    drawn = draw_seeds(len(ps), x.device, "triton")
    thresholds = [dropout_threshold(dropout_p)] * len(ps)
    plans = [Plan("triton", "split", "library")] * len(ps)
    flat = [t for kind in tensors for t in kind]

    def error(seeds):
        ys = LoRALinearGroupFunction.apply(
            x, scalings, seeds, thresholds, plans, None, *flat, *[None] * len(ps)
        )
        (expected,) = torch.autograd.grad(ys, x, gs)
        return ((dx - expected).norm() / expected.norm()).item()

    assert error(drawn if dropout_p else None) < 0.02
    assert not dropout_p or error(drawn.flip(0)) > 0.05  # each member's own mask
    assert launches.count("specialized_group") == 1


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_group(launches, monkeypatch, dropout_p):
    monkeypatch.setattr(dispatch, "_choose", lambda call, form: ("ws_split", None))
    ps = [problem(70, n, 136, r, dtype=torch.float16) for n, r in ((72, 16), (40, 16), (40, 8))]
    check_group(ps, dropout_p, launches)


@pytest.mark.usefixtures("everywhere")
def test_a_strategy_in_a_compiled_function(launches, monkeypatch):
    """Its launch is inside the registered operators: tracing does not see it."""
    monkeypatch.setattr(dispatch, "_choose", lambda call, form: ("ws_one_launch", None))
    p = problem(20, 72, 136, 8, dtype=torch.float16)

    def call(p):
        return lora_linear(
            p.x, p.weight, p.lora_A, p.lora_B, scaling=p.scaling, bias=p.bias, backend="triton"
        )

    check(run(torch.compile(call, backend="aot_eager", fullgraph=True), p), p)
    assert launches == ["specialized_produced", "specialized_produced", "lora_grads"]


CALL = Call(4096, 4096, 4096, 16, torch.bfloat16, torch.device("cuda"), False, True)


def _on(monkeypatch, info):
    pretend(monkeypatch.setattr, device_info=lambda device: info)
    plan.cache_clear()


def test_the_model_takes_it_on_hopper(monkeypatch):
    _on(monkeypatch, H100)
    seconds = predicted_seconds(CALL, H100)
    assert seconds["ws_split"] < seconds["tma_split"]
    assert dispatch._by_model(CALL) == "ws_one_launch"
    pretend(monkeypatch.setattr, specialized_obstacle=lambda *_: "no Gluon")
    assert dispatch._by_model(CALL) == "one_launch"


def test_candidates_of_tuning(monkeypatch):
    """The launch of ws_split has no dropout, which the forward does not need: it is in h's."""
    _on(monkeypatch, H100)
    monkeypatch.setattr(tune, "device_info", lambda device: H100)
    dropped = replace(CALL, dropout=True)

    def strategies(call, direction):
        call = replace(call, direction=direction)
        found = {strategy for strategy, _ in tune.candidates(call, direction)}
        return {strategy for strategy in found if strategy.startswith("ws_")}

    assert strategies(CALL, "forward") == strategies(CALL, "dx") == {"ws_split", "ws_one_launch"}
    assert strategies(dropped, "forward") == {"ws_split"}
    assert strategies(dropped, "dx") == set()


@pytest.mark.parametrize(
    ("info", "call", "why"),
    [
        (INTERPRETED, replace(CALL, device=torch.device("cpu")), "interpreter does not run Gluon"),
        (replace(H100, capability=80), CALL, "compute capability 8.0"),
        (replace(H100, capability=100), CALL, "wgmma is Hopper's"),
        (H100, replace(CALL, dropout=True), "its kernel draws no dropout decisions"),
        (H100, replace(CALL, dtype=torch.float32), "its kernel takes 16-bit products"),
    ],
)
def test_explain_says_why_not(monkeypatch, info, call, why):
    _on(monkeypatch, info)
    pretend(monkeypatch.setattr, kernel_obstacle=lambda call: None)
    operands = tuple(torch.empty(4096, 4096, dtype=call.dtype, device="meta") for _ in range(4))
    reasons = explain_call(call, "triton", operands).reasons
    assert why in reasons["ws_one_launch"]
    plan.cache_clear()


def test_a_triton_without_gluon():
    """Everything else goes on, and explain says what is missing."""
    program = """
import sys
sys.modules["triton.experimental.gluon.language.nvidia.hopper"] = None
import torch
import fused_lora
from fused_lora import lora_linear, strategies, triton_backend, tune
from fused_lora.kernels.device import SHARED_MEMORY, DeviceInfo
h100 = DeviceInfo(90, 132, SHARED_MEMORY[90])
print(strategies.specialized_obstacle(torch.device("cuda"), h100))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "this Triton's Gluon is not the one it is written in (" in result.stdout, result.stderr


def test_importing_the_package_does_not_import_gluon():
    program = """
import sys, fused_lora
from fused_lora import triton_backend
assert "fused_lora.kernels.specialized" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


needs_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and not HOPPER, reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", [*FORMS, "dora"])
@pytest.mark.parametrize("config", all_tiles(), ids=str)
def test_every_configuration_on_a_gpu(device, config, form, transposed):
    """More tiles than multiprocessors, twice: the second launch finds the first one's flags."""
    shape = (2900, 3208, 1096, 24)
    o = Operands(*shape, transposed=transposed, device=device, dtype=torch.bfloat16)
    for _ in range(2):
        o.check(form, config, 8 * TOLERANCE)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("form", "transposed"),
    [(form, transposed) for form in ("second", "produced", "dora") for transposed in (False, True)],
)
@pytest.mark.parametrize("config", [c for c in all_tiles() if c.HALVES or c.LEAD], ids=str)
def test_sizes_of_real_layers_on_a_gpu(device, config, form, transposed):
    """Triton knows multiples of 16, of which it makes other kernels; and a last round of halves."""
    shape = (2048, 5120, 1024, 16)
    o = Operands(*shape, transposed=transposed, device=device, dtype=torch.bfloat16)
    o.check(form, config, 8 * TOLERANCE)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("config", all_tiles(), ids=str)
def test_a_sum_of_products_on_a_gpu(device, config, adapters):
    kwargs = {"transposed": False, "device": device, "dtype": torch.bfloat16}
    for Ks in ((1096, 256), (4096, 1024, 72)):
        check_sum(config, 2900, 3208, Ks, adapters=adapters, tolerance=8 * TOLERANCE, **kwargs)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("m", "n", "k", "r"), [(1, 8, 8, 1), (333, 1000, 2056, 17), (65, 72, 40, 128)]
)
@pytest.mark.parametrize("form", FORMS)
def test_odd_sizes_on_a_gpu(device, form, m, n, k, r):
    for transposed in (False, True):
        o = Operands(m, n, k, r, transposed=transposed, device=device)
        o.check(form, all_tiles()[0])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("strategy", "kernels"), STRATEGIES)
def test_a_strategy_by_the_oracle_on_a_gpu(device, launches, strategy, kernels, dtype):
    p = problem(777, 1032, 2056, 16, dtype=dtype, adapter_dtype=torch.float32, device=device)
    check(run(fused(Plan("triton", strategy, strategy)), p), p)
    assert launches == [*kernels, *kernels, "lora_grads"]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_group_on_a_gpu(device, launches, dropout_p):
    """q, k and v, by the plan."""
    sizes = [(4096, 16), (1024, 16), (1024, 8)]
    ps = [problem(2048, n, 4096, r, dtype=torch.bfloat16, device=device) for n, r in sizes]
    check_group(ps, dropout_p, launches)
