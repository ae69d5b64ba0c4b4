"""Which modules of a model get adapters: PEFT's rules."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from . import checks, expert_modules, foreign
from .layer_numbers import ALL_LAYERS, LayerNumbers
from .multi_linear import FusedMultiLoRALinear
from .paths import match_paths, own_path, place_of


class Targets(NamedTuple):
    """What was found in a model."""

    modules: dict[str, Any]  # all that it has, by path: nn.Modules
    layers: list[str]  # paths of those that get an adapter
    skipped: dict[str, str]  # paths and names that were asked for besides -> why they get none


def find_targets(
    model: nn.Module,
    target_modules: str | Collection[str],
    exclude_modules: str | Collection[str] | None,
    adaptable: Callable[[nn.Module], bool],
    saved: Collection[str] = (),
    numbers: LayerNumbers = ALL_LAYERS,
) -> Targets:
    """The modules that match and are ``adaptable``, but for those of ``modules_to_save``.

    Raises ValueError if there are none, or if one that is to be replaced has hooks, or is in a
    module that reads its weight and does not call it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    targets = match_modules(model, target_modules, None, numbers)
    matched = _without_excluded(targets, exclude_modules)
    in_saved = dict.fromkeys((path for path in matched if place_of(path, saved)), IN_SAVED)
    matched = [path for path in matched if path not in in_saved]
    layers = [path for path in matched if adaptable(modules[path])]
    skipped = _why_skipped(modules, matched, layers, target_modules) | in_saved
    skipped |= _excluding_nothing(exclude_modules, targets) | numbers.without_layers(layers)
    if not layers:
        names = sorted({p.rpartition(".")[2] for p, m in modules.items() if adaptable(m)})
        why = f"target_modules: {target_modules!r} matches no nn.Linear; wanted some of {names}"
        if isinstance(target_modules, str) and target_modules.lower() != "all-linear":
            why += ' in a list, a regular expression for the whole path, or "all-linear"'
        if exclude_modules is not None:
            why += f", and not all of them in exclude_modules, {exclude_modules!r}"
        if numbers.numbers:
            why += f", in layers {sorted(numbers.numbers)} of layers_to_transform"
        if mixtures_of_experts(model):
            why += "; experts are for target_parameters to name"
        others = {path: what for path, what in skipped.items() if path in modules}
        raise ValueError(why + (f"; it does match {others}" if others else ""))
    for path in layers:
        if is_linear(modules[path]):
            checks.check_unhooked(f"model: {path}", modules[path])
        _check_called(modules[path.rpartition(".")[0]], path)
    return Targets(modules, layers, skipped)


IN_SAVED = "is trained in whole, by modules_to_save"


class MatchedExperts(NamedTuple):
    """The parameters of mixtures of experts that get an adapter."""

    projections: dict[str, list[str]]  # by the module's path
    skipped: dict[str, str]  # parameters and names that were asked for besides -> why they get none

    def paths(self) -> list[str]:
        """Of all the parameters."""
        return [f"{path}.{name}" for path, names in self.projections.items() for name in names]


def find_experts(
    model: nn.Module, target_parameters: object, saved: Collection[str] = ()
) -> MatchedExperts:
    """What of PEFT's ``target_parameters``, names and ends of paths, is a mixture's projection.

    But for those of ``modules_to_save``.

    Raises TypeError unless it is None or a collection of strings, ValueError if a mixture that is
    matched has hooks, or is the model itself.
    """
    found = MatchedExperts({}, {})
    if target_parameters is None:
        return found
    if not isinstance(target_parameters, (list, tuple, set, frozenset)) or not all(
        isinstance(name, str) for name in target_parameters
    ):
        raise TypeError(f"target_parameters: got {target_parameters!r}, wanted a list of strings")
    wanted, matched = set(target_parameters), set()
    for path, _ in model.named_parameters(remove_duplicate=False):
        parts = own_path(path).split(".")
        ends = {".".join(parts[i:]) for i in range(len(parts))} & wanted
        matched |= ends
        if ends and place_of(path, saved):
            found.skipped[path] = IN_SAVED
        elif ends:
            _match_projection(model, path, found)
    for name in sorted(wanted - matched):
        found.skipped[name] = "matches no parameter"
    return found


def _match_projection(model: nn.Module, path: str, found: MatchedExperts) -> None:
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    why = expert_modules.obstacle(module)
    if why is None and name not in expert_modules.projections(module):
        why = f"is none of {' and '.join(expert_modules.projections(module))}"
    if why is not None:
        found.skipped[path] = why
        return
    if not owner:
        raise ValueError(f"model: got a {type(model).__name__} itself; use FusedLoRAExperts")
    checks.check_unhooked(f"model: {owner}", module)
    found.projections.setdefault(owner, []).append(name)


