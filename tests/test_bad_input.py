"""Every invalid call raises an error that names the argument, before anything is launched."""

import math
import re
import subprocess
import sys

import pytest
import torch

from fused_lora import FusedLoRALinear, explain, lora_linear

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
