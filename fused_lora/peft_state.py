"""What a layer of PEFT's is now: adapters, tensors and numbers, or why only PEFT's forward will do.

Looked at on each call, as nothing tells of a change: somebody merges, adds a hook, sets a scaling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import layer as peft_lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from . import checks, foreign
from .arguments import Arguments
from .autocast import autocast_enabled
from .calls import Backend
from .lookup import parameters
from .multi_linear import sample_segments
from .quantized_weight import QuantizedWeight

_OVER_CODES: tuple[type, ...] = ()  # PEFT's classes whose base weight is quantised
if is_bnb_4bit_available():
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    _OVER_CODES = (Linear4bit, Linear8bitLt)


def over_codes(layer: object) -> bool:
    """Whether the layer's base weight is quantised."""
    return isinstance(layer, _OVER_CODES)


# What `foreign.read` made of a base layer's parameter, and where its data was then.
_read_weights: Any = WeakIdKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def read_codes(base: nn.Module) -> QuantizedWeight:
    """The weight of a base layer of bitsandbytes', where it lies; read once."""
    parameter: Any = base.weight
    at = parameter.data_ptr()
    found = _read_weights.get(parameter)
    if found is None or found[0] != at:
        found = _read_weights[parameter] = (at, foreign.read(base))
    weight: QuantizedWeight = found[1]
    return weight


def compute_dtype(layer: Any, x: Tensor) -> torch.dtype:
    """The base layer's compute dtype, where it has one: in it and back, as bitsandbytes'."""
    return getattr(layer.base_layer, "compute_dtype", None) or x.dtype


class State(NamedTuple):
    """A layer, as it is now, which the fused path can take."""

    base: nn.Module
    names: list[str]  # of its adapters: the active ones, or those of a mixed batch
    calls: list[Arguments]  # for each, with the base layer's own weight and bias
    biases: list[Tensor | None]  # of each lora_B
    magnitude: Tensor | None  # of DoRA, the only variant: then of one adapter, and no mixed batch

    @property
    def is_simple(self) -> bool:
        """Whether the layer is no more than W0, A, B and a bias."""
        return len(self.calls) == 1 and self.magnitude is None and self.biases[0] is None


