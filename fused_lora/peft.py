"""PEFT models on the fused path: `fuse` swaps a live model's forwards in place, `unfuse` undoes it.

    report = fused_lora.peft.fuse(model)   # model: PeftModel, or any module with PEFT's LoRA layers
    print(report)

Only the class of each layer changes, and that of gated MLPs. Parameters, names, hooks, optimisers
and checkpoints stay as they are, and a layer's state (active adapters, merged, disabled, ...) is
looked at on each call: a call that the fused path does not take goes to PEFT's own forward. Needs
the extra "peft".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import MethodType, TracebackType
from typing import Any

import torch
from peft import LoraConfig
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import layer as peft_lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import checks, peft_experts, sharing
from .arguments import Arguments
from .calls import Backend
from .expert_modules import describe_mixtures
from .explanation import Explanation
from .functional import call_layer, dora_linear, explain
from .gated_mlp import describe_mlps, gate_mlps, ungate_mlps
from .multi import explain_multi, lora_linear_multi
from .peft_experts import FusedPeftExperts, wrappers
from .peft_state import (
    State,
    arguments_of,
    arguments_over_codes,
    compute_dtype,
    lasting_over_codes,
    look,
    misfit,
    mixed_arguments,
    obstacle,
    over_codes,
    usual,
)
from .sharing import Place, SharedInput


class _FusedForward:
    """In front of a class of PEFT's: its forward in one fused call, wherever that is the same."""

    fused_lora_backend: Backend = "auto"
    fused_lora_group: Place | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, which belongs to a copy of its group."""
        super().__setstate__(state)  # type: ignore[misc]
        if self.fused_lora_group is not None:
            self.fused_lora_group.take(self)  # type: ignore[arg-type]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] -> y [..., N], as PEFT's."""
        y: Tensor
        call = None if args or kwargs else usual(self, x)
        if call is not None:
            shared = _shared(self, x, call)
            return call_layer(x, call) if shared is None else shared
        names = kwargs.get("adapter_names")
        ours = not args and (not kwargs or (len(kwargs) == 1 and names is not None))
        found = look(self, names) if ours else ""
        if isinstance(found, str) or misfit(self, found, x, names) is not None:
            y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return y
        if names is not None:
            return _mixed_batch(self, found, x, names)
        if over_codes(self):
            shared = _shared(self, x, lasting_over_codes(self, found, x))
            y = _quantized(self, found, x) if shared is None else shared
            return y
        return _fused(found, x, arguments_of(found))

    def passed_on(self: Any, x: Tensor) -> Arguments | None:
        """What `forward` passes to `lora_linear` for x; None if that is not all it does."""
        if not over_codes(self):
            return usual(self, x)
        found = look(self)
        if isinstance(found, str) or misfit(self, found, x) is not None:
            return None
        return lasting_over_codes(self, found, x)

    def explain(self: Any, x: Tensor, *, adapter_names: Sequence[str] | None = None) -> Explanation:
        """Which backend and strategy `forward` takes for x, and why, or why it is PEFT's own.

        Computes nothing; raises what `fused_lora.explain` does.
        """
        found = look(self, adapter_names)
        if not isinstance(found, str):
            found = misfit(self, found, x, adapter_names) or found
        if isinstance(found, str):
            reasons = {"fused": f"not taken: {found}", "peft": "taken: PEFT's own forward"}
            return Explanation("torch", "peft", "peft", reasons)
        quantized = over_codes(self)
        if quantized:
            x = torch.empty_like(x, dtype=compute_dtype(self, x))
        if adapter_names is not None:
            tensors, options = mixed_arguments(self, found, x, adapter_names)
            return explain_multi(x, *tensors, **options)
        call = arguments_over_codes(found, x.dtype) if quantized else arguments_of(found)
        adapter = (call.lora_A, call.lora_B)
        why = explain(x, call.weight, *adapter, magnitude=found.magnitude, **call.options())
        place: Place | None = self.fused_lora_group
        if place is not None:
            why = why.with_reasons(place.group.explain(x, self.passed_on(x), call.backend))
        return why


class FusedPeftLinear(_FusedForward, peft_lora.Linear):  # type: ignore[misc]  # peft is untyped
    """`peft.tuners.lora.Linear` on the fused path."""


# PEFT's classes of layers that can be fused, and what they become.
_FUSED: dict[type, type] = {
    peft_lora.Linear: FusedPeftLinear,
    peft_lora.ParamWrapper: FusedPeftExperts,
}

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


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _quantized(layer: Any, state: State, x: Tensor) -> Tensor:
    dtype = compute_dtype(layer, x)
    return _fused(state, x.to(dtype), arguments_over_codes(state, dtype)).to(x.dtype)


def _fused(state: State, x: Tensor, call: Arguments) -> Tensor:
    if state.magnitude is None:
        return call_layer(x, call, lasting=state.is_simple and not isinstance(state.base, Conv1D))
    adapter = (call.lora_A, call.lora_B, state.magnitude)
    return dora_linear(x, call.weight, *adapter, **call.options())


def _shared(layer: Any, x: Tensor, call: Arguments | None) -> Tensor | None:
    """The output, if the layer's group has computed it; ``call`` is None if the group cannot."""
    place: Place | None = layer.fused_lora_group
    if place is None or not place.group.pays(x, call, layer.fused_lora_backend):
        return None
    return place.group.output(layer, x, call)


