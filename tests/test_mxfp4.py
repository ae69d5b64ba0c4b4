"""MXFP4: the values of its specification, and of weights that were in it their own."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

from fused_lora import (
    QuantizedWeight,
    disable_adapter,
    inject,
    merge_and_unload,
    mxfp4,
    quantize_mxfp4,
)
from fused_lora.mxfp4 import MAGNITUDES

assert_close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)


def _as_gpt_oss_has_it(E, N, K, dtype=torch.bfloat16):
    """Weights [E, K, N] that transformers makes of a checkpoint's codes."""
    blocks = torch.randint(0, 256, (E, N, K // 32, 16), dtype=torch.uint8)
    scales = torch.randint(115, 122, (E, N, K // 32), dtype=torch.uint8)
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    return integration.convert_moe_packed_tensors(blocks, scales, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_that_were_in_mxfp4_stay_what_they_are(dtype):
    weight = _as_gpt_oss_has_it(3, 40, 256, dtype).mT
    codes = quantize_mxfp4(weight)
    assert torch.equal(codes.dequantize(), weight)
    bits = 8 * sum(getattr(codes, part).nbytes for part in ("codes", "scales")) / codes.numel()
    assert bits == 4.25


def _nearest(value, scale):
    """By the specification's words, of doubles."""
    distances = [(abs(abs(value) / scale - m), code % 2, m) for code, m in enumerate(MAGNITUDES)]
    return math.copysign(min(distances)[2] * scale, value)


@pytest.mark.parametrize("shape", [(5, 64), (3, 45), (1, 1)])
def test_rounded_to_the_nearest(shape):
    weight = torch.randn(shape) * 10.0 ** torch.randint(-20, 20, shape)
    weight[0, :32] = torch.arange(-16, 16)[: shape[1]] * 0.25  # among them all ties
    flat, expected = weight.flatten().tolist(), []
    for start in range(0, len(flat), 32):
        block = flat[start : start + 32]
        scale = 2.0 ** (math.floor(math.log2(max(map(abs, block)))) - 2)
        expected += [_nearest(value, scale) for value in block]
    found = quantize_mxfp4(weight).dequantize(torch.float64).flatten().tolist()
    assert found == expected


@pytest.mark.parametrize("changed", [{"block": (1, 64)}, {"nested_scales": None}], ids=str)
def test_another_layout_is_refused(changed):
    given = dict(quantize_mxfp4(torch.randn(2, 64)).named_parameters())
    given |= {"shape": (2, 64), "dtype": torch.float32, "block": (1, 32)} | changed
    with pytest.raises(ValueError, match=r"block: got .*, wanted \(1, 32\) and nested scales"):
        QuantizedWeight("mxfp4", **given)


def test_under_another_default_dtype():
    """As models are built under; the tables are made once for all."""
    weight = torch.randn(2, 64)
    expected = quantize_mxfp4(weight).state_dict()
    for cached in (mxfp4.scale_codebook, mxfp4._bounds):
        cached.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = quantize_mxfp4(weight).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_zeros():
    assert not quantize_mxfp4(torch.zeros(2, 64)).dequantize().any()


class Model(nn.Module):
    """gpt-oss's experts, with weights as a checkpoint has them."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4}
        gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
        self.experts = gpt_oss.GptOssExperts(gpt_oss.GptOssConfig(**sizes))
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter)
            if parameter.ndim == 3:
                E, K, N = parameter.shape
                parameter.data = _as_gpt_oss_has_it(E, N, K, torch.float32)

    def forward(self, x, index, weights):
        return self.experts(x, index, weights)


def test_a_gpt_oss_mixture_in_its_own_codes():
    """The results, and the merged weights, are those over what transformers makes of the codes."""
    names = ["experts.gate_up_proj", "experts.down_proj"]
    plain = Model()
    coded = copy.deepcopy(plain)
    inject(plain, 4, 8, target_parameters=names)
    report = inject(coded, 4, 8, target_parameters=names, quantize="mxfp4")
    assert report.quantization_error == 0.0
    for adapter in plain.experts.adapters.values():
        nn.init.normal_(adapter.lora_B, std=0.2)
    coded.experts.adapters.load_state_dict(plain.experts.adapters.state_dict())
    scores = torch.rand(9, 4).softmax(-1)
    weights, index = scores.topk(2)
    inputs = (torch.randn(9, 64), index, weights)
    assert_close(coded(*inputs), plain(*inputs))
    with disable_adapter(coded), disable_adapter(plain):
        assert_close(coded(*inputs), plain(*inputs))
    merge_and_unload(coded)
    merge_and_unload(plain)
    theirs = plain.state_dict()
    assert theirs.keys() == coded.state_dict().keys()
    assert all(torch.equal(ours, theirs[name]) for name, ours in coded.state_dict().items())
