"""Gated MLPs of models, whose last layer then takes act(gate) o up from `lora_linear_gated`.

transformers' Llama, Mistral, Qwen, Gemma, Granite and others have MLPs of one and the same formula.
Where down_proj has an adapter, such a block's class becomes a subclass with a forward that is the
same but for that. Everything is looked at on each call: what has hooks, is merged, disabled or
traced runs the block's own forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .arguments import Arguments
from .dispatch import FEW_ROWS, is_small
from .gated import Activation, are_alike, call_gated, gated_input
from .observed import is_observed, is_recorded
from .paths import in_any_layer


def _formula(self: Any, x: Any) -> Any:
    """As transformers writes it."""
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


# By the classes that transformers' configurations name by these.
_ACTIVATIONS: dict[tuple[str, str], Activation] = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_pytorch_tanh",
}


def activation_of(act: nn.Module) -> Activation | None:
    """Its name, if it is one that is known here."""
    return _ACTIVATIONS.get((type(act).__module__, type(act).__name__))


class GatedMLP(nn.Module):
    """In front of a class of MLPs of that formula."""

    plain: type[nn.Module]  # that class
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self: Any, x: Tensor) -> Tensor:
        """x [..., K] -> y [..., K], as the block's own."""
        y: Tensor
        if not isinstance(self, GatedMLP):  # whoever holds this one, bound, from before `unfuse`
            y = type(self).forward(self, x)
            return y
        activation = self._activation(x)
        if activation is None:
            y = super().forward(x)
            return y
        gate, up = self.gate_proj(x), self.up_proj(x)
        down: Any = self.down_proj
        given: Arguments | None = down.passed_on(gate)
        if given is None or not are_alike(gate, up) or _is_pytorchs(gate, given):
            y = self.down_proj(self.act_fn(gate) * up)
        elif is_recorded():
            y = call_gated(gate, up, activation, given)
        else:
            product = gated_input(gate, up, activation, given)
            del gate, up
            y = self.down_proj(product)
        return y

    def _activation(self, x: object) -> Activation | None:
        """None where the block's own forward is as good, or where somebody hears of its parts."""
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return None  # Inductor makes one pass of the formula by itself
        if x.layout is not torch.strided or x.is_nested or not _is_formula(self.plain):
            return None
        if x.shape[:-1].numel() <= FEW_ROWS or is_observed():
            return None
        down, act = self.down_proj, self.act_fn
        if not hasattr(down, "passed_on") or checks.is_hooked(down) or checks.is_hooked(act):
            return None
        if checks.all_are_hooked():
            return None
        return activation_of(act)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, where copy and pickle do not find it.

        Without an adapter it is the block's own, which can be loaded without this library.
        """
        ours = hasattr(self.down_proj, "passed_on")
        return _empty if ours else object.__new__, (self.plain,), self.__dict__


def _is_pytorchs(gate: Tensor, given: Arguments) -> bool:
    """Whether PyTorch's autograd records both parts in less time: see `is_small`."""
    return given.backend != "triton" and is_small(gate, given)


def _empty(plain: type[nn.Module]) -> nn.Module:
    kind = _gated(plain)
    block: nn.Module = kind.__new__(kind)
    return block


_gated_classes: dict[Any, Any] = {}


def _gated(plain: Any) -> Any:
    if plain not in _gated_classes:
        own = {"plain": plain, "__module__": plain.__module__}  # by which families are known
        _gated_classes[plain] = type(f"Gated{plain.__name__}", (GatedMLP, plain), own)
    return _gated_classes[plain]


def _is_formula(kind: type[nn.Module]) -> bool:
    """Whether a class's forward is the formula, instruction by instruction, and not patched."""
    code: Any = getattr(kind.forward, "__code__", None)
    wanted = _formula.__code__
    if code is None or code.co_varnames[:2] != wanted.co_varnames[:2]:
        return False
    same: bool = (code.co_code, code.co_names) == (wanted.co_code, wanted.co_names)
    return same


def gate_mlps(model: nn.Module, kinds: Collection[type[nn.Module]]) -> Iterator[str]:
    """Exchanges the class of gated MLPs whose down_proj is of one of ``kinds``; their paths."""
    for path, block in model.named_modules():
        if type(getattr(block, "down_proj", None)) in kinds:
            if _is_formula(type(block)) and "forward" not in block.__dict__:
                block.__class__ = _gated(type(block))
            if isinstance(block, GatedMLP):
                yield path


def ungate_mlps(model: nn.Module) -> None:
    """Gives every MLP its own class back."""
    for block in model.modules():
        if isinstance(block, GatedMLP) and type(block) is _gated(block.plain):
            block.__class__ = block.plain  # type: ignore[assignment]


def describe_mlps(paths: Iterable[str]) -> list[str]:
    """A line for each kind of MLP, for the reports."""
    kinds = Counter(map(in_any_layer, paths))
    what = "down_proj takes act(gate_proj) * up_proj in parts"
    return [f"  {kind}: {what}, {n} x" for kind, n in kinds.items()]