def mixtures_of_experts(model: nn.Module) -> list[str]:
    """The paths of those that ``target_parameters`` could name."""
    return [path for path, m in model.named_modules() if expert_modules.obstacle(m) is None]


def _excluding_nothing(
    exclude_modules: str | Collection[str] | None, targets: list[str]
) -> dict[str, str]:
    """What of ``exclude_modules`` is for none of the paths, for a report."""
    if isinstance(exclude_modules, str):
        patterns: dict[str, object] = {exclude_modules: exclude_modules}
    else:
        patterns = {name: [name] for name in exclude_modules or ()}
    return {
        f"{name} of exclude_modules": "matches nothing that target_modules matches"
        for name, pattern in patterns.items()
        if not match_paths("exclude_modules", pattern, targets)
    }


# Of transformers' modules by class: which layers' weights they read, in training or always.
_READ = {
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "NemotronHMamba2Mixer": ("out_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "Zamba2MambaMixer": ("out_proj",),
}


def _check_called(owner: nn.Module, path: str) -> None:
    """ValueError if what a layer is in may take its weight instead of calling it."""
    kind, name = type(owner), path.rpartition(".")[2]
    if name in _READ.get(kind.__name__, ()):
        raise ValueError(
            f"model: {path}: a {kind.__name__} reads its weight and does not call it, so that its "
            f"adapter would be left out; wanted exclude_modules={list(_READ[kind.__name__])}"
        )
    if isinstance(owner, nn.TransformerEncoderLayer) and _has_fast_path(owner):
        raise ValueError(
            f"model: {path}: in eval() an nn.TransformerEncoderLayer reads its weight and does not "
            "call it, so that its adapter would be left out; call "
            "torch.backends.mha.set_fastpath_enabled(False) before, and keep it so"
        )


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    return (
        torch.backends.mha.get_fastpath_enabled()
        and type(layer).forward is nn.TransformerEncoderLayer.forward
        and layer.self_attn.batch_first
        and layer.self_attn.in_proj_bias is not None
        and bool(layer.activation_relu_or_gelu)
    )


def _why_skipped(
    modules: Mapping[str, nn.Module],
    matched: Collection[str],
    layers: Collection[str],
    target_modules: str | Collection[str],
) -> dict[str, str]:
    """Why what was matched but ``layers`` gets no adapter, and which names match nothing."""
    skipped = {
        path: f"is of type {type(modules[path]).__name__}, not an nn.Linear"
        for path in matched
        if path not in layers
    }
    if not isinstance(target_modules, str):
        for name in target_modules:
            if not match_paths("target_modules", [name], list(modules)):
                skipped[name] = "matches no module"
    return skipped


def is_peft_layer(module: nn.Module) -> bool:
    """Whether PEFT has made it, of a layer or of a model."""
    return type(module).__module__.startswith("peft.tuners")


def has_peft_layers(model: nn.Module) -> bool:
    """Whether PEFT has put adapters in."""
    return any(map(is_peft_layer, model.modules()))


def is_linear(module: nn.Module) -> bool:
    """Whether `inject` can replace it: an `nn.Linear`, or a quantised one of others."""
    return type(module) is nn.Linear or foreign.is_quantized(module)


def match_modules(
    model: nn.Module,
    target_modules: str | Collection[str],
    exclude_modules: str | Collection[str] | None,
    numbers: LayerNumbers = ALL_LAYERS,
) -> list[str]:
    """The paths of the modules that PEFT's rules match, of any type; see `inject`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        matched = _without_output_head(model, modules)
    else:
        matched = match_paths("target_modules", target_modules, list(modules))
    # Whole paths are meant wherever they are.
    named = () if isinstance(target_modules, str) else target_modules
    matched = [path for path in matched if numbers.has(path) or own_path(path) in named]
    return _without_excluded(matched, exclude_modules)


def _without_excluded(
    targets: list[str], exclude_modules: str | Collection[str] | None
) -> list[str]:
    if exclude_modules is None:
        return targets
    excluded = set(match_paths("exclude_modules", exclude_modules, targets))
    return [path for path in targets if path not in excluded]


def _without_output_head(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Every linear layer but the one that transformers calls the output embeddings."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    linear = (path for path, m in modules.items() if m is not head)
    return [p for p in linear if is_linear(modules[p]) or type(modules[p]) is FusedMultiLoRALinear]
