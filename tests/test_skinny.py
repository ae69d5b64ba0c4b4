"""The kernel for a handful of rows: every configuration, ranges of K, dropout, determinism."""

import pytest
import torch
from pairs import pairs
from test_persistent import DTYPES, Operands, _assert_close

from fused_lora.kernels import configs, skinny
from fused_lora.kernels.device import INTERPRETED, DeviceInfo


def _configs(M, dtype, r=24):
    return [
        c for c in configs.ship("skinny", r, dtype.itemsize, False, INTERPRETED) if c.BLOCK_M >= M
    ]


@pytest.fixture
def many_sms(monkeypatch):
    """So many multiprocessors that K is cut into ranges."""
    many = DeviceInfo(capability=90, num_sms=20, shared_memory=232_448)
    monkeypatch.setattr(skinny, "device_info", lambda device: many)


@pytest.mark.usefixtures("many_sms")
@pytest.mark.parametrize(("m", "k", "r"), [(1, 512, 24), (17, 300, 72), (64, 40, 5)])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_values(device, dtype, tolerance, m, k, r):
    options = {"config": _configs(m, dtype), "transposed": [False, True], "p": [0.0, 0.3]}
    for config, transposed, p, drop_x in pairs(**options, drop_x=[True, False]):
        o = Operands(device, dtype, transposed=transposed, m=m, k=k, r=r, p=p)
        y, h = skinny.skinny(
            config, o.x, o.w, o.a, o.b, bias=o.bias, scale=0.5, dropout=o.dropout, drop_x=drop_x
        )
        _assert_close(h, o.h(o.keep_k if drop_x else 1.0), tolerance)
        _assert_close(y, o.y(h, 1.0 if drop_x else o.keep_n), tolerance)


@pytest.mark.parametrize(("m", "k"), [(0, 8), (3, 0)])
def test_empty(device, m, k):
    o = Operands(device, torch.float16, transposed=True, m=m, k=k)
    y, h = skinny.skinny(_configs(m, torch.float16)[0], o.x, o.w, o.a, o.b, bias=None, scale=1.0)
    assert y.shape == (m, o.b.shape[1])
    assert not y.any()
    assert not h.any()


@pytest.mark.usefixtures("many_sms")
def test_same_bits_in_every_run(device):
    o = Operands(device, torch.float16, transposed=True, m=9, k=700)
    config = _configs(9, torch.float16)[0]
    runs = [skinny.skinny(config, o.x, o.w, o.a, o.b, bias=None, scale=1.0)[0] for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
