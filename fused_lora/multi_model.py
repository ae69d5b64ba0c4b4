"""Several adapters in a whole model: `add_adapter`, `delete_adapter`, and which layers have one.

Serving three adapters from disk in one batch, each sample with its own:

    model = AutoModelForCausalLM.from_pretrained(name).eval()
    for adapter in ("german", "french", "legal"):
        fused_lora.load_adapter(model, f"adapters/{adapter}", adapter_name=adapter)
    batch = tokenizer(["Guten Tag", "Bonjour", "Whereas", "Hello"], return_tensors="pt")
    with fused_lora.route(model, adapter_names=["german", "french", "legal", "__base__"]):
        tokens = model.generate(**batch)

Training them jointly is the same with `add_adapter` and a loss; `save_adapter` writes each one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from . import checks
from .calls import Backend
from .codes import Format
from .expert_layer import FusedLoRAExperts
from .inject_report import InjectReport, count_parameters, norms_of_change, relative_norm
from .layer_numbers import LayerNumbers
from .linear import FusedLoRALinear
from .matching import find_targets, is_linear, is_peft_layer
from .multi_linear import FusedMultiLoRALinear, check_name
from .patterns import alphas_of, formats_of, ranks_of, unmatched
from .quantize import Quantize, Quantizer
from .quantized_weight import QuantizedWeight, Weight


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, FusedMultiLoRALinear]:
    """The layers that have this adapter, by path."""
    layers = {p: m for p, m in model.named_modules() if isinstance(m, FusedMultiLoRALinear)}
    return {path: layer for path, layer in layers.items() if adapter_name in layer.adapters}


def can_adapt(module: nn.Module) -> bool:
    """Whether `add_adapter` can give the module one: a linear layer, or one of several already."""
    return is_linear(module) or isinstance(module, FusedMultiLoRALinear)


def add_adapter(
    model: nn.Module,
    adapter_name: str,
    r: int,
    lora_alpha: float,
    target_modules: str | Collection[str],
    *,
    exclude_modules: str | Collection[str] | None = None,
    layers_to_transform: int | Collection[int] | None = None,
    layers_pattern: str | Collection[str] | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    adapter_dtype: torch.dtype | None = None,
    backend: Backend = "auto",
    quantize: Quantize = None,
) -> InjectReport:
    """Gives the matched layers of ``model`` an adapter of this name, beside those they have.

    A linear layer becomes a `FusedMultiLoRALinear` first; each adapter may have layers, ranks and
    alphas of its own. Which sample or row takes which one is said by `route`. All adapters train,
    and nothing else in the model does.

    Args:
        model: without adapters of `inject`'s or PEFT's.
        adapter_name: any string without a dot but "__base__", which is PEFT's name for none.
        lora_dropout, backend, quantize: of layers that get their first adapter; the others keep
            what they have, as it is one for all adapters of a layer, and must be asked for no other
            ``quantize``.
        Others: as for `inject`.

    Returns the report: which layers, what was skipped and why, and the numbers of parameters.

    Raises TypeError or ValueError, and changes nothing, as `inject` does, and if there is an
    adapter of that name already.
    """
    checks.check_module("model", model)
    if can_adapt(model):
        raise ValueError(f"model: got a {type(model).__name__} itself, wanted what contains some")
    for module in model.modules():
        if isinstance(module, (FusedLoRALinear, FusedLoRAExperts)) or is_peft_layer(module):
            raise ValueError(
                f"model: has adapters already, in a {type(module).__name__}; wanted a model "
                "without, or with those of fused_lora.add_adapter"
            )
    check_name("adapter_name", adapter_name)
    if layers_with(model, adapter_name):
        raise ValueError(f"adapter_name: there is an adapter {adapter_name!r} already")
    checks.check_rank(r)
    checks.check_number("lora_alpha", lora_alpha)
    checks.check_dropout("lora_dropout", lora_dropout)
    checks.check_flag("use_rslora", use_rslora)
    checks.check_backend(backend)
    if adapter_dtype is not None:
        checks.check_dtype("adapter_dtype", adapter_dtype)
    numbers = LayerNumbers.of(target_modules, layers_to_transform, layers_pattern)
    modules, layers, skipped = find_targets(
        model, target_modules, exclude_modules, can_adapt, numbers=numbers
    )
    ranks = ranks_of(rank_pattern, r, layers)
    alphas = alphas_of(alpha_pattern, lora_alpha, layers)
    skipped |= unmatched(layers, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    formats = formats_of(quantize, layers)
    unused = unmatched(layers, quantize=quantize)
    for path, format in formats.items():
        module = modules[path]
        if format is not None and isinstance(module, FusedMultiLoRALinear):
            _check_same_codes(path, module.weight, format)

    # Made first and put in last, so that a failure leaves the model as it was.
    multi: dict[nn.Module, FusedMultiLoRALinear] = {}
    changes: list[tuple[float, float]] = []
    for path in layers:
        module = modules[path]
        if isinstance(module, FusedMultiLoRALinear):
            multi[module] = module
        elif module not in multi:
            multi[module] = FusedMultiLoRALinear.from_linear(
                module,
                lora_dropout=lora_dropout,
                backend=backend,
                quantize=formats[path],
            )
            changes += norms_of_change(module, multi[module].weight)
    for path in layers:
        layer = multi[modules[path]]
        if adapter_name not in layer.adapters:  # a module used at several paths is one
            layer.add_adapter(
                adapter_name,
                ranks[path],
                alphas[path],
                use_rslora=use_rslora,
                adapter_dtype=adapter_dtype,
            )
        model.set_submodule(path, layer)
    adapted = [m for m in model.modules() if isinstance(m, FusedMultiLoRALinear)]
    adapters = {p for m in adapted for d in (m.lora_A, m.lora_B) for p in d.parameters()}
    for parameter in model.parameters():
        if parameter not in adapters:
            parameter.requires_grad_(False)
    return InjectReport(
        layers=tuple(layers),
        skipped=skipped | unused,
        trainable=sum(
            adapters[adapter_name].numel()
            for layer in multi.values()
            for adapters in (layer.lora_A, layer.lora_B)
        ),
        total=count_parameters(model),
        adapted=sum(layer.weight.numel() for layer in multi.values()),
        unused_quantize=tuple(f"{key} {why}" for key, why in unused.items()),
        quantization_error=relative_norm(changes) if changes else None,
    )


def _check_same_codes(path: str, weight: Weight, quantize: Format | Quantizer) -> None:
    quantized = isinstance(weight, QuantizedWeight)
    now = weight.layout.format if isinstance(weight, QuantizedWeight) else str(weight.dtype)
    if not quantized or (isinstance(quantize, str) and quantize != now):
        raise ValueError(
            f"quantize: got {quantize!r}, but the weight of {path} is in {now}, for adapters that "
            "it has or had; wanted None, or the same for all"
        )


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter out of every layer that has it; ValueError if there is none.

    The layers stay what they are, ready for the next one.
    """
    checks.check_module("model", model)
    layers = layers_with(model, adapter_name)
    if not layers:
        raise ValueError(f"adapter_name: got {adapter_name!r}, which no layer has")
    for layer in layers.values():
        layer.delete_adapter(adapter_name)
