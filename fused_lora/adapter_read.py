"""adapter_model.safetensors: untrusted input, checked against the model that it is for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks
from .adapter_config import CONFIG_NAME, numbers_of
from .adapter_layers import PREFIX, check_one_path, key_of, whole_modules
from .expert_layer import nested
from .expert_modules import weight_of
from .initial import adapter_dtype_over, scaling_of
from .matching import IN_SAVED, find_experts, match_modules
from .paths import own_path, place_of
from .patterns import alphas_of, ranks_of

WEIGHTS_NAME = "adapter_model.safetensors"


class Wanted(NamedTuple):
    """What a tensor in the file has to be, and the dtype that its values get."""

    shape: list[int]
    dtype: torch.dtype


def _wanted(
    path: str, rank: int, layer: Any, dtype: torch.dtype, use_dora: bool
) -> dict[str, Wanted]:
    """Of a layer, or of experts with ``rank`` of all together; by their names in the file."""
    found = {
        key_of(path, "lora_A"): Wanted([rank, layer.in_features], dtype),
        key_of(path, "lora_B"): Wanted([layer.out_features, rank], dtype),
    }
    if use_dora:
        found[key_of(path, "lora_magnitude_vector")] = Wanted([layer.out_features], dtype)
    return found


def wanted_of_layers(
    layers: Mapping[str, Any], places: Mapping[str, str], use_dora: bool
) -> dict[str, Wanted]:
    """For adapters that there are."""
    found: dict[str, Wanted] = {}
    for path, layer in layers.items():
        A = layer.lora_A
        found |= _wanted(places[path], A.shape[0], layer, A.dtype, use_dora)
    return found


def wanted_of_modules(to_save: Mapping[str, nn.Module]) -> dict[str, Wanted]:
    """For ``modules_to_save``."""
    tensors = whole_modules(to_save).items()
    return {name: Wanted(list(tensor.shape), tensor.dtype) for name, tensor in tensors}


def wanted_of_config(
    model: nn.Module,
    config: dict[str, Any],
    adaptable: Callable[[nn.Module], bool],
    to_save: Collection[str] = (),
) -> dict[str, Wanted]:
    """For the adapters that ``config`` gives a model without, in the dtypes that they get."""
    modules: dict[str, Any] = {path: m for path, m in model.named_modules() if adaptable(m)}
    targets = config["target_modules"] or []
    matched = match_modules(model, targets, config["exclude_modules"], numbers_of(config))
    paths = [path for path in matched if path in modules and not place_of(path, to_save)]
    mixtures = find_experts(model, config["target_parameters"], to_save)
    if targets and not paths:
        names = sorted({path.rpartition(".")[2] for path in modules})
        raise ValueError(
            f"{CONFIG_NAME}: target_modules: {config['target_modules']!r} matches no nn.Linear "
            f"of the model, which has {names}; is it the adapter's base model?"
        )
    for path, why in mixtures.skipped.items():
        if why != IN_SAVED:
            raise ValueError(
                f"{CONFIG_NAME}: target_parameters: {path}: {why}; PEFT loads and merges such "
                "adapters"
            )
    experts: dict[str, Any] = {path: model.get_submodule(path) for path in mixtures.projections}
    check_one_path(model, [*(modules[path] for path in paths), *experts.values()])
    ranks = ranks_of(config["rank_pattern"], config["r"], paths + mixtures.paths())
    found: dict[str, Wanted] = {}
    for path in paths:
        layer = modules[path]
        dtype = adapter_dtype_over(layer.weight.dtype)
        found |= _wanted(path, ranks[path], layer, dtype, config["use_dora"])
    for path, names in mixtures.projections.items():
        for name, place in nested(experts[path], names).items():
            weight = weight_of(experts[path], name)
            E, out_features, in_features = weight.shape
            sides = SimpleNamespace(in_features=in_features, out_features=out_features)
            rank = E * ranks[f"{path}.{name}"]
            found |= _wanted(path + place, rank, sides, adapter_dtype_over(weight.dtype), False)
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


def without_copies(
    tensors: dict[str, Tensor], wanted: Collection[str], to_save: Collection[str]
) -> dict[str, Tensor]:
    """Without what PEFT writes of its wrappers of embeddings besides, if the vocabulary grew."""
    wrappers = [
        f"{PREFIX}{own_path(path)}.{part}"
        for path in to_save
        for part in ("original_module", "modules_to_save")
    ]
    return {
        name: tensor
        for name, tensor in tensors.items()
        if name in wanted or not place_of(name, wrappers)
    }


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Wanted]) -> None:
    """ValueError unless they are what is wanted, and finite in the dtype that they get."""
    missing, unexpected = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing or unexpected:
        raise ValueError(
            f"{WEIGHTS_NAME}: does not fit the model's layers: {len(missing)} tensors are missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}; is it the adapter's "
            "base model, with the same modules_to_save? (Of a vocabulary that grew PEFT writes the "
            "embeddings too, unless modules_to_save has them or save_embedding_layers is False)"
        )
    for name, tensor in tensors.items():
        shape, dtype = wanted[name]
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{WEIGHTS_NAME}: {name}: got shape {list(tensor.shape)}, wanted {shape}"
                + "; does the model need resize_token_embeddings first?" * ("lora_" not in name)
            )
        if not dtype.is_floating_point:  # BatchNorm's counter
            if tensor.dtype != dtype:
                raise ValueError(f"{WEIGHTS_NAME}: {name}: got {tensor.dtype}, wanted {dtype}")
            continue
        if tensor.dtype not in checks.DTYPES:
            raise ValueError(f"{WEIGHTS_NAME}: {name}: got {tensor.dtype}, wanted floating point")
        if not torch.isfinite(tensor.to(dtype)).all():
            raise ValueError(
                f"{WEIGHTS_NAME}: {name}: has values that are not finite in the layer's {dtype}"
            )


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
        scaling = scaling_of(alphas[path], layer.r, config["use_rslora"])
        if not math.isclose(scaling, layer.scaling, rel_tol=1e-9):  # an alpha of it is rounded
            raise ValueError(
                f"{CONFIG_NAME}: gives {path} a scaling of {scaling}, the model's is "
                f"{layer.scaling}"
            )
