"""Which backend and strategy a call takes, and what `explain` says of it."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from pretending import pretend

from fused_lora import explain
from fused_lora.arguments import Arguments
from fused_lora.calls import Call
from fused_lora.cost_model import ceilings, of_cublas, predicted_seconds
from fused_lora.dispatch import FEW_ROWS, better_apart, forget_plans, plan
from fused_lora.kernels.device import SHARED_MEMORY, DeviceInfo, device_info
from fused_lora.quantized_weight import Layout
from fused_lora.tables import Strategy

H100 = DeviceInfo(90, 132, SHARED_MEMORY[90], name="NVIDIA H100 80GB HBM3")
CALL = Call(
    M=8192,
    N=4096,
    K=4096,
    r=16,
    dtype=torch.bfloat16,
    device=torch.device("cuda", 0),
    dropout=False,
    plain_tensors=True,
)


@pytest.fixture
def h100(monkeypatch):
    """Lets the dispatcher believe that cuda:0 is an H100."""
    pretend(monkeypatch.setattr, device_info=lambda device: H100)
    forget_plans()
    yield
    forget_plans()


@pytest.mark.parametrize(
    ("changes", "backend", "strategy"),
    [
        ({}, "triton", "ws_one_launch"),
        ({"M": 512, "N": 5120, "r": 64}, "triton", "library"),
        ({"M": 512, "r": 65, "N": 1024}, "triton", "ws_one_launch"),
        ({"M": 512, "N": 1024, "dropout": True}, "triton", "split"),
        ({"M": 128}, "triton", "one_pass"),
        ({"M": 1}, "triton", "one_pass"),
        ({"M": 1, "N": 1024}, "triton", "skinny"),
        ({"M": 0}, "triton", "split"),
        ({"dtype": torch.float32}, "torch", "library"),
        ({"dtype": torch.float64}, "torch", "library"),
        ({"r": 513}, "torch", "library"),
        ({"plain_tensors": False}, "torch", "library"),
        ({"device": torch.device("cpu")}, "torch", "library"),
    ],
)
def test_auto(h100, changes, backend, strategy):
    chosen = plan(replace(CALL, **changes), "auto")
    assert (chosen.backend, chosen.strategy) == (backend, strategy)


@pytest.mark.parametrize(
    ("changes", "composed"),
    [
        ({"M": FEW_ROWS}, True),
        ({"M": 512}, True),
        ({"M": 513}, False),
        ({"M": FEW_ROWS, "K": 1 << 20}, True),
        ({"M": 512, "dtype": torch.bfloat16}, True),
        ({"M": 513, "dtype": torch.bfloat16}, False),
        ({"M": FEW_ROWS, "dtype": torch.float16}, False),
        ({"M": FEW_ROWS + 1, "dtype": torch.float64}, False),
        ({"M": 1, "quantized": Layout("nf4", (1, 64), False, True, None)}, False),
        ({"M": 1, "device": torch.device("cuda", 0), "r": 513}, False),
    ],
)
def test_what_pytorch_records_by_itself(h100, cpu_without, changes, composed):
    """A small x and y on a CPU."""
    cpu_without(torch.float16)
    small = replace(CALL, K=64, N=448, dtype=torch.float32, device=torch.device("cpu"))
    chosen = plan(replace(small, **changes), "auto")
    assert (chosen.backend, chosen.composed) == ("torch", composed)


@pytest.mark.parametrize(
    ("M", "dtype", "apart"),
    [
        (FEW_ROWS, torch.float16, True),
        (4096, torch.float32, True),
        (4097, torch.float32, False),
        (2048, torch.bfloat16, True),
        (2049, torch.bfloat16, False),
        (FEW_ROWS + 1, torch.float16, False),
        (FEW_ROWS + 1, torch.float64, False),
    ],
)
def test_members_of_a_group_that_are_faster_apart(cpu_without, M, dtype, apart):
    cpu_without(torch.float16)
    x, W, A, B = (torch.empty(shape, dtype=dtype) for shape in ((M, 32), (8, 32), (4, 32), (8, 4)))
    assert better_apart(x, Arguments(W, A, B, 1.0, None, 0.0, "auto")) == apart
    assert better_apart(x, Arguments(W, A, B, 1.0, None, 0.1, "auto"))


def test_the_input_gradient_is_decided_by_its_own_shape(h100):
    chosen = plan(replace(CALL, M=1, N=1024), "auto")
    assert (chosen.strategy, chosen.strategy_dx) == ("skinny", "one_pass")
    dropped = plan(replace(CALL, dropout=True), "auto")
    assert (dropped.strategy, dropped.strategy_dx) == ("ws_split", "tma_split")


def test_before_and_after_hopper_the_model_chooses_between_fewer(monkeypatch):
    """Where no GPU has measured the others."""
    for capability in (80, 100):
        gpu = replace(H100, capability=capability, shared_memory=SHARED_MEMORY[capability])
        pretend(monkeypatch.setattr, device_info=lambda device, gpu=gpu: gpu)
        forget_plans()
        assert plan(CALL, "auto").strategy in ("split", "library")
    forget_plans()


def test_dora_takes_the_faster_of_what_has_its_epilogue(h100):
    few = replace(CALL, M=1, N=1024)
    assert plan(few, "auto").strategy == "skinny"
    chosen = plan(few, "auto", "dora")
    seconds = predicted_seconds(few, H100)
    assert chosen.strategy == min("one_pass", "split", key=seconds.__getitem__)
    assert chosen.strategy_dx == plan(few, "auto").strategy_dx


def test_model_is_the_designs():
    """DESIGN.md, section 2: one pass costs r_pad / BLOCK_N, split one more read of x and a launch.

    On the H100's measured ceilings that read is 798e12 / 3.0e12 = 266 / N of cuBLAS's product's
    time; "library" reads and writes y once more, and its product is cuBLAS's.
    """
    call = replace(CALL, M=1 << 20)
    seconds = predicted_seconds(call, H100)
    cublas = 2 * call.M * call.N * call.K / 798e12

    def ours(kind):
        return cublas / of_cublas(H100, kind)

    read = 266 / 4096 * cublas
    assert seconds["one_pass"] / ours("one_pass") - 1 == pytest.approx(16 / 256, rel=0.01)
    assert seconds["split"] == pytest.approx(ours("second") + read, rel=0.001)
    assert seconds["library"] == pytest.approx(cublas + 3 * read, rel=0.001)
    assert seconds["tma_split"] > seconds["one_launch"]
    assert seconds["ws_one_launch"] == pytest.approx(ours("ws_produced") + read, rel=0.001)


def test_model_of_few_rows():
    """Every strategy reads W once, at the memory's speed if programs enough are loading."""
    seconds = predicted_seconds(replace(CALL, M=1), H100)
    read_w = 2 * 4096 * 4096 / 3.0e12
    assert seconds["one_pass"] == pytest.approx(read_w, rel=0.01)
    assert read_w < seconds["skinny"] < 2 * read_w
    narrow = predicted_seconds(replace(CALL, M=1, N=1024), H100)
    assert narrow["one_pass"] > 1.5 * narrow["skinny"]
    assert "skinny" not in predicted_seconds(replace(CALL, M=65), H100)


