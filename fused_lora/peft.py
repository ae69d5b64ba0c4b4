"""PEFT models on the fused path: `fuse` swaps a live model's forwards in place, `unfuse` undoes it.

    report = fused_lora.peft.fuse(model)   # model: PeftModel, or any module with PEFT's LoRA layers
    print(report)

Only the class of each layer changes. Parameters, names, hooks, optimisers and checkpoints stay as
they are, and a layer's state (active adapters, merged, disabled, ...) is looked at on each call: a
call that the fused path does not take goes to PEFT's own forward. Needs the extra "peft".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType, TracebackType
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import layer as peft_lora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from . import checks, foreign, sharing
from .arguments import Arguments
from .autocast import autocast_enabled
from .dispatch import Backend, Explanation
from .functional import dora_linear, explain, lora_linear
from .lookup import parameters
from .multi import explain_multi, lora_linear_multi
from .multi_linear import sample_segments
from .quantize import QuantizedWeight
from .sharing import SharedInput


class _FusedForward:
    """In front of a class of PEFT's: its forward in one fused call, wherever that is the same."""

    fused_lora_backend: Backend = "auto"
    fused_lora_group: SharedInput | None = None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> y [..., N], as PEFT's."""
        names = kwargs.get("adapter_names")
        ours = not args and (not kwargs or (len(kwargs) == 1 and names is not None))
        found = _look(self, names) if ours else ""
        if isinstance(found, str) or _misfit(self, found, x, names) is not None:
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        if names is not None:
            return _mixed_batch(self, found, x, names)
        group = self.fused_lora_group
        if group is not None and group.pays(x, self.fused_lora_backend):
            shared: Tensor | None = group.output(self, x, _lasting_arguments(self, found, x))
            if shared is not None:
                return shared
        if isinstance(self, _OVER_CODES):
            y = _quantized(self, found, x)
            return y
        return _fused(found, x, _arguments(found))

    def explain(self: Any, x: Tensor, *, adapter_names: Sequence[str] | None = None) -> Explanation:
        """Which backend and strategy `forward` takes for x, and why, or why it is PEFT's own.

        Computes nothing; raises what `fused_lora.explain` does.
        """
        found = _look(self, adapter_names)
        if not isinstance(found, str):
            found = _misfit(self, found, x, adapter_names) or found
        if isinstance(found, str):
            reasons = {"fused": f"not taken: {found}", "peft": "taken: PEFT's own forward"}
            return Explanation("torch", "peft", "peft", reasons)
        quantized = isinstance(self, _OVER_CODES)
        if quantized:
            x = torch.empty_like(x, dtype=_compute_dtype(self, x))
        if adapter_names is not None:
            tensors, options = _mixed_arguments(self, found, x, adapter_names)
            return explain_multi(x, *tensors, **options)
        call = _arguments_over_codes(found, x.dtype) if quantized else _arguments(found)
        adapter = (call.lora_A, call.lora_B)
        return explain(x, call.weight, *adapter, magnitude=found.magnitude, **call.options())


class FusedPeftLinear(_FusedForward, peft_lora.Linear):  # type: ignore[misc]  # peft is untyped
    """`peft.tuners.lora.Linear` on the fused path."""


# PEFT's classes of layers that can be fused, and what they become.
_FUSED: dict[type, type] = {peft_lora.Linear: FusedPeftLinear}
_OVER_CODES: tuple[type, ...] = ()  # those whose base weight is quantised

if is_bnb_4bit_available():
    from peft.tuners.lora import bnb as peft_bnb

    class FusedPeftLinear4bit(_FusedForward, peft_bnb.Linear4bit):  # type: ignore[misc]
        """PEFT's LoRA over bitsandbytes' Linear4bit, on the fused path."""

    class FusedPeftLinear8bitLt(_FusedForward, peft_bnb.Linear8bitLt):  # type: ignore[misc]
        """PEFT's LoRA over bitsandbytes' Linear8bitLt, on the fused path: x stays as it is."""

    _FUSED |= {
        peft_bnb.Linear4bit: FusedPeftLinear4bit,
        peft_bnb.Linear8bitLt: FusedPeftLinear8bitLt,
    }
    _OVER_CODES = (peft_bnb.Linear4bit, peft_bnb.Linear8bitLt)

# What `foreign.read` made of a base layer's parameter, and where its data was then.
_read_weights: Any = WeakIdKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _read(base: nn.Module) -> QuantizedWeight:
    parameter: Any = base.weight
    at = parameter.data_ptr()
    found = _read_weights.get(parameter)
    if found is None or found[0] != at:
        found = _read_weights[parameter] = (at, foreign.read(base))
    weight: QuantizedWeight = found[1]
    return weight


def _compute_dtype(layer: Any, x: Tensor) -> torch.dtype:
    """The base layer's compute dtype, where it has one: in it and back, as bitsandbytes'."""
    return getattr(layer.base_layer, "compute_dtype", None) or x.dtype


class _State(NamedTuple):
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


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _quantized(layer: Any, state: _State, x: Tensor) -> Tensor:
    dtype = _compute_dtype(layer, x)
    return _fused(state, x.to(dtype), _arguments_over_codes(state, dtype)).to(x.dtype)


