"""adapter_model.safetensors: untrusted input, checked against the model that it is for."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks
from .adapter_config import CONFIG_NAME, numbers_of
from .adapter_layers import TENSORS, check_one_path, key_of
from .expert_layer import nested
from .expert_modules import weight_of
from .linear import FusedLoRALinear
from .matching import alphas_of, find_experts, is_at, is_linear, match_modules, own_path, ranks_of

WEIGHTS_NAME = "adapter_model.safetensors"


class Sides(NamedTuple):
    """What the shapes of an adapter's tensors follow from."""

    rank: int  # of all experts together
    in_features: int
    out_features: int

    @classmethod
    def of(cls, layer: Any) -> Sides:
        return cls(layer.lora_A.shape[0], layer.in_features, layer.out_features)


def expected_of(
    model: nn.Module, config: dict[str, Any], to_save: Collection[str]
) -> dict[str, Sides]:
    """By their paths in the files, the adapters that ``config`` gives a plain model."""
    linears: dict[str, Any] = {path: m for path, m in model.named_modules() if is_linear(m)}
    targets = config["target_modules"] or []
    matched = match_modules(model, targets, config["exclude_modules"], numbers_of(config))
    paths = [path for path in matched if path in linears and not is_at(path, to_save)]
    mixtures = find_experts(model, config["target_parameters"])
    for path in [path for path in mixtures.projections if is_at(path, to_save)]:
        del mixtures.projections[path]
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
    check_one_path(model, [*(linears[path] for path in paths), *experts.values()])
    ranks = ranks_of(config["rank_pattern"], config["r"], paths + mixtures.paths())
    found = {
        path: Sides(ranks[path], linears[path].in_features, linears[path].out_features)
        for path in paths
    }
    for path, names in mixtures.projections.items():
        for name, place in nested(experts[path], names).items():
            E, out_features, in_features = weight_of(experts[path], name).shape
            found[path + place] = Sides(E * ranks[f"{path}.{name}"], in_features, out_features)
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors by name; FileNotFoundError or ValueError if there is no such file."""
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


def check_tensors(
    tensors: dict[str, Tensor],
    expected: dict[str, Sides],
    use_dora: bool,
    whole_modules: dict[str, Tensor],
) -> None:
    """ValueError unless they are what is expected, in shape and kind, and finite."""
    shapes = {name: list(tensor.shape) for name, tensor in whole_modules.items()}
    for path, (r, in_features, out_features) in expected.items():
        shapes[key_of(path, "lora_A")] = [r, in_features]
        shapes[key_of(path, "lora_B")] = [out_features, r]
        if use_dora:
            shapes[key_of(path, "lora_magnitude_vector")] = [out_features]
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


def check_finite(
    tensors: dict[str, Tensor], layers: dict[str, Any], places: dict[str, str]
) -> None:
    """ValueError if a value is not finite in its layer's dtype."""
    for path, layer in layers.items():
        for name in TENSORS:
            key = key_of(places[path], name)
            dtype = getattr(layer, name).dtype if key in tensors else None
            if dtype is not None and not tensors[key].to(dtype).isfinite().all():
                raise ValueError(f"{key}: has values that are not finite in the layer's {dtype}")


def check_computation(layers: dict[str, Any], config: dict[str, Any]) -> None:
    """ValueError if the model's layers compute something else with the tensors."""
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
