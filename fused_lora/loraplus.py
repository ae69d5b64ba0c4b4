"""`lora_plus_param_groups`: LoRA+, where B learns faster than A."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from . import checks


def lora_plus_param_groups(
    model: nn.Module,
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: B gets ``lr * loraplus_lr_ratio``, A gets ``lr``.

    LoRA+ (https://arxiv.org/abs/2402.12354). The groups are those of PEFT's
    ``create_loraplus_optimizer``, in its order; some may be empty:

        A and everything else           lr, decayed
        PEFT's LoRA embeddings          loraplus_lr_embedding, decayed
        B and vectors                   lr * loraplus_lr_ratio, decayed
        biases, LayerNorm, among them   lr * loraplus_lr_ratio, never decayed

    Args:
        model: made with `inject`, or with PEFT. Only what requires a gradient is in a group.
        lr: positive. loraplus_lr_ratio: positive, the paper's advice is 16 or so.
        loraplus_weight_decay, loraplus_lr_embedding: not negative.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or range, or nothing is trainable.
    """
    checks.check_module("model", model)
    numbers = {"lr": lr, "loraplus_lr_ratio": loraplus_lr_ratio}
    not_negative = {
        "loraplus_weight_decay": loraplus_weight_decay,
        "loraplus_lr_embedding": loraplus_lr_embedding,
    }
    for name, value in (numbers | not_negative).items():
        checks.check_number(name, value)
        if value < 0 or (value == 0 and name in numbers):
            raise ValueError(
                f"{name}: got {value}, wanted " + ("> 0" if name in numbers else "at least 0")
            )
    decayed = {name for name in _outside_layer_norms(model) if "bias" not in name}
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": loraplus_weight_decay, "lr": lr},
        {"params": [], "weight_decay": loraplus_weight_decay, "lr": loraplus_lr_embedding},
        {"params": [], "weight_decay": loraplus_weight_decay, "lr": lr * loraplus_lr_ratio},
        {"params": [], "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    ]
    group_A, embedding, group_B, group_B_no_decay = groups
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_embedding_" in name:
            group = embedding
        elif "lora_B" in name or parameter.ndim == 1:
            group = group_B if name in decayed else group_B_no_decay
        else:
            group = group_A
        group["params"].append(parameter)
    if not any("lora_B" in name and p.requires_grad for name, p in model.named_parameters()):
        raise ValueError(
            "model: has no lora_B that requires a gradient; wanted one made with fused_lora.inject "
            "or PEFT"
        )
    return groups


def _outside_layer_norms(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the parameters that no LayerNorm holds, as transformers' Trainer decides decay."""
    for name in module._parameters:
        yield prefix + name
    for name, child in module.named_children():
        if not isinstance(child, nn.LayerNorm):
            yield from _outside_layer_norms(child, f"{prefix}{name}.")
