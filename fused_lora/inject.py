"""`inject`: puts adapters into an existing model's `nn.Linear`s and freezes the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from . import checks, sharing
from .calls import Backend
from .codes import Format
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
from .layer_numbers import LayerNumbers
from .linear import FusedLoRALinear
from .matching import (
    MatchedExperts,
    find_experts,
    find_targets,
    has_peft_layers,
    is_linear,
    mixtures_of_experts,
)
from .modules_to_save import ModuleToSave, find_modules_to_save, forget_ties, warn_of_ties
from .paths import match_paths
from .patterns import alphas_of, formats_of, ranks_of, unmatched
from .quantize import Quantize, Quantizer


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
        modules_to_save: PEFT's: of modules of any type whose path ends with one of these strings
            ("score", "lm_head"; "norm" is "input_layernorm" too) a copy is trained in whole, in its
            own dtype, and saved with the adapters. Neither they nor what is in them get an adapter.
            Where one shares its weight with another, they go apart, with a warning: see
            `modules_to_save`.
        exclude_modules: matched as ``target_modules``, and left out. The report has what matches
            nothing.
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
            out of range, or one of ``modules_to_save`` is in another, at several paths, or has no
            parameters; or a matched layer has hooks, or is in what is known to read its weight
            instead of calling it (`nn.TransformerEncoderLayer`'s fast path, Mamba's kernels,
            WavLM's attention). The model is unchanged then.
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
    chosen = _choose(
        model, target_modules, target_parameters, exclude_modules, modules_to_save, numbers
    )
    if target_parameters:
        _check_experts_options(lora_dropout, use_dora, init_lora_weights)
    paths, with_codes = chosen.paths(), [*chosen.layers, *chosen.experts]
    own = _Own(
        ranks_of(rank_pattern, r, paths),
        alphas_of(alpha_pattern, lora_alpha, paths),
        formats_of(quantize, with_codes),
    )
    skipped = chosen.skipped | unmatched(
        paths, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern
    )
    unused = unmatched(with_codes, quantize=quantize)
    # Built first and put in last, so that a failure leaves the model as it was. A module that is
    # used at several paths stays one module.
    of_all: Any = {"use_rslora": use_rslora, "adapter_dtype": adapter_dtype, "backend": backend}
    layers = _adapted_layers(
        chosen,
        own,
        lora_dropout=lora_dropout,
        init_lora_weights=init_lora_weights,
        use_dora=use_dora,
        **of_all,
    )
    mixtures = _adapted_experts(chosen, own, init_lora_weights=bool(init_lora_weights), **of_all)
    copies = {module: ModuleToSave(module) for module in chosen.to_save.values()}
    changes = [change for pair in layers.items() for change in _changes(*pair)]
    changes += [change for pair in mixtures.items() for change in _changes_of_experts(*pair)]
    warn_of_ties(model, chosen.to_save)

    model.requires_grad_(False)
    for mixture in mixtures.values():
        mixture.adapters.requires_grad_(True)
    for trained in copies.values():
        trained.start_training()
    for places, new in (
        (chosen.layers, layers),
        (chosen.experts, mixtures),
        (chosen.to_save, copies),
    ):
        for path, module in places.items():
            model.set_submodule(path, new[module])
    forget_ties(model, chosen.to_save)
    found = _share_inputs(model) if groups else ()
    return InjectReport(
        layers=tuple(paths),
        skipped=skipped | unused,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=count_parameters(model),
        adapted=sum(
            weight.numel()
            for weights in (
                [layer.weight for layer in layers.values()],
                *(each.trained_module.parameters() for each in copies.values()),
                *(mixture.weights().values() for mixture in mixtures.values()),
            )
            for weight in weights
        ),
        groups=found,
        gated=tuple(gate_mlps(model, (FusedLoRALinear,))) if groups else (),
        mixtures=tuple(chosen.experts),
        modules_to_save=tuple(chosen.to_save),
        unused_quantize=tuple(f"{key} {why}" for key, why in unused.items()),
        quantization_error=relative_norm(changes) if changes else None,
    )


class _Chosen(NamedTuple):
    """What of a model is adapted or trained, by path."""

    layers: dict[str, Any]  # nn.Linears, or others' quantised ones
    experts: dict[str, nn.Module]
    projections: MatchedExperts
    to_save: dict[str, nn.Module]
    skipped: dict[str, str]  # what was asked for besides -> why it is not

    def paths(self) -> list[str]:
        """Of all layers and projections of experts."""
        return [*self.layers, *self.projections.paths()]


def _choose(
    model: nn.Module,
    target_modules: str | Collection[str] | None,
    target_parameters: Collection[str] | None,
    exclude_modules: str | Collection[str] | None,
    modules_to_save: Collection[str] | None,
    numbers: LayerNumbers,
) -> _Chosen:
    to_save, missing = find_modules_to_save(model, modules_to_save)
    found = find_experts(model, target_parameters, to_save)
    skipped = dict(found.skipped)
    layers: dict[str, Any] = {}
    if target_parameters and not target_modules:
        if not found.projections:
            of_all = mixtures_of_experts(model)
            raise ValueError(
                f"target_parameters: {target_parameters!r} matches no projection of experts "
                f"({skipped}); the model has mixtures at {of_all}"
            )
        match_paths("exclude_modules", exclude_modules or [], [])  # the check of its type
    else:
        targets = find_targets(
            model, target_modules or [], exclude_modules, is_linear, to_save, numbers
        )
        layers = {path: targets.modules[path] for path in targets.layers}
        skipped = targets.skipped | skipped
    if not found.projections:
        all_linear = isinstance(target_modules, str) and target_modules.lower() == "all-linear"
        unnamed = mixtures_of_experts(model)
        for path in unnamed:
            if all_linear or path in skipped:
                skipped[path] = "is a mixture of experts, for target_parameters to name"
        if unnamed:
            for name in [name for name, why in skipped.items() if why == "matches no module"]:
                skipped[name] += "; experts are for target_parameters to name"
    skipped |= {f"{name} of modules_to_save": "matches no module" for name in missing}
    experts = {path: model.get_submodule(path) for path in found.projections}
    return _Chosen(layers, experts, found, to_save, skipped)


class _Own(NamedTuple):
    """What each layer, projection or mixture has of its own, by path."""

    ranks: dict[str, int]
    alphas: dict[str, float]
    formats: dict[str, Format | Quantizer | None]


def _adapted_layers(chosen: _Chosen, own: _Own, **options: Any) -> dict[nn.Module, FusedLoRALinear]:
    made: dict[nn.Module, FusedLoRALinear] = {}
    for path, linear in chosen.layers.items():
        if linear not in made:
            numbers = (own.ranks[path], own.alphas[path])
            made[linear] = FusedLoRALinear.from_linear(
                linear, *numbers, quantize=own.formats[path], **options
            )
    return made


def _adapted_experts(
    chosen: _Chosen, own: _Own, **options: Any
) -> dict[nn.Module, FusedLoRAExperts]:
    made: dict[nn.Module, FusedLoRAExperts] = {}
    for path, experts in chosen.experts.items():
        if experts not in made:
            paths = {name: f"{path}.{name}" for name in chosen.projections.projections[path]}
            ranks = {name: own.ranks[each] for name, each in paths.items()}
            alphas = {name: own.alphas[each] for name, each in paths.items()}
            made[experts] = FusedLoRAExperts(
                experts, ranks, alphas, quantize=own.formats[path], **options
            )
    return made


def _changes(linear: nn.Module, layer: FusedLoRALinear) -> list[tuple[float, float]]:
    start = None
    if layer.lora_A_init is not None and layer.lora_B_init is not None:
        start = layer._product(layer.lora_A_init, layer.lora_B_init)
    return norms_of_change(linear, layer.weight, start)


def _changes_of_experts(
    experts: nn.Module, mixture: FusedLoRAExperts
) -> Iterator[tuple[float, float]]:
    for name in in_order(experts):
        codes = weight_of(mixture.base_layer, name)
        yield from norms_of_experts(plain_weight(experts, name), codes)


def _share_inputs(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Has what shares its input computed together."""
    found = tuple(sharing.find_groups(model, (FusedLoRALinear,)))
    for paths in found:
        group = sharing.SharedInput([model.get_submodule(path) for path in paths])
        for member, place in group.places():
            member.__dict__["shared_input"] = place
    return found


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