def _fused(state: _State, x: Tensor, call: Arguments) -> Tensor:
    if state.magnitude is not None:
        adapter = (call.lora_A, call.lora_B, state.magnitude)
        return dora_linear(x, call.weight, *adapter, **call.options())
    return lora_linear(
        x,
        call.weight,
        call.lora_A,
        call.lora_B,
        scaling=call.scaling,
        bias=call.bias,
        dropout_p=call.dropout_p,
        backend=call.backend,
    )


def _arguments(state: _State) -> Arguments:
    """What the layer passes on."""
    call = state.calls[0]
    if isinstance(state.base, Conv1D):
        weight: Any = call.weight
        call = call._replace(weight=weight.t())
    return call if state.is_simple else _in_one(state, call, call.weight.dtype)


def _arguments_over_codes(state: _State, dtype: torch.dtype) -> Arguments:
    bias = state.calls[0].bias
    bias = None if bias is None else bias.to(dtype)  # bitsandbytes' follows x
    call = state.calls[0]._replace(weight=_read(state.base), bias=bias)
    return call if state.is_simple else _in_one(state, call, dtype)


def _in_one(state: _State, call: Arguments, dtype: torch.dtype) -> Arguments:
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


def _lasting_arguments(layer: Any, state: _State, x: Tensor) -> Arguments | None:
    """The arguments if they are the layer's own tensors, none made for this call."""
    base, bias = state.base, state.calls[0].bias
    if not state.is_simple:
        return None
    if not isinstance(layer, _OVER_CODES):
        return state.calls[0] if type(base) is nn.Linear else None
    # Where x and y are cast nowhere on the way, and the bias neither.
    casts = {_compute_dtype(layer, x), x.dtype if bias is None else bias.dtype}
    if autocast_enabled(x):
        casts = {torch.get_autocast_dtype(x.device.type)}
    return _arguments_over_codes(state, x.dtype) if casts == {x.dtype} else None


def _member_arguments(layer: Any, x: Tensor) -> Arguments | None:
    """What a layer that is still to be called will pass on; None if it will do something else."""
    found = _look(layer)
    if isinstance(found, str) or _misfit(layer, found, x) is not None:
        return None
    return _lasting_arguments(layer, found, x)


def _mixed_batch(layer: Any, state: _State, x: Tensor, names: Sequence[str]) -> Tensor:
    quantized = isinstance(layer, _OVER_CODES)
    cast = x.to(_compute_dtype(layer, x)) if quantized else x
    tensors, options = _mixed_arguments(layer, state, cast, names)
    y = lora_linear_multi(cast, *tensors, **options)
    return y.to(x.dtype) if quantized else y


def _mixed_arguments(
    layer: Any, state: _State, x: Tensor, names: Sequence[str]
) -> tuple[tuple[Any, list[Tensor], list[Tensor]], dict[str, Any]]:
    """What `lora_linear_multi` takes besides x, which is in the compute dtype."""
    calls, first = state.calls, state.calls[0]
    weight: Any = first.weight
    bias = first.bias
    if isinstance(layer, _OVER_CODES):
        weight, bias = _read(state.base), None if bias is None else bias.to(x.dtype)
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


def _misfit(layer: Any, state: _State, x: Any, names: Sequence[str] | None = None) -> str | None:
    """Why x is not for the fused path; then PEFT's forward raises its error. None if it is.

    ``names``: those of a mixed batch's samples.
    """
    fits = isinstance(x, Tensor) and x.dim() > 0
    if fits and isinstance(layer, _OVER_CODES):
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
    found = _look(layer, adapter_names)
    return found if isinstance(found, str) else None


def _look(layer: Any, mixed: Sequence[str] | None = None) -> _State | str:
    """What the layer's call depends on, with `obstacle`'s arguments; or what that gives.

    As often as every token that is made, so by the modules' own dicts and in one go: attribute by
    attribute, function by function it took longer than all else that Python does for the call.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return "torch.jit.trace records PyTorch's own operators"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    modules = layer._modules
    base = modules["base_layer"]
    quantized = isinstance(layer, _OVER_CODES)
    if quantized:
        try:
            _read(base)
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
    As, Bs = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts, variants = modules["lora_dropout"]._modules, layer.lora_variant
    backend: Backend = getattr(layer, "fused_lora_backend", "auto")  # not fused yet
    state = _State(base, [], [], [], None)
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
        if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
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


def _mixed_obstacle(state: _State, quantized: bool) -> str | None:
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


def _several_obstacle(layer: Any, state: _State) -> str | None:
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


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did; ``print`` it to read it. As a context manager it unfuses on leaving."""

    fused: tuple[str, ...]  # paths of the layers on the fused path
    not_fused: dict[str, str]  # path -> why PEFT's own forward runs there
    groups: tuple[tuple[str, ...], ...]  # paths of layers that are computed together
    _model: nn.Module = field(repr=False)

    def __str__(self) -> str:
        total = len(self.fused) + len(self.not_fused)
        lines = [f"{len(self.fused)} of {total} LoRA layers fused"]
        width = max(map(len, self.not_fused), default=0)
        lines += [f"  {path:{width}}  not fused: {why}" for path, why in self.not_fused.items()]
        lines += sharing.describe_groups(self.groups)
        return "\n".join(lines)

    def __enter__(self) -> FuseReport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unfuse(self._model)


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, peft_lora.LoraLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, peft_lora.LoraLayer):
            yield path, module


