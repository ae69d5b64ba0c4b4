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
from typing import Any

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
from .backends import autocast_enabled
from .dispatch import Backend, Explanation
from .functional import dora_linear, explain, lora_linear
from .multi import explain_multi, lora_linear_multi
from .multi_linear import sample_segments
from .quantize import QuantizedWeight
from .sharing import Arguments, SharedInput


class _FusedForward:
    """In front of a class of PEFT's: its forward in one fused call, wherever that is the same."""

    fused_lora_backend: Backend = "auto"
    fused_lora_group: SharedInput | None = None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> y [..., N], as PEFT's."""
        names = kwargs.get("adapter_names")
        if not args and len(kwargs) == 1 and names is not None and _takes_batch(self, x, names):
            return _mixed_batch(self, x, names)
        if args or kwargs or obstacle(self) is not None or not _fits(self, x):
            y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        if self.fused_lora_group is not None and not torch.compiler.is_compiling():
            shared: Tensor | None = self.fused_lora_group.output(self, x)
            if shared is not None:
                return shared
        if isinstance(self, _OVER_CODES):
            y = _quantized(self, x)
            return y
        return _fused(self, x, _plain_arguments(self))

    def explain(self: Any, x: Tensor, *, adapter_names: Sequence[str] | None = None) -> Explanation:
        """Which backend and strategy `forward` takes for x, and why, or why it is PEFT's own.

        Computes nothing; raises what `fused_lora.explain` does.
        """
        why = obstacle(self, adapter_names)
        if why is None and not _fits(self, x):
            why = "x is not what the base layer takes"
        if why is None and adapter_names is not None and not _takes_batch(self, x, adapter_names):
            why = "adapter_names are not one for each sample of x"
        if why is not None:
            reasons = {"fused": f"not taken: {why}", "peft": "taken: PEFT's own forward"}
            return Explanation("torch", "peft", "peft", reasons)
        quantized = isinstance(self, _OVER_CODES)
        if quantized:
            x = torch.empty_like(x, dtype=_compute_dtype(self, x))
        if adapter_names is not None:
            tensors, options = _mixed_arguments(self, x, adapter_names)
            return explain_multi(x, *tensors, **options)
        if quantized:
            call = _arguments(self, _read(self.base_layer), x.dtype)
        else:
            call = _plain_arguments(self)
        adapter = (call.lora_A, call.lora_B)
        return explain(x, call.weight, *adapter, magnitude=_magnitude(self), **_options(call))


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


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _quantized(layer: Any, x: Tensor) -> Tensor:
    dtype = _compute_dtype(layer, x)
    return _fused(layer, x.to(dtype), _arguments(layer, _read(layer.base_layer), dtype)).to(x.dtype)


def _fused(layer: Any, x: Tensor, call: Arguments) -> Tensor:
    base, adapter = (x, call.weight), (call.lora_A, call.lora_B)
    magnitude = _magnitude(layer)
    if magnitude is not None:
        return dora_linear(*base, *adapter, magnitude, **_options(call))
    return lora_linear(*base, *adapter, **_options(call))


def _options(call: Arguments) -> dict[str, Any]:
    return {
        "scaling": call.scaling,
        "bias": call.bias,
        "dropout_p": call.dropout_p,
        "backend": call.backend,
    }


def _magnitude(layer: Any) -> Tensor | None:
    """DoRA's, of the active adapter: the only variant that `obstacle` lets through."""
    first = _active(layer)[0]
    if first not in layer.lora_variant:
        return None
    magnitude: Tensor = layer.lora_magnitude_vector[first].weight
    return magnitude


def _plain_arguments(layer: FusedPeftLinear) -> Arguments:
    base = layer.base_layer
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    return _arguments(layer, weight, weight.dtype)