@pytest.mark.parametrize("N", [512, 1024, 4096])
def test_more_rows_of_few_are_never_predicted_faster(h100, N):
    """A program goes through K whatever other programs do, and so do few rows' few tiles."""
    calls = [replace(CALL, M=M, N=N) for M in range(1, 65)]
    times = [predicted_seconds(call, H100)[plan(call, "auto").strategy] for call in calls]
    assert times == sorted(times)
    a_program = 4096 / 64 / 4 * 0.7e-6
    assert predicted_seconds(replace(CALL, M=64, N=N), H100)["one_pass"] >= a_program


@pytest.mark.parametrize(("M", "N", "rounds"), [(2048, 4096, 2), (2112, 4096, 3), (8192, 5120, 10)])
def test_model_counts_whole_rounds_of_tiles(M, N, rounds):
    seconds = predicted_seconds(replace(CALL, M=M, N=N), H100)
    of_a_round = 2 * 132 * 128 * 256 * 4096 / (798e12 * of_cublas(H100, "one_pass"))
    assert seconds["one_pass"] <= 1.001 * rounds * of_a_round * (1 + 16 / 128)


def test_an_h200_has_its_own_ceilings():
    h200 = replace(H100, name="NVIDIA H200")
    few = replace(CALL, M=1, N=16384)
    ratio = predicted_seconds(few, H100)["one_pass"] / predicted_seconds(few, h200)["one_pass"]
    assert ratio == pytest.approx(4.3 / 3.0)