def _swap(layer: peft_lora.Linear, new: type[peft_lora.Linear]) -> None:
    old = type(layer)
    layer.__class__ = new
    wrapped = layer.__dict__.get("_old_forward")  # accelerate calls this one between its hooks
    if isinstance(wrapped, MethodType) and wrapped.__func__ is old.forward:
        layer._old_forward = MethodType(new.forward, layer)


def _cannot_swap(layer: peft_lora.LoraLayer) -> str | None:
    if type(layer) not in _FUSED and type(layer) not in _FUSED.values():
        return f"is a {type(layer).__module__}.{type(layer).__name__}, not a lora.Linear"
    if "forward" in layer.__dict__ and "_old_forward" not in layer.__dict__:
        return "its forward was replaced by another library"
    return None


def fuse(
    model: nn.Module, *, strict: bool = False, backend: Backend = "auto", groups: bool = True
) -> FuseReport:
    """Puts every eligible `peft.tuners.lora.Linear` of a live model on the fused path, in place.

    And the LoRA layers over bitsandbytes' Linear4bit and Linear8bitLt; over the latter x is not
    rounded to int8, which bitsandbytes does. Of DoRA's norm over either nothing is rounded.

    On the fast path: dropout, bias, ``lora_bias``, rsLoRA, DoRA, fp32 adapters over a half base,
    Conv1D (GPT-2), several active adapters, batches that mix adapters (``adapter_names``), over
    4 and 8 bits too, ``scale_layer``, patterns of r and alpha. A layer whose
    state does not allow it now (merged, disabled, ...) is listed with the reason and takes the
    fast path as soon as its state does. Calling it again changes nothing.

    Args:
        model: a PeftModel, or any module that contains PEFT's LoRA layers.
        strict: raise instead of leaving a layer to PEFT.
        backend: as for `lora_linear`.
        groups: compute the projections that share their input (q, k, v; gate, up) together, in the
            model families where they are known to: Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2 and
            Gemma3. See `fused_lora.sharing` for how; `lora_linear_group` for what it saves. Under
            torch.compile each is computed on its own.

    Raises:
        TypeError: model is no module.
        ValueError: it has no LoRA layers of PEFT's; or, if ``strict``, one that is not fused. The
            model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    checks.check_backend(backend)
    layers = dict(_lora_layers(model))
    if not layers:
        raise ValueError(
            "model: has no LoRA layers of PEFT's; wanted a PeftModel with a LoraConfig "
            "(for a plain model there is fused_lora.inject)"
        )
    not_fused = {}
    for path, layer in layers.items():
        why = _cannot_swap(layer) or obstacle(layer)
        if why is not None:
            not_fused[path] = why
    if strict and not_fused:
        listed = "; ".join(f"{path}: {why}" for path, why in not_fused.items())
        raise ValueError(f"model: {len(not_fused)} LoRA layers cannot be fused: {listed}")
    for layer in layers.values():
        if _cannot_swap(layer) is None:
            if type(layer) in _FUSED:
                _swap(layer, _FUSED[type(layer)])
            layer.fused_lora_backend = backend
            layer.__dict__.pop("fused_lora_group", None)
    found = tuple(sharing.find_groups(model, _FUSED.values())) if groups else ()
    for paths in found:
        group = SharedInput([model.get_submodule(path) for path in paths], _member_arguments)
        for layer in group.members:
            layer.__dict__["fused_lora_group"] = group
    fused = tuple(path for path in layers if path not in not_fused)
    return FuseReport(fused, not_fused, found, model)


def unfuse(model: nn.Module) -> None:
    """Gives every fused layer PEFT's own class back. Nothing happens where none is fused."""
    sharing.forget()
    for _, layer in _lora_layers(model):
        for plain, fused in _FUSED.items():
            if type(layer) is fused:
                layer.__dict__.pop("fused_lora_group", None)
                del layer.__dict__["fused_lora_backend"]
                _swap(layer, plain)


def register(config: LoraConfig) -> None:
    """Makes models still to be created with ``config`` come fused, by PEFT's custom-module hook.

    Quantised and other subclasses of `nn.Linear` fall through to PEFT's own dispatch.

    Raises TypeError unless ``config`` is a `peft.LoraConfig`.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: got {type(config).__name__}, wanted a peft.LoraConfig")
    config._register_custom_module({nn.Linear: _create, Conv1D: _create})


def _create(
    target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
) -> nn.Module | None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if type(base) is not nn.Linear and type(base) is not Conv1D:
        return None
    layer = peft_lora.dispatch_default(target, adapter_name, config=config, **kwargs)
    if type(layer) is peft_lora.Linear:
        _swap(layer, FusedPeftLinear)
        layer.fused_lora_backend = "auto"
    return layer  # type: ignore[no-any-return]
