"""Which backend and strategy a call takes, and what `explain` says of it."""

from dataclasses import replace

import pytest
import torch

from fused_lora import dispatch, explain
from fused_lora.dispatch import Call, plan, predicted_extra
from fused_lora.kernels.device import SHARED_MEMORY, DeviceInfo

H100 = DeviceInfo(capability=90, num_sms=132, shared_memory=SHARED_MEMORY[90])
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
    monkeypatch.setattr(dispatch, "device_info", lambda device: H100)
    plan.cache_clear()
    yield
    plan.cache_clear()


@pytest.mark.parametrize(
    ("changes", "backend", "strategy"),
    [
        ({}, "triton", "split"),
        ({"N": 1024}, "triton", "one_pass"),
        ({"N": 16384, "r": 64}, "triton", "split"),
        ({"r": 65, "N": 1024}, "triton", "split"),
        ({"N": 1024, "dropout": True}, "triton", "split"),
        ({"M": 1}, "triton", "one_pass"),
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


def test_the_input_gradient_is_decided_by_its_own_shape(h100):
    chosen = plan(replace(CALL, N=1024, K=14336), "auto")
    assert (chosen.strategy, chosen.strategy_dx) == ("one_pass", "split")


def test_model_is_the_designs():
    """DESIGN.md, section 2: one pass costs r_pad / BLOCK_N, split about 194 / N and a launch."""
    extra = predicted_extra(replace(CALL, M=1 << 20), H100)
    assert extra["one_pass"] == pytest.approx(16 / 256)
    assert extra["split"] == pytest.approx(194 / 4096, rel=0.05)
    assert extra["library"] > extra["split"]


def test_too_old_a_gpu(monkeypatch):
    old = DeviceInfo(capability=75, num_sms=40, shared_memory=65536)
    monkeypatch.setattr(dispatch, "device_info", lambda device: old)
    plan.cache_clear()
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
    assert set(explanation.reasons) == {"torch", "one_pass", "split", "library"}
    assert sum(why.startswith("taken") for why in explanation.reasons.values()) == 1
    dropped = explain(*tensors, backend="triton", dropout_p=0.1)
    assert "once per tile" in dropped.reasons["one_pass"]


def test_explain_draws_no_random_number_and_computes_nothing(launches):
    tensors = _tensors()
    state = torch.get_rng_state()
    explain(*tensors, dropout_p=0.5)
    assert torch.equal(state, torch.get_rng_state())
    assert launches == []
