"""Switching a model's adapters off for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from . import checks
from .modules_to_save import ModuleToSave
from .switch import Switchable

_lock = threading.Lock()


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside, the model's layers are their frozen base layers: as `PeftModel.disable_adapter`.

    And of ``modules_to_save`` the original modules.

    For what needs the model before and after training at once (DPO's reference), or a comparison:

        with torch.no_grad(), disable_adapter(model):
            reference = model(tokens).logits

    It is a state of the layers, for all threads, until the last of them has left, and entered
    outside of a compiled function. Of a layer whose base weight is a residual ("pissa", "olora",
    "loftq") that is what is computed. Activation checkpointing runs the forward again in the
    backward pass, which has to be inside too, then.

    Raises TypeError if model is no module, ValueError if it has no adapters of ours or merged ones.
    """
    checks.check_module("model", model)
    layers = {path: m for path, m in model.named_modules() if isinstance(m, Switchable)}
    if not layers:
        raise ValueError("model: has no adapters of fused_lora's; PEFT's models have their own")
    for path, layer in layers.items():
        # One of many adapters is never; a module to save has what its module has.
        if not isinstance(layer, ModuleToSave) and getattr(layer, "merged", False):
            raise ValueError(f"model: {path or 'the layer'} is merged; call unmerge() first")
    _count(layers.values(), 1)
    try:
        yield
    finally:
        _count(layers.values(), -1)


def _count(layers: Iterable[Switchable], more: int) -> None:
    with _lock:
        for layer in layers:
            layer.disabled += more
