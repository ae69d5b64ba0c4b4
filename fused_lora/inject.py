"""`inject`: puts adapters into an existing model's `nn.Linear`s and freezes the rest."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from . import checks, sharing
from .calls import Backend
from .expert_layer import FusedLoRAExperts
from .expert_modules import in_order, plain_weight, weight_of
from .frozen import FrozenLinear
from .gated_mlp import gate_mlps
from .inject_report import (
    InjectReport,
    count_parameters,
    norms_of_change,
    norms_of_experts,
    relative_norm,
)
from .linear import FusedLoRALinear
from .matching import (
    IN_SAVED,
    LayerNumbers,
    alphas_of,
    find_experts,
    find_targets,
    formats_of,
    has_peft_layers,
    is_at,
    is_linear,
    match_paths,
    mixtures_of_experts,
    ranks_of,
    unmatched,
)
from .modules_to_save import ModuleToSave, find_modules_to_save, warn_of_ties
from .quantize import Quantize


def inject(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    target_modules: str | Collection[str] | None = None,
    *,
    target_parameters: Collection[str] | None = None,
    modules_to_save: Collection[str] | None = None,
    exclude_modules: str | Collection[str] | None = None,
    layers_to_transform: int | Collection[int] | None = None,
    layers_pattern: str | Collection[str] | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    adapter_dtype: torch.dtype | None = None,
    init_lora_weights: bool | str = True,
    use_dora: bool = False,
    backend: Backend = "auto",
    groups: bool = True,
    quantize: Quantize = None,
) -> InjectReport:
    """Replaces matching `nn.Linear`s with `FusedLoRALinear`s in place and freezes everything else.

    Args:
        model: any module. Its weights are shared, not copied ("pissa", "olora", "loftq" and
            ``quantize`` make new ones).
        target_modules: PEFT's rules. A list of names matches a module whose path is a name or ends
            in "." + name; a string is a regular expression for the whole path, or "all-linear" for
            every `nn.Linear` but the output head (`get_output_embeddings`, where there is one).
            None, or an empty list, where ``target_parameters`` says it all.
        target_parameters: names, or ends of paths, of the parameters of transformers' mixtures of
            experts, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]: each such module becomes
            a `FusedLoRAExperts`. As in PEFT without dropout and DoRA, and whatever
            ``exclude_modules`` says.
        modules_to_save: PEFT's: names, or ends of paths, of modules of any type of which a copy is
            trained in whole and saved with the adapters ("score", "lm_head"). Neither they nor what
            is in them get an adapter.
        exclude_modules: matched in the same way, and left out. The report has what matches nothing.
        layers_to_transform, layers_pattern: of the modules that names in ``target_modules`` match
            only those in these blocks: by the first number in a path, or the first after one of the
            patterns ("layers", "h").
        rank_pattern, alpha_pattern: other r and lora_alpha for the layers whose path, or the end
            of it after a dot, is matched by the key, a regular expression; the first match counts.
        r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, init_lora_weights, use_dora,
            backend: see `FusedLoRALinear`.
        groups: compute the projections that share their input (q, k, v; gate, up) together, and
            act(gate) * up with down, in models where that is known: see `fused_lora.peft.fuse`.
        quantize: "nf4" (QLoRA), "fp4", "mxfp4", "int8" or "fp8": the adapted layers get their
            weights in codes, a mixture of experts all that it has. Or a function, such as
            ``functools.partial(quantize_fp8, activations="fp8")``, which experts do not take. Or a
            mapping, {"mlp.experts": "mxfp4", ".*_proj": "nf4"}, with keys as of ``rank_pattern``
            for the paths of layers and of whole mixtures; what no key matches keeps its weight.
            Layers that bitsandbytes or torchao quantised are taken as they are, without it.
            With "pissa" (QPiSSA), "olora" or "loftq" the codes are those of the residual; the
            report says by how much W0 changes in all.

    Returns:
        The report: which layers, what was skipped and why, and the numbers of parameters.

    Raises:
        ValueError: nothing matched (the message lists what there is to match), the model is itself
            an `nn.Linear` or already has adapters, a pattern is no regular expression, a number is
            out of range, a matched layer has hooks, one of ``modules_to_save`` is in another or at
            several paths, or what it is in is known to read
            its weight instead of calling it (`nn.TransformerEncoderLayer`'s fast path, Mamba's
            kernels, WavLM's attention). The model is unchanged then.
        TypeError: an argument is of the wrong type.
    """
    checks.check_module("model", model)
    if type(model) is nn.Linear:
        raise ValueError("model: got an nn.Linear itself; use FusedLoRALinear.from_linear")
    if has_peft_layers(model):
        raise ValueError(
            "model: has PEFT's adapters already; wanted a plain model "
            "(fused_lora.peft.fuse makes PEFT's layers fast)"
        )
    checks.check_rank(r)
    checks.check_number("lora_alpha", lora_alpha)
    checks.check_dropout("lora_dropout", lora_dropout)
    checks.check_flag("use_rslora", use_rslora)
    checks.check_flag("use_dora", use_dora)
    checks.check_backend(backend)
    checks.check_flag("groups", groups)
    kinds = (FrozenLinear, FusedLoRAExperts)
    adapted = [path for path, m in model.named_modules() if isinstance(m, kinds)]
    if adapted:
        more = f" and {len(adapted) - 1} more" * (len(adapted) > 1)
        raise ValueError(
            f"model: has adapters already, at {adapted[0]}{more}; wanted a plain model "
            "(merge_and_unload makes one of it), or add_adapter for all of several"
        )
    numbers = LayerNumbers.of(target_modules, layers_to_transform, layers_pattern)
    to_save, missing = find_modules_to_save(model, modules_to_save)
    mixtures = find_experts(model, target_parameters)
    for path in [path for path in mixtures.projections if is_at(path, to_save)]:
        del mixtures.projections[path]
        mixtures.skipped[path] = IN_SAVED
    if target_parameters:
        _check_experts_options(lora_dropout, use_dora, init_lora_weights)
    if target_parameters and not target_modules:
        if not mixtures.projections:
            of_all = mixtures_of_experts(model)
            raise ValueError(
                f"target_parameters: {target_parameters!r} matches no projection of experts "
                f"({mixtures.skipped}); the model has mixtures at {of_all}"
            )
        match_paths("exclude_modules", exclude_modules or [], [])  # the check of its type
    if target_modules or not mixtures.projections:
        modules, layers, skipped = find_targets(
            model, target_modules or [], exclude_modules, is_linear, to_save, numbers
        )
    else:
        modules, layers, skipped = {}, [], {}
    skipped |= mixtures.skipped
    skipped |= {f"{name} of modules_to_save": "matches no module" for name in missing}
    if not mixtures.projections:
        all_linear = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
        unnamed = mixtures_of_experts(model)
        for path in unnamed:
            if all_linear or path in skipped:
                skipped[path] = "is a mixture of experts, for target_parameters to name"
        if unnamed:
            for name in [name for name, why in skipped.items() if why == "matches no module"]:
                skipped[name] += "; experts are for target_parameters to name"
    # Built first and put in last, so that a failure leaves the model as it was. A module that is
    # used at several paths stays one module.
    adapted_paths = layers + mixtures.paths()
    ranks = ranks_of(rank_pattern, r, adapted_paths)
    alphas = alphas_of(alpha_pattern, lora_alpha, adapted_paths)
    skipped |= unmatched(adapted_paths, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    with_codes = [*layers, *mixtures.projections]
    formats = formats_of(quantize, with_codes)
    skipped |= unmatched(with_codes, quantize=quantize)
    replacements: dict[nn.Module, FusedLoRALinear] = {}
    changes: list[tuple[float, float]] = []
    for path in layers:
        linear = modules[path]
        if linear not in replacements:
            replacements[linear] = FusedLoRALinear.from_linear(
                linear,
                ranks[path],
                alphas[path],
                lora_dropout=lora_dropout,
                use_rslora=use_rslora,
                adapter_dtype=adapter_dtype,
                init_lora_weights=init_lora_weights,
                use_dora=use_dora,
                backend=backend,
                quantize=formats[path],
            )
            layer, start = replacements[linear], None
            if layer.lora_A_init is not None and layer.lora_B_init is not None:
                start = layer._product(layer.lora_A_init, layer.lora_B_init)
            changes += norms_of_change(linear, layer.weight, start)
    of_experts: dict[nn.Module, FusedLoRAExperts] = {}
    for path, names in mixtures.projections.items():
        experts = model.get_submodule(path)
        if experts in of_experts:
            continue
        of_experts[experts] = FusedLoRAExperts(
            experts,
            {name: ranks[f"{path}.{name}"] for name in names},
            {name: alphas[f"{path}.{name}"] for name in names},
            use_rslora=use_rslora,
            adapter_dtype=adapter_dtype,
            init_lora_weights=bool(init_lora_weights),
            backend=backend,
            quantize=formats[path],
        )
        for name in in_order(experts):
            codes = weight_of(of_experts[experts].base_layer, name)
            changes += norms_of_experts(plain_weight(experts, name), codes)
    copies = {path: ModuleToSave(module) for path, module in to_save.items()}
    warn_of_ties(model, to_save)
    model.requires_grad_(False)
    for path, trained in copies.items():
        trained.start_training()
        model.set_submodule(path, trained)
    for path in layers:
        model.set_submodule(path, replacements[modules[path]])
    placed = {path: of_experts[model.get_submodule(path)] for path in mixtures.projections}
    for path, mixture in placed.items():
        mixture.adapters.requires_grad_(True)
        model.set_submodule(path, mixture)
    found = tuple(sharing.find_groups(model, (FusedLoRALinear,))) if groups else ()
    for paths in found:
        group = sharing.SharedInput([model.get_submodule(path) for path in paths])
        for member, place in group.places():
            member.__dict__["shared_input"] = place
    mlps = tuple(gate_mlps(model, (FusedLoRALinear,))) if groups else ()
    return InjectReport(
        layers=tuple(adapted_paths),
        skipped=skipped,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=count_parameters(model),
        adapted=sum(
            weight.numel()
            for weights in (
                [layer.weight for layer in replacements.values()],
                *(each.trained_module.parameters() for each in copies.values()),
                *(mixture.weights().values() for mixture in of_experts.values()),
            )
            for weight in weights
        ),
        groups=found,
        gated=mlps,
        mixtures=tuple(placed),
        modules_to_save=tuple(copies),
        quantization_error=relative_norm(changes) if changes else None,
    )


def _check_experts_options(
    lora_dropout: float, use_dora: bool, init_lora_weights: bool | str
) -> None:
    """ValueError for what adapters of experts do not have, nor in PEFT."""
    if lora_dropout > 0.0:
        raise ValueError(f"lora_dropout: got {lora_dropout}, wanted 0 with target_parameters")
    if use_dora:
        raise ValueError("use_dora: got True, wanted False with target_parameters")
    if not isinstance(init_lora_weights, bool):
        got = repr(init_lora_weights)
        raise ValueError(f"init_lora_weights: got {got}, wanted a bool with target_parameters")