def test_only_hopper_and_later_have_tensor_descriptors():
    a100 = DeviceInfo(80, 108, SHARED_MEMORY[80], name="NVIDIA A100")
    assert not {"tma_one_pass", "tma_split", "one_launch"} & set(predicted_seconds(CALL, a100))


def test_too_old_a_gpu(monkeypatch):
    old = DeviceInfo(capability=75, num_sms=40, shared_memory=65536)
    pretend(monkeypatch.setattr, device_info=lambda device: old)
    forget_plans()
    assert plan(CALL, "auto").backend == "torch"
    with pytest.raises(RuntimeError, match="older than compute capability 8.0"):
        plan(CALL, "triton")


def _tensors(dtype=torch.float32):
    shapes = ((4, 6), (5, 6), (2, 6), (5, 2))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def test_explain_says_why_not():
    text = str(explain(*_tensors()))
    assert text.startswith("backend torch, forward library, dx library")
    assert "triton: not taken: the tensors are on the CPU" in text


def test_explain_says_what_was_asked_for():
    explanation = explain(*_tensors(), backend="torch")
    assert explanation.reasons["triton"] == 'not taken: backend="torch" was asked for'


def test_explain_prices_every_strategy(device):
    tensors = [t.to(device) for t in _tensors(torch.float16)]
    explanation = explain(*tensors, backend="triton")
    assert explanation.backend == "triton"
    assert set(explanation.reasons) == {"torch", *get_args(Strategy), "model"}
    assert sum(why.startswith("taken") for why in explanation.reasons.values()) == 1
    dropped = explain(*tensors, backend="triton", dropout_p=0.1)
    assert "once per tile" in dropped.reasons["one_pass"]
    for strategy in ("tma_one_pass", "tma_split", "one_launch"):  # rows of 6 and 5 elements
        assert (
            "no tensor descriptors: y: a row of 5 is not a multiple"
            in (explanation.reasons[strategy])
        )
    flops, bandwidth = ceilings(device_info(device))
    expected = f"ceilings of {flops / 1e12:.0f} TFLOP/s and {bandwidth / 1e12:.1f} TB/s"
    assert explanation.reasons["model"] == expected
    single = explain(*[t.float() for t in tensors], backend="triton", bias=None)
    assert "takes 16-bit products" in single.reasons["one_launch"]


def test_explain_prices_what_only_a_table_would_take(device):
    tensors = [torch.randn(s).to(device, torch.float16) for s in ((4, 8), (16, 8), (8, 8), (16, 8))]
    reasons = explain(*tensors, backend="triton").reasons
    for strategy in ("tma_one_pass", "tma_split", "one_launch"):
        assert reasons[strategy].startswith("not taken: predicted ")
        assert reasons[strategy].endswith("; taken only where a tuned table says so")
    single = explain(*[t.float() for t in tensors], backend="triton").reasons
    assert "takes 16-bit products" in single["tma_split"]
    many = explain(tensors[0].repeat(20, 1), *tensors[1:], backend="triton").reasons
    assert many["skinny"] == "not taken: M = 80 is over 64"


def test_explain_draws_no_random_number_and_computes_nothing(launches):
    tensors = _tensors()
    state = torch.get_rng_state()
    explain(*tensors, dropout_p=0.5)
    assert torch.equal(state, torch.get_rng_state())
    assert launches == []