def _arguments(layer: Any, weight: Any, dtype: torch.dtype) -> Arguments:
    adapters = _active(layer)
    first = adapters[0]
    lora_A, lora_B = layer.lora_A[first].weight, layer.lora_B[first].weight
    scaling = layer.scaling[first]
    if len(adapters) > 1:  # side by side: their products add up, and x is read once for all
        lora_A = torch.cat([layer.lora_A[a].weight for a in adapters])
        lora_B = torch.cat([layer.lora_B[a].weight * layer.scaling[a] for a in adapters], dim=1)
        scaling = 1.0
    return Arguments(
        weight=weight,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=scaling,
        bias=_bias(layer, adapters, dtype),
        dropout_p=_dropout_p(layer, first),
        backend=layer.fused_lora_backend,
    )


def _lasting_arguments(layer: FusedPeftLinear, x: Tensor) -> Arguments | None:
    """The arguments if they are the layer's own tensors, none made for this call."""
    if obstacle(layer) is not None or not _fits(layer, x):
        return None
    adapters = _active(layer)
    first = adapters[0]
    if len(adapters) > 1 or first in layer.lora_variant or layer.lora_B[first].bias is not None:
        return None
    base = layer.base_layer
    if not isinstance(layer, _OVER_CODES):
        return _plain_arguments(layer) if type(base) is nn.Linear else None
    # Where x and y are cast nowhere on the way, and the bias neither.
    casts = {_compute_dtype(layer, x), x.dtype if base.bias is None else base.bias.dtype}
    if autocast_enabled(x):
        casts = {torch.get_autocast_dtype(x.device.type)}
    return _arguments(layer, _read(base), x.dtype) if casts == {x.dtype} else None


def _takes_batch(layer: FusedPeftLinear, x: object, names: Sequence[str]) -> bool:
    """Whether the fused path takes x with ``names`` of adapters for its samples."""
    if obstacle(layer, names) is not None or not _fits(layer, x):
        return False
    assert isinstance(x, Tensor)
    return x.dim() > 1 and len(x) == len(names)  # else PEFT's forward raises its error


def _mixed_batch(layer: FusedPeftLinear, x: Tensor, names: Sequence[str]) -> Tensor:
    quantized = isinstance(layer, _OVER_CODES)
    cast = x.to(_compute_dtype(layer, x)) if quantized else x
    tensors, options = _mixed_arguments(layer, cast, names)
    y = lora_linear_multi(cast, *tensors, **options)
    return y.to(x.dtype) if quantized else y


def _mixed_arguments(
    layer: FusedPeftLinear, x: Tensor, names: Sequence[str]
) -> tuple[tuple[Any, list[Tensor], list[Tensor]], dict[str, Any]]:
    """What `lora_linear_multi` takes besides x, which is in the compute dtype."""
    base = layer.base_layer
    weight: Any = base.weight
    if isinstance(layer, _OVER_CODES):
        weight = _read(base)
    elif isinstance(base, Conv1D):
        weight = weight.t()
    adapters = _named(layer, names)
    index = {name: i for i, name in enumerate(adapters)}
    As = [layer.lora_A[name].weight for name in adapters]
    Bs = [layer.lora_B[name].weight for name in adapters]
    return (weight, As, Bs), {
        "scalings": [layer.scaling[name] for name in adapters],
        "segments": sample_segments(x, [index.get(name, -1) for name in names]),
        "bias": _bias(layer, [], x.dtype),
        "dropout_p": _dropout_p(layer, adapters[0]),
        "backend": layer.fused_lora_backend,
    }


