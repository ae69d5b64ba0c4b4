"""Adapters into the base weights for good: `merge_and_unload`, and `fused-lora merge`."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from . import checks
from .expert_layer import FusedLoRAExperts
from .gated_mlp import ungate_mlps
from .linear import FusedLoRALinear
from .matching import has_peft_layers
from .modules_to_save import unload
from .multi_linear import FusedMultiLoRALinear
from .quantized_weight import QuantizedWeight
from .sharded import is_sharded


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merges every `FusedLoRALinear` of ``model`` and puts a plain `nn.Linear` in its place.

    And every `FusedLoRAExperts`, in whose place the module of experts comes again. Of
    ``modules_to_save`` the trained copies stay.

    As PEFT's method of that name. Returns ``model``, whose weights stay frozen. A layer that is
    used at several paths stays one layer.

    Weights in codes become plain ones in their dtype. Raises ValueError if the model has no
    adapters, several (`add_adapter`), or ones merged into codes (``merge(requantize=True)``), if it
    is sharded, a layer has hooks, or a merged weight would not be finite; RuntimeError inside
    `disable_adapter` or over a parametrised weight; TypeError if it is no module. No layer has been
    replaced then, and none is left merged that was not.
    """
    checks.check_module("model", model)
    paths: dict[FusedLoRALinear | FusedLoRAExperts, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (FusedLoRALinear, FusedLoRAExperts)):
            if not path:
                raise ValueError(f"model: got a {type(module).__name__} itself; call its merge()")
            if module.merged and isinstance(getattr(module, "weight", None), QuantizedWeight):
                raise ValueError(
                    f"model: {path} is merged into codes, which an nn.Linear cannot have; call its "
                    "unmerge() before, or keep the layer"
                )
            paths.setdefault(module, []).append(path)
        elif isinstance(module, FusedMultiLoRALinear):
            raise ValueError(
                f"model: {path} has adapters {module.adapters}, each for rows of its own; save one "
                "with save_adapter, load it into a plain model without a name, and merge that"
            )
    if not paths:
        theirs = "; PEFT's models have their own merge_and_unload" * has_peft_layers(model)
        raise ValueError(
            f"model: has no FusedLoRALinear; wanted one made with fused_lora.inject{theirs}"
        )
    for layer, (path, *_) in paths.items():
        if any(map(is_sharded, layer.parameters())):
            raise ValueError(
                f"model: {path}'s weight is spread over processes, and an nn.Linear in its place "
                "would have no part in that; wanted a model that is whole (each layer's merge(), "
                "after FSDP2's reshard(), is right where it is and leaves the layer there)"
            )
        checks.check_unhooked(f"model: {path}", layer)
    with contextlib.ExitStack() as undo:
        for layer in paths:
            if not layer.merged:
                undo.callback(layer.unmerging())
                layer.merge()
        undo.pop_all()
    for layer, places in paths.items():
        plain = layer.plain()
        plain.train(layer.training)
        for path in places:
            model.set_submodule(path, plain)
    unload(model)
    ungate_mlps(model)
    return model


def merge_adapter(adapter: Path, out: Path, base: str | None = None) -> str:
    """Writes the model of the adapter in folder ``adapter``, merged, to the new folder ``out``.

    ``base``: the base model (see `models.load_model`); None takes the one that the adapter's config
    names. Weights keep their dtype; the folder has safetensors, config and tokenizer, and appears
    whole or not at all. Returns the base model's name. Warns of an adapter that was trained over
    codes, whose rounding the merged model has not.

    Raises FileExistsError if ``out`` is there already, ValueError if no base model is named, and
    what loading either raises.
    """
    from .adapter_config import CONFIG_NAME, read_config
    from .adapters import load_adapter
    from .models import load_model, load_tokenizer

    if out.exists():
        raise FileExistsError(f"out: {out} is there already; wanted a new folder")
    path = adapter / CONFIG_NAME
    config = read_config(path)
    task, named = config.get("task_type"), config.get("base_model_name_or_path")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"{path}: task_type: got {task!r}, wanted a causal language model's")
    if base is None:
        if not isinstance(named, str) or not named:
            raise ValueError(f"{path}: names no base model; give one with --model")
        base = named
    model = load_model(base, "auto", torch.device("cpu"))
    load_adapter(model, adapter)
    merge_and_unload(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        model.save_pretrained(str(temporary))  # type: ignore[operator]
        load_tokenizer(base).save_pretrained(str(temporary))
        temporary.chmod(0o755)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return base
