"""`InjectReport`: what `inject` and `add_adapter` did."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import foreign, sharing
from .expert_modules import describe_mixtures
from .gated_mlp import describe_mlps
from .quantized_weight import QuantizedWeight, Weight


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did; ``print`` it to read it."""

    layers: tuple[str, ...]  # paths of the modules that were replaced
    skipped: dict[str, str]  # paths, targets and patterns that got no adapter -> why
    trainable: int  # parameters of the adapters and of the trained copies that were put in
    total: int  # all parameters, the adapters' included, shared ones counted once
    adapted: int  # parameters of what they are over: what full fine-tuning of it would train
    groups: tuple[tuple[str, ...], ...] = ()  # paths of layers that are computed together
    gated: tuple[str, ...] = ()  # paths of MLPs whose last layer makes act(gate) * up
    mixtures: tuple[str, ...] = ()  # paths of mixtures of experts
    unused_quantize: tuple[str, ...] = ()  # what ``skipped`` has of ``quantize``
    modules_to_save: tuple[str, ...] = ()  # paths of modules of which a copy is trained in whole
    # ||W - W0|| / ||W|| over all weights W that were put into codes W0, or W0 + scaling * B A where
    # the adapter starts with a part of them; None if there are none.
    quantization_error: float | None = None

    @property
    def saved(self) -> float:
        """Share of the replaced weights' parameters that need not be trained, 0 to 1."""
        return 1.0 - self.trainable / max(self.adapted, 1)

    def __str__(self) -> str:
        share = self.trainable / max(self.total, 1)
        lines = [
            f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)} adapted: {self.trainable:,} "
            f"trainable parameters of {self.total:,} ({share:.2%}); instead "
            f"of {self.adapted:,} in those weights"
            + (f", {self.saved:.1%} saved" if self.saved > 0 else "")
        ]
        if self.quantization_error is not None:
            lines.append(
                f"  quantised: the weights, with what adapters start with of them, differ from the "
                f"original ones by {self.quantization_error:.2%} of their norm"
            )
        lines += [f"  trained in whole: {path}" for path in self.modules_to_save]
        lines += [f"  skipped {path}: {why}" for path, why in self.skipped.items()]
        lines += sharing.describe_groups(self.groups) + describe_mlps(self.gated)
        lines += describe_mixtures(self.mixtures)
        return "\n".join(lines)


def count_parameters(model: nn.Module) -> int:
    """All parameters; of a quantised weight those that it stands for, not its codes and scales."""
    quantized = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
    parts = {p for weight in quantized for p in weight.parameters()}
    plain = sum(p.numel() for p in model.parameters() if p not in parts)
    return plain + sum(weight.numel() for weight in quantized)


@torch.no_grad()
def norms_of_change(
    linear: nn.Module, weight: Weight, start: Tensor | None = None
) -> list[tuple[float, float]]:
    """||W - W0|| and ||W|| if W0 is codes that were made here of W, or of W less ``start``."""
    if not isinstance(weight, QuantizedWeight):
        return []
    if isinstance(linear, nn.Linear) and not foreign.is_quantized(linear):
        original = linear.weight.float()
    elif start is None:
        return []  # taken as it was
    else:
        original = foreign.read(linear).dequantize(torch.float32)
    now = weight.dequantize(torch.float32)
    if start is not None:
        now += start
    return [((now - original).norm().item(), original.norm().item())]


@torch.no_grad()
def norms_of_experts(original: Tensor, weight: Weight) -> list[tuple[float, float]]:
    """`norms_of_change` of experts' weights [E, N, K], of one at a time."""
    if not isinstance(weight, QuantizedWeight):
        return []
    changes = []
    for e, own in enumerate(original):
        (change,) = weight.dequantize(torch.float32, slice(e, e + 1))
        change -= own
        changes.append((change.norm().item(), own.float().norm().item()))
    return changes


def relative_norm(changes: list[tuple[float, float]]) -> float:
    """The norm of all changes over that of all weights."""
    changed, size = (math.hypot(*norms) for norms in zip(*changes, strict=True))
    return changed / size if size else 0.0
