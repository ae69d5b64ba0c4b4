"""Adapters on disk, in PEFT's format: `save_adapter` and `load_adapter`.

A folder holds adapter_config.json and adapter_model.safetensors. Both are untrusted input: every
field and every tensor is checked before the model is touched, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, trained_over
from .adapter_config import CONFIG_NAME, numbers_of, read_config
from .expert_layer import ExpertsAdapter, FusedLoRAExperts, nested
from .expert_modules import weight_of
from .files import write_atomically
from .inject import inject
from .linear import FusedLoRALinear
from .matching import (
    alphas_of,
    find_experts,
    has_peft_layers,
    is_at,
    is_linear,
    match_modules,
    match_paths,
    own_path,
    ranks_of,
)
from .modules_to_save import find_modules_to_save, tensors_of, trained_copies
from .multi_linear import FusedMultiLoRALinear
from .multi_model import add_adapter, can_adapt, layers_with
from .quantize import Quantize
from .quantized_weight import QuantizedWeight
from .sharded import fill, is_sharded, reshard, whole, writes_files

WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Fields of the config that `inject` and `add_adapter` take as they are.
_SAME = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
# What a layer's tensors are called, in it and, with what follows, in the files.
_TENSORS = {"lora_A": ".weight", "lora_B": ".weight", "lora_magnitude_vector": ""}


def save_adapter(
    model: nn.Module, directory: str | os.PathLike[str], *, adapter_name: str | None = None
) -> None:
    """Writes the adapters of a model made with `inject` so that PEFT and `load_adapter` load them.

    Of a model with several adapters (`add_adapter`), the one called ``adapter_name``.

    Each file is written beside its place and moved there: one that exists is whole. A module that
    is reached at several paths is refused. Of a sharded model (FSDP2, tensor parallel) every
    process has to call this, and the first one writes.

    A layer initialised by "pissa", "olora" or "loftq" has a residual for its base weight, which the
    files do not hold. It is saved as what it has learnt, relative to the original weight:
    [A; A_init] and [B, -B_init] of rank 2 r, as PEFT's ``path_initial_model_for_weight_conversion``
    does. So it loads into the original model, and not into one made of residuals. If the residual
    is quantised, that differs from what was trained by the error of its codes, which no file of
    PEFT's format has: a warning says so.

    Raises:
        TypeError, ValueError: model is no module, has no adapters (or PEFT's), merged ones, or ones
            that differ in dropout or rsLoRA, which PEFT's format has one value for.
        OSError: the folder cannot be made or written.
    """
    from safetensors.torch import save_file

    folder = _folder(directory)
    model = _inner(model)
    layers = _layers(model, adapter_name)
    if not layers:
        if has_peft_layers(model):
            raise ValueError("model: has PEFT's adapters; call its own save_pretrained")
        named = _adapter_names(model)
        if named or adapter_name is not None:
            wanted = f"one of {named}" if named else "None: the model has no adapters with names"
            raise ValueError(f"adapter_name: got {adapter_name!r}, wanted {wanted}")
        raise ValueError("model: has no FusedLoRALinear; wanted one made with fused_lora.inject")
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"model: {merged[0]} is merged; call unmerge() before saving")
    for path, layer in layers.items():
        if layer.lora_A_init is not None and isinstance(layer.weight, QuantizedWeight):
            warnings.warn(
                f"fused_lora: {path} was trained over the codes of a residual (init_lora_weights="
                f"{layer.init_lora_weights!r}), which the files do not have: where the adapter is "
                "loaded its results are others by the error of those codes; the model's state dict "
                "keeps them",
                stacklevel=2,
            )
            break
    saved = {path: _saved(layer) for path, layer in layers.items()}
    config = _config(model, layers, saved)
    places = _places(model, layers)
    found: dict[str, Tensor] = {}
    for path, layer in saved.items():
        found |= {_key(places[path], name): each for name, each in layer.tensors().items()}
    for name, tensor in _whole_modules(trained_copies(model)).items():
        found[name] = whole(tensor)
    # Copies: of tensors that share memory safetensors writes none.
    tensors = {name: each.to("cpu", copy=True).contiguous() for name, each in found.items()}
    if not writes_files() and any(is_sharded(layer.lora_A) for layer in layers.values()):
        return
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    said = trained_over.metadata(model, layers)
    write_atomically(folder / WEIGHTS_NAME, lambda to: save_file(tensors, to, metadata=said))
    write_atomically(folder / CONFIG_NAME, lambda to: Path(to).write_text(text))


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str | None = None,
    quantize: Quantize = None,
) -> None:
    """Loads what `save_adapter` or PEFT saved.

    A model without adapters gets them injected as the config says, trainable; one that has them
    must have the same layers, ranks and scaling, and keeps its dropout. Values are cast to the
    parameters' dtype.

    With ``adapter_name`` it becomes one of several adapters (see `add_adapter`), whose layers,
    ranks and scaling may differ; `route` says which samples take it.

    ``quantize``: as for `inject` or `add_adapter`, the format of weights that the adapter was
    trained over. One saved after "pissa", "olora" or "loftq" was trained over the codes of a
    residual, which those of the whole weight are not. Files of `save_adapter` say what it was, and
    a warning when it is something else here.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError, ValueError: a file is not what it should be, asks for something that changes the
            computation and is not supported (the field is named), or does not fit the model. The
            model is unchanged then.
    """
    folder = _folder(directory)
    model = _inner(model)
    if adapter_name is not None:
        given = _load_named(model, folder, adapter_name, quantize)
        trained_over.warn_if_other(folder / WEIGHTS_NAME, model, given)
        return
    layers = _layers(model)
    named = _adapter_names(model)
    if named:
        raise ValueError(
            f"model: has adapters {named}; wanted an adapter_name for this one, or a model without"
        )
    if layers and quantize is not None:
        raise ValueError(
            f"quantize: got {quantize!r}, but the model has adapters already, whose weights stay "
            "as they are; wanted None"
        )
    if not layers and has_peft_layers(model):
        raise ValueError(
            "model: has PEFT's adapters; wanted a plain model, or one made with fused_lora.inject "
            "(for this one call its own load_adapter, then fused_lora.peft.fuse)"
        )
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"model: {merged[0]} is merged; call unmerge() before loading")
    for path, layer in layers.items():
        if layer.lora_A_init is not None:
            raise ValueError(
                f"model: {path} has a residual weight (init_lora_weights="
                f"{layer.init_lora_weights!r}), and adapters on disk go with the original one; "
                "load into the model without adapters"
            )
    config = read_config(folder / CONFIG_NAME)
    tensors = _read_weights(folder)
    options = {name: config[name] for name in _SAME}
    to_save: Mapping[str, nn.Module]
    if layers:
        places = _places(model, layers)
        expected = {places[path]: _Sides.of(layer) for path, layer in layers.items()}
        to_save = trained_copies(model)
    else:
        to_save, _ = find_modules_to_save(model, config["modules_to_save"])
        expected = _expected(model, config, to_save)
    _check_tensors(tensors, expected, config["use_dora"], _whole_modules(to_save))
    if layers:
        _check_computation(layers, config)
        _check_finite(tensors, layers, places)
    else:
        inject(
            model,
            config["r"],
            config["lora_alpha"],
            config["target_modules"],
            target_parameters=config["target_parameters"],
            modules_to_save=config["modules_to_save"],
            lora_dropout=config["lora_dropout"],
            use_rslora=config["use_rslora"],
            use_dora=config["use_dora"],
            quantize=quantize,
            **options,
        )
        layers = _layers(model)
        places = _places(model, layers)
    for path, layer in layers.items():
        for name in _TENSORS:
            key = _key(places[path], name)
            if key in tensors:
                fill(getattr(layer, name), tensors[key])
    for name, tensor in _whole_modules(trained_copies(model)).items():
        fill(tensor, tensors[name])
    trained_over.warn_if_other(folder / WEIGHTS_NAME, model, layers)


class _Sides(NamedTuple):
    """What the shapes of an adapter's tensors follow from."""

    rank: int  # of all experts together
    in_features: int
    out_features: int

    @classmethod
    def of(cls, layer: Any) -> _Sides:
        return cls(layer.lora_A.shape[0], layer.in_features, layer.out_features)


def _whole_modules(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of ``modules_to_save``, by their names in the files."""
    return {
        _PREFIX + name: tensor
        for path, module in modules.items()
        for name, tensor in tensors_of(own_path(path), module)
    }


def _expected(
    model: nn.Module, config: dict[str, Any], to_save: Collection[str]
) -> dict[str, _Sides]:
    """By their paths in the files, the adapters that ``config`` gives a plain model."""
    linears: dict[str, Any] = {path: m for path, m in model.named_modules() if is_linear(m)}
    targets = config["target_modules"] or []
    matched = match_modules(model, targets, config["exclude_modules"], numbers_of(config))
    paths = [path for path in matched if path in linears and not is_at(path, to_save)]
    mixtures = find_experts(model, config["target_parameters"])
    if targets and not paths:
        names = sorted({path.rpartition(".")[2] for path in linears})
        raise ValueError(
            f"{CONFIG_NAME}: target_modules: {config['target_modules']!r} matches no nn.Linear "
            f"of the model, which has {names}; is it the adapter's base model?"
        )
    if mixtures.skipped:
        path, why = next(iter(mixtures.skipped.items()))
        raise ValueError(
            f"{CONFIG_NAME}: target_parameters: {path}: {why}; PEFT loads and merges such adapters"
        )
    experts: dict[str, Any] = {path: model.get_submodule(path) for path in mixtures.projections}
    _check_one_path(model, [*(linears[path] for path in paths), *experts.values()])
    ranks = ranks_of(config["rank_pattern"], config["r"], paths + mixtures.paths())
    found = {
        path: _Sides(ranks[path], linears[path].in_features, linears[path].out_features)
        for path in paths
    }
    for path, names in mixtures.projections.items():
        for name, place in nested(experts[path], names).items():
            E, out_features, in_features = weight_of(experts[path], name).shape
            found[path + place] = _Sides(E * ranks[f"{path}.{name}"], in_features, out_features)
    return found


def _folder(directory: object) -> Path:
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"directory: got {directory!r}, wanted a path")
    if not os.fspath(directory):  # which Path takes for the current folder
        raise ValueError(f"directory: got {directory!r}, wanted a folder's path")
    return Path(directory)


def _check_finite(
    tensors: dict[str, Tensor], layers: dict[str, Any], places: dict[str, str]
) -> None:
    """ValueError if a value is not finite in its layer's dtype."""
    for path, layer in layers.items():
        for name in _TENSORS:
            key = _key(places[path], name)
            dtype = getattr(layer, name).dtype if key in tensors else None
            if dtype is not None and not tensors[key].to(dtype).isfinite().all():
                raise ValueError(f"{key}: has values that are not finite in the layer's {dtype}")


def _load_named(
    model: nn.Module, folder: Path, adapter_name: str, quantize: Quantize
) -> dict[str, FusedMultiLoRALinear]:
    """The layers that have it now, by path."""
    layers = _layers(model)
    if layers:
        raise ValueError(
            f"model: has adapters already, at {next(iter(layers))}; wanted a "
            "model without, or with named ones"
        )
    config = read_config(folder / CONFIG_NAME)
    if config["use_dora"]:
        raise ValueError(
            f"{folder / CONFIG_NAME}: use_dora: got True, wanted False: a layer with "
            "several adapters has no magnitudes"
        )
    if config["target_parameters"]:
        raise ValueError(
            f"{folder / CONFIG_NAME}: target_parameters: got {config['target_parameters']!r}, "
            "wanted none: a mixture of experts has one adapter"
        )
    if config["modules_to_save"]:
        raise ValueError(
            f"{folder / CONFIG_NAME}: modules_to_save: got {config['modules_to_save']!r}, wanted "
            "none: of several adapters none has whole modules"
        )
    tensors = _read_weights(folder)
    modules: dict[str, Any] = dict(model.named_modules())
    targets = (config["target_modules"], config["exclude_modules"])
    matched = match_modules(model, *targets, numbers_of(config))
    paths = [path for path in matched if path in modules and can_adapt(modules[path])]
    _check_one_path(model, [modules[path] for path in paths])
    ranks = ranks_of(config["rank_pattern"], config["r"], paths)
    sides = {p: _Sides(ranks[p], modules[p].in_features, modules[p].out_features) for p in paths}
    _check_tensors(tensors, sides, False, {})
    names = (*_SAME, "lora_dropout", "use_rslora")
    numbers = (config["r"], config["lora_alpha"], config["target_modules"])
    options = {name: config[name] for name in names}
    add_adapter(model, adapter_name, *numbers, quantize=quantize, **options)
    given = layers_with(model, adapter_name)
    for path, layer in given.items():
        fill(layer.lora_A[adapter_name], tensors[_key(path, "lora_A")])
        fill(layer.lora_B[adapter_name], tensors[_key(path, "lora_B")])
    return {own_path(path): layer for path, layer in given.items()}


@dataclass(frozen=True)
class _Named:
    """One of a layer's several adapters, as a layer that has no other."""

    lora_A: Tensor
    lora_B: Tensor
    lora_alpha: float
    use_rslora: bool
    scaling: float
    lora_dropout: float
    lora_magnitude_vector: Tensor | None = None
    lora_A_init: Tensor | None = None
    lora_B_init: Tensor | None = None
    use_dora: bool = False
    merged: bool = False


def _named(layer: FusedMultiLoRALinear, name: str, lora_dropout: float) -> _Named:
    A, B = layer.lora_A[name], layer.lora_B[name]
    numbers = (layer.lora_alpha[name], layer.use_rslora[name], layer.scaling[name])
    return _Named(A, B, *numbers, lora_dropout)


def _inner(model: Any) -> Any:
    """The model in DistributedDataParallel or DataParallel, or in a compiled one."""
    wrapped = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, wrapped) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrapped) else model._orig_mod
    return model