def _named(layer: peft_lora.Linear, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that the layer has, each once; to PEFT the others are "__base__"."""
    return [name for name in dict.fromkeys(names) if name in layer.lora_A]


def _active(layer: peft_lora.Linear) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _dropout_p(layer: peft_lora.Linear, adapter: str) -> float:
    dropout = layer.lora_dropout[adapter]
    if adapter in layer.lora_variant and not layer.training:  # where PEFT's DoRA looks
        return 0.0
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def _bias(layer: peft_lora.Linear, adapters: list[str], dtype: torch.dtype) -> Tensor | None:
    """The base layer's bias and those of every lora_B (`lora_bias=True`), scaled, in one."""
    bias: Tensor | None = layer.base_layer.bias
    if bias is not None and isinstance(layer, _OVER_CODES):
        bias = bias.to(dtype)  # bitsandbytes' follows x
    biased = [name for name in adapters if layer.lora_B[name].bias is not None]
    if not biased:
        return bias
    total = sum(layer.lora_B[name].bias * layer.scaling[name] for name in biased)
    assert isinstance(total, Tensor)
    return (total if bias is None else bias + total).to(dtype)


def _fits(layer: peft_lora.Linear, x: object) -> bool:
    """Whether x is what the base layer takes; where it isn't, PEFT's forward raises its error."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return False
    if isinstance(layer, _OVER_CODES):
        return x.dtype in checks.DTYPES
    return x.dtype == layer.base_layer.weight.dtype or autocast_enabled(x)


def obstacle(layer: peft_lora.Linear, adapter_names: Sequence[str] | None = None) -> str | None:
    """Why this `peft.tuners.lora.Linear`, in its present state, goes to PEFT's own forward.

    None if the fused path takes it. ``adapter_names``: those of a mixed batch's samples, which then
    count instead of the active ones.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return "torch.jit.trace records PyTorch's own operators"
    if layer.disable_adapters:
        return "its adapters are disabled"
    if layer.merged:
        return "its adapters are merged"
    base = layer.base_layer
    quantized = isinstance(layer, _OVER_CODES)
    if quantized:
        try:
            _read(base)
        except (TypeError, ValueError) as error:
            return f"its base layer cannot be read: {error}"
    elif type(base) is not nn.Linear and type(base) is not Conv1D:
        return f"its base layer is a {type(base).__name__}, not an nn.Linear or Conv1D"
    elif base.weight.dtype not in checks.DTYPES:
        return f"its base weight is {base.weight.dtype}"
    if base.weight.requires_grad and torch.is_grad_enabled():
        return "its base weight requires a gradient"
    if checks.is_hooked(base):
        return "its base layer has hooks"
    adapters = _active(layer) if adapter_names is None else _named(layer, adapter_names)
    if not adapters:
        return "none of its adapters is active"
    if adapter_names is not None:
        if not quantized and type(base.weight) is not nn.Parameter:
            return f"its base weight is a {type(base.weight).__name__}"
        if any(name in layer.lora_variant for name in adapters):
            return "the batch mixes adapters with a variant of LoRA"
        if any(layer.lora_B[name].bias is not None for name in adapters):
            return "the batch mixes adapters with lora_bias"
        if len({_dropout_p(layer, name) for name in adapters}) > 1:
            return "the batch mixes adapters of different dropout"
    for name in adapters:
        if name in layer.lora_variant:
            why = _variant_obstacle(layer, name, adapters)
            if why is not None:
                return why
        A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if type(A) is not nn.Linear or type(B) is not nn.Linear:
            return f"adapter {name!r} is made of {type(A).__name__} and {type(B).__name__}"
        if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
            return f"adapter {name!r} has a {type(dropout).__name__} for its dropout"
        if A.bias is not None:
            return f"adapter {name!r} has a bias in its lora_A"
        if checks.is_hooked(A) or checks.is_hooked(B) or checks.is_hooked(dropout):
            return f"adapter {name!r} has hooks"
        scaling = layer.scaling[name]
        if not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
            return f"adapter {name!r} has {scaling!r} for its scaling, not a finite number"
        if _dropout_p(layer, name) >= 1:
            return f"adapter {name!r} drops everything"
        if adapter_names is None and len(adapters) > 1 and _dropout_p(layer, name):
            return "several adapters are active, each with a dropout mask of its own"
    return None


def _variant_obstacle(layer: peft_lora.Linear, name: str, adapters: list[str]) -> str | None:
    if type(layer.lora_variant[name]) is not DoraLinearVariant:
        return f"adapter {name!r} is a {type(layer.lora_variant[name]).__name__}"
    if len(adapters) > 1:
        return f"several adapters are active, and {name!r} is DoRA's"
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
        group = SharedInput([model.get_submodule(path) for path in paths], _lasting_arguments)
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