def _mixed_batch(layer: Any, state: State, x: Tensor, names: Sequence[str]) -> Tensor:
    quantized = over_codes(layer)
    cast = x.to(compute_dtype(layer, x)) if quantized else x
    tensors, options = mixed_arguments(layer, state, cast, names)
    y = lora_linear_multi(cast, *tensors, **options)
    return y.to(x.dtype) if quantized else y


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did; ``print`` it to read it. As a context manager it unfuses on leaving."""

    fused: tuple[str, ...]  # paths of the layers on the fused path
    not_fused: dict[str, str]  # path -> why PEFT's own forward runs there
    groups: tuple[tuple[str, ...], ...]  # paths of layers that are computed together
    gated: tuple[str, ...]  # paths of MLPs whose last layer makes act(gate) * up
    mixtures: tuple[str, ...]  # paths of mixtures of experts
    _model: nn.Module = field(repr=False)

    def __str__(self) -> str:
        total = len(self.fused) + len(self.not_fused)
        lines = [f"{len(self.fused)} of {total} LoRA layers fused"]
        width = max(map(len, self.not_fused), default=0)
        lines += [f"  {path:{width}}  not fused: {why}" for path, why in self.not_fused.items()]
        lines += sharing.describe_groups(self.groups) + describe_mlps(self.gated)
        lines += describe_mixtures(self.mixtures)
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


def _inner_wrappers(layers: Iterable[nn.Module]) -> set[nn.Module]:
    """The wrappers of experts that another wrapper computes."""
    return {inner for layer in layers for inner in list(wrappers(layer))[1:]}


def _swap(layer: peft_lora.LoraLayer, new: type[peft_lora.LoraLayer]) -> None:
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


def _why_not(layer: peft_lora.LoraLayer) -> str | None:
    """Why a layer is not fused, or is PEFT's for now."""
    if isinstance(layer, peft_lora.ParamWrapper):
        return _cannot_swap(layer) or peft_experts.obstacle(layer)
    return _cannot_swap(layer) or obstacle(layer)


def fuse(
    model: nn.Module, *, strict: bool = False, backend: Backend = "auto", groups: bool = True
) -> FuseReport:
    """Puts every eligible `peft.tuners.lora.Linear` of a live model on the fused path, in place.

    And the LoRA layers over bitsandbytes' Linear4bit and Linear8bitLt; over the latter x is not
    rounded to int8, which bitsandbytes does. Of DoRA's norm over either nothing is rounded. And the
    wrappers of transformers' mixtures of experts (``target_parameters``): see `peft_experts`.

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
            Gemma3, and with experts GLM-4, gpt-oss, Mixtral, OLMoE, Qwen2 and Qwen3. See
            `fused_lora.sharing` for how; `lora_linear_group` for what it saves, and what a backward
            pass through one of them alone needs. And compute act(gate) * up with down, in MLPs
            whose forward is Llama's: see `lora_linear_gated`. All are computed on their own under
            torch.compile and torch.func, and for up to 64 rows, or on a CPU so few elements (see
            there); what shares its input also under CUDA graph capture, with dropout on a CPU,
            and on a GPU without gradients for up to 512.

    Raises:
        TypeError: model is no module.
        ValueError: it has no LoRA layers of PEFT's; or, if ``strict``, one that is not fused. The
            model is unchanged then.
    """
    checks.check_module("model", model)
    checks.check_flag("strict", strict)
    checks.check_backend(backend)
    checks.check_flag("groups", groups)
    layers = dict(_lora_layers(model))
    if not layers:
        raise ValueError(
            "model: has no LoRA layers of PEFT's; wanted a PeftModel with a LoraConfig "
            "(for a plain model there is fused_lora.inject)"
        )
    not_fused = {}
    for path, layer in layers.items():
        why = _why_not(layer)
        if why is not None:
            not_fused[path] = why
    if strict and not_fused:
        listed = "; ".join(f"{path}: {why}" for path, why in not_fused.items())
        raise ValueError(f"model: {len(not_fused)} LoRA layers cannot be fused: {listed}")
    inner = _inner_wrappers(layers.values())
    for layer in layers.values():
        if layer not in inner and _cannot_swap(layer) is None:
            if type(layer) in _FUSED:
                _swap(layer, _FUSED[type(layer)])
            layer.fused_lora_backend = backend
            layer.__dict__.pop("fused_lora_group", None)
    ungate_mlps(model)
    found = tuple(sharing.find_groups(model, _FUSED.values())) if groups else ()
    for paths in found:
        group = SharedInput([model.get_submodule(path) for path in paths])
        for layer, place in group.places():
            layer.__dict__["fused_lora_group"] = place
    mlps = tuple(gate_mlps(model, _FUSED.values())) if groups else ()
    fused = tuple(path for path in layers if path not in not_fused)
    mixtures = tuple(
        path
        for path, layer in layers.items()
        if isinstance(layer, FusedPeftExperts) and layer not in inner and path not in not_fused
    )
    return FuseReport(fused, not_fused, found, mlps, mixtures, model)


def unfuse(model: nn.Module) -> None:
    """Gives every fused layer PEFT's own class back. Nothing happens where none is fused.

    Raises TypeError if model is no module.
    """
    checks.check_module("model", model)
    sharing.forget()
    ungate_mlps(model)
    for _, layer in _lora_layers(model):
        for plain, fused in _FUSED.items():
            if type(layer) is fused:
                layer.__dict__.pop("fused_lora_group", None)
                del layer.__dict__["fused_lora_backend"]
                _swap(layer, plain)


def register(config: LoraConfig) -> None:
    """Makes models still to be created with ``config`` come fused, by PEFT's custom-module hook.

    Quantised and other subclasses of `nn.Linear`, and experts' parameters, fall through to PEFT's
    own dispatch: for the latter call `fuse` afterwards.

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
