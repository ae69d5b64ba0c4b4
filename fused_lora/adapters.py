"""Adapters on disk, in PEFT's format: `save_adapter` and `load_adapter`.

A folder holds adapter_config.json and adapter_model.safetensors. Both are untrusted input: every
field and every tensor is checked before the model is touched, and nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from . import trained_over
from .adapter_config import CONFIG_NAME, read_config
from .adapter_layers import (
    TENSORS,
    adapted_layers,
    adapter_names,
    inner,
    key_of,
    places_of,
    whole_modules,
)
from .adapter_read import (
    WEIGHTS_NAME,
    check_computation,
    check_tensors,
    read_weights,
    wanted_of_config,
    wanted_of_layers,
    wanted_of_modules,
    without_copies,
)
from .adapter_write import config_of, saved_form
from .files import write_atomically
from .inject import inject
from .inject_report import InjectReport
from .matching import has_peft_layers, is_linear
from .modules_to_save import find_modules_to_save, trained_copies
from .multi_linear import FusedMultiLoRALinear
from .multi_model import add_adapter, can_adapt, layers_with
from .paths import own_path
from .quantize import Quantize
from .quantized_weight import QuantizedWeight
from .sharded import fill, is_sharded, whole, writes_files

# Fields of the config that `inject` and `add_adapter` take as they are.
_SAME = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)


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
    model = inner(model)
    layers = adapted_layers(model, adapter_name)
    if not layers:
        if has_peft_layers(model):
            raise ValueError("model: has PEFT's adapters; call its own save_pretrained")
        named = adapter_names(model)
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
    saved = {path: saved_form(layer) for path, layer in layers.items()}
    config = config_of(model, layers, saved)
    places = places_of(model, layers)
    found: dict[str, Tensor] = {}
    for path, layer in saved.items():
        found |= {key_of(places[path], name): each for name, each in layer.tensors().items()}
    for name, tensor in whole_modules(trained_copies(model)).items():
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
) -> InjectReport | None:
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

    Returns what `inject` or `add_adapter` did to the model; None where its layers had adapters.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError, ValueError: a file is not what it should be, asks for something that changes the
            computation and is not supported (the field is named), or does not fit the model. The
            model is unchanged then.
    """
    folder = _folder(directory)
    model = inner(model)
    layers = adapted_layers(model)
    if not layers and has_peft_layers(model):
        raise ValueError(
            "model: has PEFT's adapters; wanted a plain model, or one made with fused_lora.inject "
            "(for this one call its own load_adapter, then fused_lora.peft.fuse)"
        )
    if adapter_name is not None:
        if layers:
            raise ValueError(
                f"model: has adapters already, at {next(iter(layers))}; wanted a "
                "model without, or with named ones"
            )
        named, report = _load_named(model, folder, adapter_name, quantize)
        _warn(folder, model, named, report)
        return report
    if names := adapter_names(model):
        raise ValueError(
            f"model: has adapters {names}; wanted an adapter_name for this one, or a model without"
        )
    if layers and quantize is not None:
        raise ValueError(
            f"quantize: got {quantize!r}, but the model has adapters already, whose weights stay "
            "as they are; wanted None"
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
    tensors = read_weights(folder)
    options = {name: config[name] for name in _SAME}
    to_save: Mapping[str, nn.Module]
    if layers:
        places, to_save = places_of(model, layers), trained_copies(model)
        wanted = wanted_of_layers(layers, places, config["use_dora"])
    else:
        to_save, _ = find_modules_to_save(model, config["modules_to_save"])
        wanted = wanted_of_config(model, config, is_linear, to_save)
    wanted |= wanted_of_modules(to_save)
    tensors = without_copies(tensors, wanted, to_save)
    check_tensors(tensors, wanted)
    done: InjectReport | None = None
    if layers:
        check_computation(layers, config)
    else:
        done = inject(
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
        layers = adapted_layers(model)
        places = places_of(model, layers)
    for path, layer in layers.items():
        for name in TENSORS:
            key = key_of(places[path], name)
            if key in tensors:
                fill(getattr(layer, name), tensors[key])
    for name, tensor in whole_modules(trained_copies(model)).items():
        fill(tensor, tensors[name])
    _warn(folder, model, layers, done)
    return done


def _warn(
    folder: Path, model: nn.Module, layers: dict[str, Any], report: InjectReport | None
) -> None:
    """Of codes that the adapter does not know, and of patterns of ``quantize`` without a match."""
    for pattern in report.unused_quantize if report else ():
        warnings.warn(f"fused_lora: {pattern}", stacklevel=3)
    trained_over.warn_if_other(folder / WEIGHTS_NAME, model, layers)


def _folder(directory: object) -> Path:
    if not isinstance(directory, str | os.PathLike):
        raise TypeError(f"directory: got {directory!r}, wanted a path")
    if not os.fspath(directory):  # which Path takes for the current folder
        raise ValueError(f"directory: got {directory!r}, wanted a folder's path")
    return Path(directory)


def _load_named(
    model: nn.Module, folder: Path, adapter_name: str, quantize: Quantize
) -> tuple[dict[str, FusedMultiLoRALinear], InjectReport]:
    """The layers that have it now, by path, and what was done to the model."""
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
    tensors = read_weights(folder)
    check_tensors(tensors, wanted_of_config(model, config, can_adapt))
    names = (*_SAME, "lora_dropout", "use_rslora")
    numbers = (config["r"], config["lora_alpha"], config["target_modules"])
    options = {name: config[name] for name in names}
    report = add_adapter(model, adapter_name, *numbers, quantize=quantize, **options)
    given = layers_with(model, adapter_name)
    for path, layer in given.items():
        fill(layer.lora_A[adapter_name], tensors[key_of(path, "lora_A")])
        fill(layer.lora_B[adapter_name], tensors[key_of(path, "lora_B")])
    return {own_path(path): layer for path, layer in given.items()}, report