def usual(layer: Any, x: object) -> Arguments | None:
    """What nearly every layer passes on: W0, A, B and a bias of its own. None: `look` closer.

    Beside the modules' own dicts (see `lookup`) it reads nothing, and in one go: it runs for every
    token that is made. `look` alone made that 10 % slower at M 1, slower than PEFT.
    """
    if torch.jit.is_tracing() or layer._disable_adapters:  # type: ignore[attr-defined,no-untyped-call]
        return None
    if layer.merged_adapters or layer.lora_variant:
        return None
    modules = layer._modules
    base, As = modules["base_layer"], modules["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in As]
    if len(names) != 1:
        return None
    (name,) = names
    A, B = As[name], modules["lora_B"]._modules[name]
    dropout, scaling = modules["lora_dropout"]._modules[name], layer.scaling[name]
    if not type(base) is type(A) is type(B) is nn.Linear or type(scaling) is not float:
        return None
    dropout_p = 0.0
    if type(dropout) is nn.Dropout:
        dropout_p = float(dropout.p) if dropout.training else 0.0
    elif type(dropout) is not nn.Identity:
        return None
    hooked = checks.is_hooked
    if checks.all_are_hooked():
        return None
    if hooked(base) or hooked(A) or hooked(B) or hooked(dropout):
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    lora_A, lora_B = A._parameters.get("weight"), B._parameters.get("weight")
    if weight is None or lora_A is None or lora_B is None or weight.requires_grad:
        return None  # parametrised, pruned, or sharded by FSDP1
    if bias is None and "bias" not in base._parameters:  # elsewhere
        return None
    if A._parameters.get("bias", A) is not None or B._parameters.get("bias", B) is not None:
        return None
    if not abs(scaling) < math.inf or dropout_p >= 1 or weight.dtype not in checks.DTYPES:
        return None
    if not _is_dense(x):
        return None
    if x.dtype != weight.dtype and not autocast_enabled(x):
        return None
    return Arguments(weight, lora_A, lora_B, scaling, bias, dropout_p, layer.fused_lora_backend)


def arguments_of(state: State) -> Arguments:
    """What the layer passes on."""
    call = state.calls[0]
    if isinstance(state.base, Conv1D):
        weight: Any = call.weight
        call = call._replace(weight=weight.t())
    return call if state.is_simple else _in_one(state, call, call.weight.dtype)


def arguments_over_codes(state: State, dtype: torch.dtype) -> Arguments:
    """The same of a layer whose base weight is quantised, for an x in ``dtype``."""
    bias = state.calls[0].bias
    bias = None if bias is None else bias.to(dtype)  # bitsandbytes' follows x
    call = state.calls[0]._replace(weight=read_codes(state.base), bias=bias)
    return call if state.is_simple else _in_one(state, call, dtype)


def _in_one(state: State, call: Arguments, dtype: torch.dtype) -> Arguments:
    """``call``, the first adapter's, with all adapters and the biases of every lora_B, scaled."""
    pairs = zip(state.biases, state.calls, strict=True)
    biases = [bias * each.scaling for bias, each in pairs if bias is not None]
    if biases:
        total = sum(biases[1:], biases[0])
        call = call._replace(bias=(total if call.bias is None else call.bias + total).to(dtype))
    if len(state.calls) > 1:  # side by side: their products add up, and x is read once for all
        lora_A = torch.cat([each.lora_A for each in state.calls])
        lora_B = torch.cat([each.lora_B * each.scaling for each in state.calls], dim=1)
        call = call._replace(lora_A=lora_A, lora_B=lora_B, scaling=1.0)
    return call


def lasting_over_codes(layer: Any, state: State, x: Tensor) -> Arguments | None:
    """The arguments if they are the layer's own tensors, none made for this call."""
    bias = state.calls[0].bias
    if not state.is_simple:
        return None
    # Where x and y are cast nowhere on the way, and the bias neither.
    casts = {compute_dtype(layer, x), x.dtype if bias is None else bias.dtype}
    if autocast_enabled(x):
        casts = {torch.get_autocast_dtype(x.device.type)}
    return arguments_over_codes(state, x.dtype) if casts == {x.dtype} else None


def mixed_arguments(
    layer: Any, state: State, x: Tensor, names: Sequence[str]
) -> tuple[tuple[Any, list[Tensor], list[Tensor]], dict[str, Any]]:
    """What `lora_linear_multi` takes besides x, which is in the compute dtype."""
    calls, first = state.calls, state.calls[0]
    weight: Any = first.weight
    bias = first.bias
    if over_codes(layer):
        weight, bias = read_codes(state.base), None if bias is None else bias.to(x.dtype)
    elif isinstance(state.base, Conv1D):
        weight = weight.t()
    index = {name: i for i, name in enumerate(state.names)}
    return (weight, [call.lora_A for call in calls], [call.lora_B for call in calls]), {
        "scalings": [call.scaling for call in calls],
        "segments": sample_segments(x, [index.get(name, -1) for name in names]),
        "bias": bias,
        "dropout_p": first.dropout_p,
        "backend": first.backend,
    }


def _is_dense(x: object) -> TypeGuard[Tensor]:
    return isinstance(x, Tensor) and x.dim() > 0 and x.layout is torch.strided and not x.is_nested


def misfit(layer: Any, state: State, x: Any, names: Sequence[str] | None = None) -> str | None:
    """Why x is not for the fused path; then PEFT's forward raises its error. None if it is.

    ``names``: those of a mixed batch's samples.
    """
    fits = _is_dense(x)
    if fits and over_codes(layer):
        fits = x.dtype in checks.DTYPES
    elif fits:
        fits = x.dtype == state.calls[0].weight.dtype or autocast_enabled(x)
    if not fits:
        return "x is not what the base layer takes"
    if names is not None and (x.dim() == 1 or len(x) != len(names)):
        return "adapter_names are not one for each sample of x"
    return None


def obstacle(layer: peft_lora.Linear, adapter_names: Sequence[str] | None = None) -> str | None:
    """Why this `peft.tuners.lora.Linear`, in its present state, goes to PEFT's own forward.

    None if the fused path takes it. ``adapter_names``: those of a mixed batch's samples, which then
    count instead of the active ones.
    """
    found = look(layer, adapter_names)
    return found if isinstance(found, str) else None


def look(layer: Any, mixed: Sequence[str] | None = None) -> State | str:
    """What the layer's call depends on, with `obstacle`'s arguments; or what that gives."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return "torch.jit.trace records PyTorch's own operators"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    modules = layer._modules
    base = modules["base_layer"]
    quantized = over_codes(layer)
    if quantized:
        try:
            read_codes(base)
        except (TypeError, ValueError) as error:
            return f"its base layer cannot be read: {error}"
    elif type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"its base layer is a {type(base).__name__}, not an nn.Linear or Conv1D"
    weight, bias = parameters(base, "weight", "bias")
    if not quantized and weight.dtype not in checks.DTYPES:
        return f"its base weight is {weight.dtype}"
    if weight.requires_grad and torch.is_grad_enabled():
        return "its base weight requires a gradient"
    if checks.is_hooked(base):
        return "its base layer has hooks"
    if checks.all_are_hooked():
        return "there are hooks on all modules"
    As, Bs = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts, variants = modules["lora_dropout"]._modules, layer.lora_variant
    backend: Backend = getattr(layer, "fused_lora_backend", "auto")  # not fused yet
    state = State(base, [], [], [], None)
    for name in layer.active_adapters if mixed is None else dict.fromkeys(mixed):
        if name not in As:  # to PEFT it is none there, or "__base__"
            continue
        A, B, dropout, scaling = As[name], Bs[name], dropouts[name], layer.scaling[name]
        if type(A) is not nn.Linear or type(B) is not nn.Linear:
            return f"adapter {name!r} is made of {type(A).__name__} and {type(B).__name__}"
        if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
            return f"adapter {name!r} has a {type(dropout).__name__} for its dropout"
        if checks.is_hooked(A) or checks.is_hooked(B) or checks.is_hooked(dropout):
            return f"adapter {name!r} has hooks"
        lora_A, bias_A = parameters(A, "weight", "bias")
        lora_B, bias_B = parameters(B, "weight", "bias")
        if bias_A is not None:
            return f"adapter {name!r} has a bias in its lora_A"
        # By a comparison: Dynamo knows no isfinite of a float that changes.
        number = isinstance(scaling, (int, float)) and not isinstance(scaling, bool)
        if not number or not abs(scaling) < math.inf:
            return f"adapter {name!r} has {scaling!r} for its scaling, not a finite number"
        dropout_p = 0.0
        if type(dropout) is nn.Dropout and dropout.training:
            dropout_p = float(dropout.p)
        if name in variants:
            why = _variant_obstacle(layer, name)
            if why is not None:
                return why
            state = state._replace(magnitude=layer.lora_magnitude_vector[name].weight)
            dropout_p = dropout_p if layer.training else 0.0  # where PEFT's DoRA looks
        if dropout_p >= 1:
            return f"adapter {name!r} drops everything"
        state.names.append(name)
        state.biases.append(bias_B)
        state.calls.append(Arguments(weight, lora_A, lora_B, scaling, bias, dropout_p, backend))
    if not state.names:
        return "none of its adapters is active"
    why = None
    if mixed is not None:
        why = _mixed_obstacle(state, quantized)
    elif len(state.names) > 1:
        why = _several_obstacle(layer, state)
    return state if why is None else why


def _mixed_obstacle(state: State, quantized: bool) -> str | None:
    weight = state.calls[0].weight
    if not quantized and type(weight) is not nn.Parameter:
        return f"its base weight is a {type(weight).__name__}"
    if state.magnitude is not None:
        return "the batch mixes adapters with a variant of LoRA"
    if any(bias is not None for bias in state.biases):
        return "the batch mixes adapters with lora_bias"
    if len({call.dropout_p for call in state.calls}) > 1:
        return "the batch mixes adapters of different dropout"
    return None


def _several_obstacle(layer: Any, state: State) -> str | None:
    for name in state.names:
        if name in layer.lora_variant:
            return f"several adapters are active, and {name!r} is DoRA's"
    if any(call.dropout_p for call in state.calls):
        return "several adapters are active, each with a dropout mask of its own"
    return None


def _variant_obstacle(layer: Any, name: str) -> str | None:
    if type(layer.lora_variant[name]) is not DoraLinearVariant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    magnitude = layer.lora_magnitude_vector[name]
    if type(magnitude) is not DoraLinearLayer or checks.is_hooked(magnitude):
        return f"adapter {name!r} has a changed {type(magnitude).__name__}"
    return None
