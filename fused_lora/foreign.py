"""Quantised layers of bitsandbytes and torchao, read as they are: nothing is copied or converted.

By their attributes, with neither library imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .codes import FP8
from .quantized_weight import QuantizedWeight


def is_quantized(module: nn.Module) -> bool:
    """Whether the module is a linear layer that `read` knows, whatever its state."""
    return _reader(module) is not None


def read(linear: nn.Module) -> QuantizedWeight:
    """The weight of bitsandbytes' Linear4bit or Linear8bitLt, or of torchao's int8 or fp8 Linear.

    The storage is shared. Raises TypeError for any other layer, and ValueError for one that is not
    quantised yet, or in a way that we cannot read.
    """
    reader = _reader(linear)
    if reader is None:
        raise TypeError(
            f"linear: got {type(linear).__name__}, wanted torch.nn.Linear, bitsandbytes' "
            "Linear4bit or Linear8bitLt, or one that torchao made int8 or float8"
        )
    weight: QuantizedWeight = reader(linear)
    return weight


def _reader(module: nn.Module) -> Any:
    weight = getattr(module, "weight", None)
    library = type(weight).__module__.partition(".")[0]
    name = type(weight).__name__
    if library == "torchao" and type(module) is nn.Linear:
        return _torchao if name in ("Int8Tensor", "Float8Tensor") else None
    if type(module).__module__.partition(".")[0] != "bitsandbytes":
        return None
    bases = {base.__name__ for base in type(module).__mro__}
    return _four_bit if "Linear4bit" in bases else _int8 if "Linear8bitLt" in bases else None


def _four_bit(linear: Any) -> QuantizedWeight:
    weight = linear.weight
    state = getattr(weight, "quant_state", None) or getattr(linear, "quant_state", None)
    if state is None:
        raise ValueError("linear: is a Linear4bit that is not quantised yet; move it to its device")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            "linear: its codes are in bitsandbytes' CPU order, into which a call in eval() puts "
            "them; wanted a layer that was not called in eval() yet"
        )
    nested: dict[str, Any] = {}
    if state.state2 is not None:
        if state.state2.blocksize != 256:
            raise ValueError(f"linear: nested block size {state.state2.blocksize}, wanted 256")
        nested = {
            "nested_scales": state.state2.absmax.float(),
            "nested_codebook": state.state2.code.float(),
            "nested_offset": state.offset.float().view(1),
        }
    N, K = state.shape
    return QuantizedWeight(
        state.quant_type,
        weight.detach().view(torch.uint8).view(-1),  # quant_storage may be a wider dtype
        state.absmax if nested else state.absmax.float(),
        shape=(N, K),
        dtype=state.dtype,
        block=(1, state.blocksize),
        codebook=state.code.float(),
        **nested,
    )


def _int8(linear: Any) -> QuantizedWeight:
    if linear.state.has_fp16_weights:
        raise ValueError("linear: is a Linear8bitLt that keeps its weight in fp16")
    absmax = linear.weight.SCB if linear.weight.SCB is not None else linear.state.SCB
    if absmax is None or linear.weight.dtype != torch.int8:
        raise ValueError(
            "linear: is a Linear8bitLt that is not quantised yet; move it to its device"
        )
    return QuantizedWeight(
        "int8",
        linear.weight.detach(),
        absmax.float() / 127.0,
        shape=(linear.out_features, linear.in_features),
        dtype=torch.float16 if linear.bias is None else linear.bias.dtype,
        block=(1, 0),
    )


def _torchao(linear: Any) -> QuantizedWeight:
    weight = linear.weight
    if getattr(weight, "act_quant_kwargs", None) is not None:
        # A scale for a row of x or for all of it, rounded to x's dtype or not, as the backend that
        # torchao finds has it: nothing that could be followed to the bit.
        raise ValueError(
            "linear: torchao quantises its input too, with scales that we do not have; "
            'fused_lora.quantize_fp8(weight, activations="fp8") has one for 128 columns of x'
        )
    if getattr(weight, "act_pre_scale", None) is not None:
        raise ValueError("linear: torchao scales its input, which we do not")
    zero_point = getattr(weight, "zero_point", None)
    if zero_point is not None and zero_point.any():
        raise ValueError("linear: its int8 weight has zero points, wanted a symmetric one")
    if weight.qdata.dtype not in (torch.int8, FP8):
        raise ValueError(f"linear: its codes are {weight.qdata.dtype}, wanted int8 or {FP8}")
    N, K = weight.qdata.shape
    rows, cols = weight.block_size
    return QuantizedWeight(
        "int8" if weight.qdata.dtype == torch.int8 else "fp8",
        weight.qdata,
        weight.scale.float(),
        shape=(N, K),
        dtype=weight.dtype,
        block=(0 if rows == N else rows, 0 if cols == K else cols),
    )