def _layers(model: Any, adapter_name: str | None = None) -> dict[str, Any]:
    """The adapted layers, with the parameters that they keep, by their paths without wrappers.

    Of a mixture of experts each `ExpertsAdapter`, by the path of its projection's parameter.
    """
    checks.check_module("model", model)
    if isinstance(model, (FusedLoRALinear, FusedMultiLoRALinear)):
        raise ValueError(
            f"model: got a {type(model).__name__} itself, wanted a module that contains some"
        )
    reshard(model)
    if adapter_name is not None:
        found = layers_with(model, adapter_name)
        # Layers that had an adapter before have its dropout; PEFT's format has one for all.
        dropout = max((layer.lora_dropout for layer in found.values()), default=0.0)
        _check_one_path(model, found.values())
        return {own_path(p): _named(layer, adapter_name, dropout) for p, layer in found.items()}
    layers: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, FusedLoRALinear):
            layers[own_path(path)] = module
        elif isinstance(module, FusedLoRAExperts):
            layers |= {f"{own_path(path)}.{n}": adapter for n, adapter in module.adapters.items()}
    _check_one_path(model, layers.values())
    return layers


def _places(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Each layer's path in the files."""
    places = {path: path for path in layers}
    for path, module in model.named_modules():
        if isinstance(module, FusedLoRAExperts):
            at = own_path(path)
            wrappers = nested(module.base_layer, list(module.adapters))
            places |= {f"{at}.{name}": at + wrapper for name, wrapper in wrappers.items()}
    return places


def _check_one_path(model: nn.Module, adapted: Iterable[nn.Module]) -> None:
    """ValueError if one of the modules is at several paths: on disk an adapter has one."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module in adapted:
        if len(paths[module]) > 1:
            raise ValueError(
                f"model: {' and '.join(paths[module])} are one module, and on disk an adapter is "
                "that of one path"
            )


def _adapter_names(model: nn.Module) -> list[str]:
    """Those of `add_adapter`'s."""
    layers = [m for m in model.modules() if isinstance(m, FusedMultiLoRALinear)]
    return list(dict.fromkeys(name for layer in layers for name in layer.adapters))


class _Saved(NamedTuple):
    """One layer as PEFT's format has it: W0 + scaling * B A with W0 the original weight."""

    lora_A: Tensor
    lora_B: Tensor
    lora_magnitude_vector: Tensor | None
    lora_alpha: float
    r: int

    def tensors(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor for name, tensor in values.items() if tensor is not None}


def _saved(layer: FusedLoRALinear | ExpertsAdapter | _Named) -> _Saved:
    A, B = whole(layer.lora_A.detach()), whole(layer.lora_B.detach())
    magnitude = layer.lora_magnitude_vector
    if magnitude is not None:
        magnitude = whole(magnitude.detach())
    if layer.lora_A_init is not None and layer.lora_B_init is not None:
        A = torch.cat([A, whole(layer.lora_A_init)])
        B = torch.cat([B, -whole(layer.lora_B_init)], dim=1)
    alpha, rank = layer.lora_alpha, A.shape[0]
    if isinstance(layer, ExpertsAdapter):
        rank = layer.r  # of each
    if layer.scaling != FusedLoRALinear.scaling_of(alpha, rank, layer.use_rslora):
        # It is the larger rank of a residual, or A and B or the scaling were replaced.
        alpha = layer.scaling / FusedLoRALinear.scaling_of(1.0, rank, layer.use_rslora)
    return _Saved(A, B, magnitude, alpha, rank)


def _key(path: str, name: str) -> str:
    return f"{_PREFIX}{own_path(path)}.{name}{_TENSORS[name]}"


def _only(name: str, layers: dict[str, Any]) -> Any:
    values = {getattr(layer, name) for layer in layers.values()}
    if len(values) > 1:
        raise ValueError(f"model: its layers differ in {name}, {values}; PEFT's format has one")
    return values.pop()


def _config(
    model: nn.Module, layers: dict[str, Any], saved: dict[str, _Saved]
) -> dict[str, object]:
    """The fields of PEFT's LoraConfig that these layers set."""
    experts = [path for path, layer in layers.items() if isinstance(layer, ExpertsAdapter)]
    ranks = {path: layer.r for path, layer in saved.items()}
    # Plain numbers: NumPy's are no JSON.
    alphas = {
        path: alpha if isinstance(alpha := layer.lora_alpha, int) else float(alpha)
        for path, layer in saved.items()
    }
    r, lora_alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": name or None,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": _only("lora_dropout", layers),
        "use_rslora": _only("use_rslora", layers),
        "use_dora": _only("use_dora", layers),
        "target_modules": _target_modules(model, layers.keys() - experts),
        "target_parameters": _target_parameters(model, experts) or None,
        "modules_to_save": list(trained_copies(model)) or None,
        # Without the anchor "q" would be every "....q" too.
        "rank_pattern": {f"^{re.escape(p)}": n for p, n in ranks.items() if n != r},
        "alpha_pattern": {f"^{re.escape(p)}": n for p, n in alphas.items() if n != lora_alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "task_type": _task_type(model),
    }


def _task_type(model: nn.Module) -> str | None:
    """Without it PEFT's AutoPeftModelForCausalLM does not know the class; it wants `generate`'s."""
    generates = hasattr(model, "prepare_inputs_for_generation")
    return "CAUSAL_LM" if generates and type(model).__name__.endswith("ForCausalLM") else None


def _target_parameters(model: nn.Module, experts: Collection[str]) -> list[str]:
    """The shortest ends by which PEFT matches these parameters and no other."""
    inner = (f".{name}." for name in ("base_layer", "adapters"))
    paths = [own_path(path) for path, _ in model.named_parameters(remove_duplicate=False)]
    others = [path for path in paths if not any(part in path for part in inner)]
    for parts in (2, 3):
        ends = sorted({".".join(path.split(".")[-parts:]) for path in experts})
        if set(match_paths("target_parameters", ends, [*others, *experts])) == set(experts):
            return ends
    return sorted(experts)


def _target_modules(model: nn.Module, layers: Collection[str]) -> list[str] | str:
    """The shortest form by which PEFT matches these layers and no other module."""
    names = sorted({path.rpartition(".")[2] for path in layers})
    paths = [own_path(path) for path, _ in model.named_modules(remove_duplicate=False)]
    for targets in (names, sorted(layers)):
        if set(match_paths("target_modules", targets, paths)) == set(layers):
            return targets
    return "|".join(re.escape(path) for path in sorted(layers))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        advice = f"; {pickled.name} is a pickle, which is never loaded: convert it to safetensors"
        raise FileNotFoundError(
            f"{path}: there is no such file" + (advice if pickled.exists() else "")
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: is no safetensors file, or a damaged one: {error}") from None
    return {own_path(name): tensor for name, tensor in tensors.items()}


def _check_tensors(
    tensors: dict[str, Tensor],
    expected: dict[str, _Sides],
    use_dora: bool,
    whole_modules: dict[str, Tensor],
) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in whole_modules.items()}
    for path, (r, in_features, out_features) in expected.items():
        shapes[_key(path, "lora_A")] = [r, in_features]
        shapes[_key(path, "lora_B")] = [out_features, r]
        if use_dora:
            shapes[_key(path, "lora_magnitude_vector")] = [out_features]
    missing, unexpected = sorted(shapes.keys() - tensors), sorted(tensors.keys() - shapes)
    if missing or unexpected:
        raise ValueError(
            f"{WEIGHTS_NAME}: does not fit the model's layers: {len(missing)} tensors are missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}; is it the adapter's "
            "base model?"
        )
    for key, tensor in tensors.items():
        if list(tensor.shape) != shapes[key]:
            raise ValueError(
                f"{WEIGHTS_NAME}: {key}: got shape {list(tensor.shape)}, wanted {shapes[key]}"
            )
        there = whole_modules.get(key)
        if there is not None and not there.is_floating_point():  # BatchNorm's counter
            if tensor.dtype != there.dtype:
                raise ValueError(f"{WEIGHTS_NAME}: {key}: got {tensor.dtype}, wanted {there.dtype}")
            continue
        if tensor.dtype not in checks.DTYPES:
            raise ValueError(f"{WEIGHTS_NAME}: {key}: got {tensor.dtype}, wanted floating point")
        values = tensor if there is None else tensor.to(there.dtype)
        if not torch.isfinite(values).all():
            raise ValueError(f"{WEIGHTS_NAME}: {key}: has values that are not finite")


def _check_computation(layers: dict[str, Any], config: dict[str, Any]) -> None:
    paths = list(layers)
    alphas = alphas_of(config["alpha_pattern"], config["lora_alpha"], paths)
    for path, layer in layers.items():
        if config["use_dora"] != layer.use_dora:
            raise ValueError(
                f"{CONFIG_NAME}: use_dora: got {config['use_dora']}, and {path} of the model has "
                f"{layer.use_dora}"
            )
        scaling = FusedLoRALinear.scaling_of(alphas[path], layer.r, config["use_rslora"])
        if not math.isclose(scaling, layer.scaling, rel_tol=1e-9):  # an alpha of it is rounded
            raise ValueError(
                f"{CONFIG_NAME}: gives {path} a scaling of {scaling}, the model's is "
                f"{layer.scaling}"
            )
