"""What `save_adapter` writes: each layer's tensors and the fields of PEFT's LoraConfig."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapter_layers import TENSORS, NamedAdapter
from .expert_layer import ExpertsAdapter
from .initial import scaling_of
from .linear import FusedLoRALinear
from .modules_to_save import trained_copies
from .paths import match_paths, own_path
from .sharded import whole


class Saved(NamedTuple):
    """One layer as PEFT's format has it: W0 + scaling * B A with W0 the original weight."""

    lora_A: Tensor
    lora_B: Tensor
    lora_magnitude_vector: Tensor | None
    lora_alpha: float
    r: int

    def tensors(self) -> dict[str, Tensor]:
        values = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in values.items() if tensor is not None}


def saved_form(layer: FusedLoRALinear | ExpertsAdapter | NamedAdapter) -> Saved:
    """A layer's tensors in full, relative to the original weight."""
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
    if layer.scaling != scaling_of(alpha, rank, layer.use_rslora):
        # It is the larger rank of a residual, or A and B or the scaling were replaced.
        alpha = layer.scaling / scaling_of(1.0, rank, layer.use_rslora)
    return Saved(A, B, magnitude, alpha, rank)


def _only(name: str, layers: dict[str, Any]) -> Any:
    values = {getattr(layer, name) for layer in layers.values()}
    if len(values) > 1:
        raise ValueError(f"model: its layers differ in {name}, {values}; PEFT's format has one")
    return values.pop()


def config_of(
    model: nn.Module, layers: dict[str, Any], saved: dict[str, Saved]
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
    """Without it PEFT's AutoPeftModel does not know the class.

    Of heads PEFT's models of a task want trained copies: without them in the file it is no task.
    """
    if type(model).__name__.endswith("ForCausalLM"):
        return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
    for end, (task, heads) in _TASKS.items():
        if type(model).__name__.endswith(end):
            paths = {_plain_path(path) for path, _ in model.named_modules()}
            wanted = {path for path in paths if path.endswith(heads)}
            return task if wanted <= trained_copies(model).keys() else None
    return None


# By the end of a class's name: PEFT's name, and what it adds to modules_to_save.
_TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def _plain_path(path: str) -> str:
    """A path in the model as it was before ``modules_to_save`` wrapped some."""
    return re.sub(r"\.(original|trained)_module\b", "", own_path(path))


def _target_parameters(model: nn.Module, experts: Collection[str]) -> list[str]:
    """The shortest ends by which PEFT matches these parameters and no other."""
    inner = (f".{name}." for name in ("base_layer", "adapters"))
    paths = [_plain_path(path) for path, _ in model.named_parameters(remove_duplicate=False)]
    others = [path for path in paths if not any(part in path for part in inner)]
    for parts in (2, 3):
        ends = sorted({".".join(path.split(".")[-parts:]) for path in experts})
        if set(match_paths("target_parameters", ends, [*others, *experts])) == set(experts):
            return ends
    return sorted(experts)


def _target_modules(model: nn.Module, layers: Collection[str]) -> list[str] | str:
    """The shortest form by which PEFT matches these layers and no other module."""
    names = sorted({path.rpartition(".")[2] for path in layers})
    paths = [_plain_path(path) for path, _ in model.named_modules(remove_duplicate=False)]
    for targets in (names, sorted(layers)):
        if set(match_paths("target_modules", targets, paths)) == set(layers):
            return targets
    return "|".join(re.escape(path) for path in sorted(layers))
