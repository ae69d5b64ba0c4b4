"""Base weights as operator arguments: there and back, and under torch.compile."""

import pytest
import torch

from fused_lora import quantize_fp8, quantize_int8, quantize_nf4
from fused_lora.packing import pack, unpack

QUANTIZERS = {
    "nf4": quantize_nf4,
    "nf4 single": lambda w: quantize_nf4(w, double_quant=False),
    "int8": quantize_int8,
    "fp8": quantize_fp8,
    "fp8 whole": lambda w: quantize_fp8(w, block_size=None),
}


def _weights():
    # 70 columns: NF4's blocks go over the ends of rows
    made = [make(torch.randn(6, K)) for make in QUANTIZERS.values() for K in (64, 70)]
    stacks = [make(torch.randn(3, 6, 70)) for make in QUANTIZERS.values()]  # of experts
    return [torch.randn(3, 4), *made, *stacks, torch.randn(5, 6).half()]


def test_weights_come_back_over_the_same_storage():
    weights = _weights()
    weights[1].to(torch.bfloat16)
    for given, got in zip(weights, unpack(*pack(*weights)), strict=True):
        if isinstance(given, torch.Tensor):
            assert got is given
            continue
        assert type(got) is type(given)
        assert (got.shape, got.dtype, got.layout) == (given.shape, given.dtype, given.layout)
        assert got.nbytes == given.nbytes
        assert got.device == given.device
        for name, tensor in given._parameters.items():
            assert getattr(got, name) is tensor
        torch.testing.assert_close(got.dequantize(), given.dequantize(), rtol=0, atol=0)
    assert unpack(*pack(weights[0])) == [weights[0]]


@pytest.mark.parametrize("dynamic", [False, True])
def test_dynamo_traces_pack(dynamic):
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True, dynamic=dynamic)
    def packed(x, *weights):
        tensors, spec = pack(*weights)
        return [t.clone() for t in tensors], x * len(spec)

    weights = _weights()
    got, lengths = packed(torch.ones(3), *weights)
    tensors, spec = pack(*weights)
    for t, u in zip(tensors, got, strict=True):
        assert torch.equal(t, u)
    assert lengths.tolist() == [len(spec)] * 3
