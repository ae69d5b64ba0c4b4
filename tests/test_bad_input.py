"""Every invalid call raises an error that names the argument, before anything is launched."""

import math
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora import (
    FusedLoRAAttention,
    FusedLoRAGroup,
    FusedLoRALinear,
    FusedMultiLoRALinear,
    explain,
    lora_linear,
)

GOOD = {
    "x": torch.randn(4, 6),
    "weight": torch.randn(5, 6),
    "lora_A": torch.randn(2, 6),
    "lora_B": torch.randn(5, 2),
}


def _call(function=lora_linear, **changes):
    arguments = GOOD | {"scaling": 1.0} | changes
    tensors = [arguments.pop(name) for name in ("x", "weight", "lora_A", "lora_B")]
    return function(*tensors, **arguments)


BAD = {
    "x not a tensor": ({"x": [1.0]}, TypeError, "x: got list"),
    "x a scalar": ({"x": torch.tensor(1.0)}, ValueError, "x: got shape []"),
    "x of another width": ({"x": torch.randn(4, 7)}, ValueError, "x: got shape [4, 7]"),
    "x integer": (
        {"x": torch.ones(4, 6, dtype=torch.int64)},
        TypeError,
        "x's dtype: got torch.int",
    ),
    "x complex": ({"x": torch.ones(4, 6) * 1j}, TypeError, "x's dtype: got torch.complex64"),
    "x sparse": ({"x": torch.eye(6).to_sparse()}, TypeError, "x: got layout torch.sparse_coo"),
    "x nested": (
        {"x": torch.nested.nested_tensor([torch.randn(4, 6), torch.randn(3, 6)])},
        TypeError,
        "x: got layout nested",
    ),
    "B nested": (
        {"lora_B": torch.nested.nested_tensor([torch.randn(5, 2)])},
        TypeError,
        "lora_B: got layout nested",
    ),
    "an option before a nested x": (
        {"x": torch.nested.nested_tensor([torch.randn(4, 6)]), "backend": "cuda"},
        ValueError,
        "backend: got 'cuda'",
    ),
    "weight 1-D": ({"weight": torch.randn(6)}, ValueError, "weight: got shape [6]"),
    "weight of another dtype": (
        {"weight": torch.randn(5, 6).half()},
        TypeError,
        "weight: got dtype torch.float16, wanted x's dtype, torch.float32",
    ),
    "weight integer": (
        {"weight": torch.ones(5, 6, dtype=torch.int8)},
        TypeError,
        "weight's dtype: got torch.int8",
    ),
    "weight trainable": (
        {"weight": torch.randn(5, 6, requires_grad=True)},
        ValueError,
        "weight: requires a gradient",
    ),
    "A transposed": ({"lora_A": torch.randn(6, 2)}, ValueError, "lora_A: got shape [6, 2], wanted"),
    "r = 0": (
        {"lora_A": torch.randn(0, 6), "lora_B": torch.randn(5, 0)},
        ValueError,
        "lora_A: got shape [0, 6] (r = 0)",
    ),
    "B transposed": ({"lora_B": torch.randn(2, 5)}, ValueError, "lora_B: got shape [2, 5], wanted"),
    "B of another rank": ({"lora_B": torch.randn(5, 3)}, ValueError, "lora_B: got shape [5, 3]"),
    "bias of another length": ({"bias": torch.randn(6)}, ValueError, "bias: got shape [6]"),
    "bias of another dtype": (
        {"bias": torch.randn(5).double()},
        TypeError,
        "bias: got dtype torch.float64",
    ),
    "scaling NaN": ({"scaling": math.nan}, ValueError, "scaling: got nan, wanted a finite number"),
    "scaling infinite": ({"scaling": -math.inf}, ValueError, "scaling: got -inf"),
    "scaling a string": ({"scaling": "1"}, TypeError, "scaling: got str"),
    "scaling a tensor": ({"scaling": torch.tensor(1.0)}, TypeError, "scaling: got Tensor"),
    "scaling a bool": ({"scaling": True}, TypeError, "scaling: got bool"),  # 1.0's hash and equal
    "dropout a bool": ({"dropout_p": False}, TypeError, "dropout_p: got bool"),
    "dropout 1": ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0, wanted a probability"),
    "dropout negative": ({"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1"),
    "dropout NaN": ({"dropout_p": math.nan}, ValueError, "dropout_p: got nan"),
    "backend unknown": ({"backend": "cuda"}, ValueError, "backend: got 'cuda', wanted one of auto"),
    "meta among CPU tensors": (
        {"lora_B": torch.empty(5, 2, device="meta")},
        ValueError,
        "lora_B: is on meta, wanted x's device, cpu",
    ),
}


@pytest.mark.parametrize("function", [lora_linear, explain])
@pytest.mark.parametrize("name", BAD)
def test_refused(function, name, launches):
    changes, error, message = BAD[name]
    _call(function)  # whose decision is kept
    state = torch.get_rng_state()
    with pytest.raises(error, match=re.escape(message)):
        _call(function, **changes)
    assert launches == []
    assert torch.equal(state, torch.get_rng_state())


BAD_FOR_THE_KERNELS = {
    "r > 512": (
        {"lora_A": torch.randn(513, 6), "lora_B": torch.randn(5, 513)},
        ValueError,
        "lora_A: got r = 513, wanted at most 512",
    ),
    "fp64": (
        {n: torch.randn(4, 4).double() for n in ("x", "weight", "lora_A", "lora_B")},
        TypeError,
        "x: got dtype torch.float64",
    ),
    "a tensor subclass": (
        {"weight": torch.randn(5, 6).as_subclass(type("Other", (torch.Tensor,), {}))},
        TypeError,
        "tensor subclass",
    ),
}


@pytest.mark.parametrize("name", BAD_FOR_THE_KERNELS)
def test_refused_by_the_kernels_and_taken_by_torch(name, launches, device):
    changes, error, message = BAD_FOR_THE_KERNELS[name]
    changes = {key: tensor.to(device) for key, tensor in (GOOD | changes).items()}
    with pytest.raises(error, match=re.escape(message)):
        _call(backend="triton", **changes)
    assert launches == []
    assert _call(**changes).shape[0] == 4
    assert message in str(explain(**GOOD | changes)) or name == "a tensor subclass"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without")
def test_bf16_under_the_interpreter_is_refused(launches):
    half = {n: t.bfloat16() for n, t in GOOD.items()}
    with pytest.raises(RuntimeError, match="bfloat16 under TRITON_INTERPRET=1"):
        _call(backend="triton", **half)
    assert launches == []


def test_no_gpu_and_no_interpreter():
    program = (
        "import torch, fused_lora\n"
        "t = torch.ones(2, 2)\n"
        "fused_lora.lora_linear(t, t, t, t, scaling=1.0, backend='triton')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ":".join(filter(None, sys.path)) + ":."},
        check=False,
    )
    assert run.returncode == 1
    assert "the tensors are on the CPU and TRITON_INTERPRET=1 is not set" in run.stderr


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"r": 0}, ValueError, "r: got 0, wanted at least 1"),
        ({"r": 2.0}, TypeError, "r: got 2.0, wanted an integer"),
        ({"r": True}, TypeError, "r: got True"),
        ({"lora_alpha": math.nan}, ValueError, "lora_alpha: got nan"),
        ({"lora_dropout": 1}, ValueError, "lora_dropout: got 1"),
        ({"backend": "cublas"}, ValueError, "backend: got 'cublas'"),
        ({"dtype": torch.float8_e4m3fn}, TypeError, "dtype: got torch.float8_e4m3fn"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype: got torch.int8"),
    ],
)
def test_layer(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        FusedLoRALinear(4, 4, **changes)


def _model(*names):
    """Two linear layers; with named adapters, if any are given."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for name in names:
        fused_lora.add_adapter(model, name, 2, 4, ["0", "1"])
    return model


def _inject(**options):
    return fused_lora.inject(_model(), 2, 4, ["0", "1"], **options)


def _route(model, **given):
    with fused_lora.route(model, **given):
        raise AssertionError("entered")


X, ADAPTERS = torch.randn(3, 6), ([torch.randn(2, 6)], [torch.randn(6, 2)])
BAD_CALLS = {
    "use_dora: got 'False', wanted True or False": lambda: _inject(use_dora="False"),
    "use_rslora: got 1, wanted True or False": lambda: _inject(use_rslora=1),
    "groups: got 'no', wanted True": lambda: _inject(groups="no"),
    "rank_pattern: got [1], wanted a mapping": lambda: _inject(rank_pattern=[1]),
    "rank_pattern: got '', wanted a mapping": lambda: _inject(rank_pattern=""),
    "rank_pattern['0']: got 'x', wanted an integer": lambda: _inject(rank_pattern={"0": "x"}),
    "alpha_pattern['0']: got nan": lambda: _inject(alpha_pattern={"0": math.nan}),
    "use_rslora: got 'no'": lambda: FusedLoRALinear(6, 5, use_rslora="no"),
    "bias: got 'no'": lambda: FusedLoRALinear(6, 5, bias="no"),
    "in_features: got 'a', wanted an integer": lambda: FusedLoRALinear("a", 6),
    "in_features: got True, wanted an integer": lambda: FusedLoRALinear(True, 6),
    "out_features: got -1": lambda: FusedMultiLoRALinear(6, -1),
    "kdim: got 0": lambda: FusedLoRAAttention(8, 2, kdim=0),
    "batch_first: got 'no'": lambda: FusedLoRAAttention(8, 2, batch_first="no"),
    "target_modules: got None": lambda: FusedLoRAAttention(8, 2, target_modules=None),
    "is_causal: got nan": lambda: FusedLoRAAttention(8, 2)(torch.randn(3, 8), is_causal=math.nan),
    "layers: got NoneType": lambda: FusedLoRAGroup(None),
    "model: got NoneType": lambda: fused_lora.merge_and_unload(None),
    "model: got int": lambda: fused_lora.delete_adapter(3, "a"),
    "model: got str": lambda: _route("model", adapter_names=["a"]),
    "adapter_names: got 'b', wanted one of": lambda: _route(_model("a"), adapter_names=["a", "b"]),
    "adapter_names: got int": lambda: _route(_model("a"), adapter_names=3),
    "adapter_indices: got float": lambda: _route(_model("a"), adapter_indices=0.5),
    "segments: got 'b', wanted one of": lambda: _route(_model("a"), segments=[("b", 3)]),
    "segments[0]: got 3": lambda: _route(_model("a"), segments=[3]),
    "adapter_name: got int": lambda: fused_lora.add_adapter(_model(), 3, 2, 4, ["0"]),
    "r: got 0": lambda: fused_lora.add_adapter(_model(), "a", 0, 4, ["0"]),
    "name: got ['a'], wanted one of": lambda: _model("a")[0].delete_adapter(["a"]),
    "x: got NoneType": lambda: _model("a")[0](None, adapter_names=["a"]),
    "adapter_indices[1]: got True": lambda: fused_lora.lora_linear_multi(
        X, torch.eye(6), *ADAPTERS, scalings=1.0, adapter_indices=[0, True, 0]
    ),
    "member 0: scaling: got Tensor": lambda: fused_lora.lora_linear_group(
        X, [torch.eye(6)], *ADAPTERS, scalings=torch.tensor(1.0)
    ),
    "lora_As: got Tensor": lambda: fused_lora.explain_group(
        X, [torch.eye(6)], ADAPTERS[0][0], ADAPTERS[1]
    ),
    "jobs: got None, wanted a list of the jobs": lambda: fused_lora.schedule(None, 8),
    "jobs[0][0]: got 1, wanted a list of the samples": lambda: fused_lora.schedule([[1]], 8),
    "directory: got None": lambda: fused_lora.save_adapter(_model("a"), None, adapter_name="a"),
    "directory: got ''": lambda: fused_lora.load_adapter(_model(), ""),
    "double_quant: got 'no'": lambda: fused_lora.quantize_nf4(X, double_quant="no"),
    "block_size: got tensor(64)": lambda: fused_lora.quantize_fp4(X, block_size=torch.tensor(64)),
    "format: got 'abc'": lambda: fused_lora.QuantizedWeight(
        "abc", X, X, shape=(3, 6), dtype=torch.float32, block=(1, 64)
    ),
    "shape: got 3": lambda: fused_lora.QuantizedWeight(
        "nf4", X, X, shape=3, dtype=torch.float32, block=(1, 64)
    ),
    "block: got (1, 0)": lambda: fused_lora.QuantizedWeight(
        "nf4", X, X, shape=(3, 6), dtype=torch.float32, block=(1, 0)
    ),
    "codes: got str": lambda: fused_lora.QuantizedWeight(
        "int8", "abc", X, shape=(3, 6), dtype=torch.float32, block=(1, 0)
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_refused_by_name(message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        BAD_CALLS[message]()


def test_what_excludes_nothing_is_in_the_report():
    report = _inject(exclude_modules=["typo", "1"])
    assert report.layers == ("0",)
    assert report.skipped == {
        "typo of exclude_modules": "matches nothing that target_modules matches"
    }
    assert "no.* of exclude_modules" in _inject(exclude_modules="no.*").skipped
