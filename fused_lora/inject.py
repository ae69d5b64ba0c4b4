"""`inject`: puts adapters into an existing model's `nn.Linear`s and freezes the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from . import checks, foreign, sharing
from .arguments import Arguments
from .dispatch import Backend
from .linear import FusedLoRALinear
from .multi_linear import FusedMultiLoRALinear
from .quantize import Format, QuantizedWeight, Quantizer, check_format


@dataclass(frozen=True)
class InjectReport:
    """What `inject` did; ``print`` it to read it."""

    layers: tuple[str, ...]  # paths of the modules that were replaced
    skipped: dict[str, str]  # paths and targets that were not replaced -> why
    trainable: int  # parameters of the adapters that were put in
    total: int  # all parameters, the adapters' included, shared ones counted once
    adapted: int  # parameters of the replaced weights: what full fine-tuning of them would train
    groups: tuple[tuple[str, ...], ...] = ()  # paths of layers that are computed together
    # ||W - W0|| / ||W|| over all weights W that were put into codes W0, or W0 + scaling * B A where
    # the adapter starts with a part of them; None if there are none.
    quantization_error: float | None = None

    @property
    def saved(self) -> float:
        """Share of the replaced weights' parameters that need not be trained, 0 to 1."""
        return 1.0 - self.trainable / self.adapted

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers adapted: {self.trainable:,} trainable parameters of "
            f"{self.total:,} ({self.trainable / self.total:.2%}); instead of {self.adapted:,} "
            f"in those layers' weights, {self.saved:.1%} saved"
        ]
        if self.quantization_error is not None:
            lines.append(
                f"  quantised: the weights, with what adapters start with of them, differ from the "
                f"original ones by {self.quantization_error:.2%} of their norm"
            )
        lines += [f"  skipped {path}: {why}" for path, why in self.skipped.items()]
        lines += sharing.describe_groups(self.groups)
        return "\n".join(lines)


def inject(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    target_modules: str | Collection[str],
    *,
    exclude_modules: str | Collection[str] | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    adapter_dtype: torch.dtype | None = None,
    init_lora_weights: bool | str = True,
    use_dora: bool = False,
    backend: Backend = "auto",
    groups: bool = True,
    quantize: Format | Quantizer | None = None,
) -> InjectReport:
    """Replaces matching `nn.Linear`s with `FusedLoRALinear`s in place and freezes everything else.

    Args:
        model: any module. Its weights are shared, not copied ("pissa", "olora", "loftq" and
            ``quantize`` make new ones).
        target_modules: PEFT's rules. A list of names matches a module whose path is a name or ends
            in "." + name; a string is a regular expression for the whole path, or "all-linear" for
            every `nn.Linear` but the output head (`get_output_embeddings`, where there is one).
        exclude_modules: matched in the same way, and left out.
        rank_pattern, alpha_pattern: other r and lora_alpha for the layers whose path, or the end
            of it after a dot, is matched by the key, a regular expression; the first match counts.
        r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, init_lora_weights, use_dora,
            backend: see `FusedLoRALinear`.
        groups: compute the projections that share their input (q, k, v; gate, up) together, in the
            families of transformers' models where they are known to: see `fused_lora.peft.fuse`.
        quantize: "nf4" (QLoRA), "fp4", "int8" or "fp8": the adapted layers get their weights in
            codes. Or a function, such as ``functools.partial(quantize_fp8, activations="fp8")``.
            Layers that bitsandbytes or torchao quantised are taken as they are, without it.
            With "pissa" (QPiSSA), "olora" or "loftq" the codes are those of the residual; the
            report says by how much W0 changes in all.

    Returns:
        The report: which layers, what was skipped and why, and the numbers of parameters.

    Raises:
        ValueError: nothing matched (the message lists what there is to match), the model is itself
            an `nn.Linear` or already has adapters, a pattern is no regular expression, a layer's
            argument is out of range, or a matched layer has hooks. The model is unchanged then.
        TypeError: an argument is of the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    if type(model) is nn.Linear:
        raise ValueError("model: got an nn.Linear itself; use FusedLoRALinear.from_linear")
    if has_peft_layers(model):
        raise ValueError(
            "model: has PEFT's adapters already; wanted a plain model "
            "(fused_lora.peft.fuse makes PEFT's layers fast)"
        )
    checks.check_rank(r)
    checks.check_number("lora_alpha", lora_alpha)
    checks.check_dropout("lora_dropout", lora_dropout)
    checks.check_backend(backend)
    if quantize is not None:
        check_format(quantize)
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = (FusedLoRALinear, FusedMultiLoRALinear)
    adapted = [path for path, module in modules.items() if isinstance(module, kinds)]
    if adapted:
        more = len(adapted) - 1
        raise ValueError(f"model: has adapters already, at {adapted[0]} and {more} more")
    linears = {path for path, module in modules.items() if is_linear(module)}

    matched = match_modules(model, target_modules, exclude_modules)
    layers = [path for path in matched if path in linears]
    skipped = why_skipped(modules, matched, layers, target_modules)
    if not layers:
        names = sorted({path.rpartition(".")[2] for path in linears})
        raise ValueError(
            f"target_modules: {target_modules!r} matches no nn.Linear; wanted some of {names}"
            + (f"; it does match {skipped}" if skipped else "")
        )

    for path in layers:
        checks.check_unhooked(f"model: {path}", modules[path])
    # Built first and put in last, so that a failure leaves the model as it was. A module that is
    # used at several paths stays one module.
    ranks = per_layer("rank_pattern", rank_pattern or {}, r, layers)
    alphas = per_layer("alpha_pattern", alpha_pattern or {}, lora_alpha, layers)
    replacements: dict[nn.Module, FusedLoRALinear] = {}
    changes: list[tuple[float, float]] = []
    for path in layers:
        linear = modules[path]
        if linear not in replacements:
            replacements[linear] = FusedLoRALinear.from_linear(
                linear,
                ranks[path],
                alphas[path],
                lora_dropout=lora_dropout,
                use_rslora=use_rslora,
                adapter_dtype=adapter_dtype,
                init_lora_weights=init_lora_weights,
                use_dora=use_dora,
                backend=backend,
                quantize=quantize,
            )
            layer, start = replacements[linear], None
            if layer.lora_A_init is not None and layer.lora_B_init is not None:
                start = layer._product(layer.lora_A_init, layer.lora_B_init)
            changes += change(linear, layer.weight, start)
    model.requires_grad_(False)
    for path in layers:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, replacements[modules[path]])
    found = tuple(sharing.find_groups(model, (FusedLoRALinear,))) if groups else ()
    for paths in found:
        group = sharing.SharedInput([model.get_submodule(path) for path in paths], _arguments)
        for member in group.members:
            member.__dict__["shared_input"] = group
    return InjectReport(
        layers=tuple(layers),
        skipped=skipped,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=_count(model),
        adapted=sum(layer.weight.numel() for layer in replacements.values()),
        groups=found,
        quantization_error=relative(changes) if changes else None,
    )


def _arguments(layer: FusedLoRALinear, x: Tensor) -> Arguments | None:
    """What the layer passes to `lora_linear` for any x; None if it does something else."""
    return None if layer.merged or layer.disabled or layer.use_dora else layer._arguments()


@torch.no_grad()
def change(
    linear: nn.Module, weight: Tensor | QuantizedWeight, start: Tensor | None = None
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


def relative(changes: list[tuple[float, float]]) -> float:
    """The norm of all changes over that of all weights."""
    changed, size = (math.hypot(*norms) for norms in zip(*changes, strict=True))
    return changed / size if size else 0.0


def why_skipped(
    modules: Mapping[str, nn.Module],
    matched: Collection[str],
    layers: Collection[str],
    target_modules: str | Collection[str],
) -> dict[str, str]:
    """Why what was matched but ``layers`` gets no adapter, and which names match nothing."""
    skipped = {
        path: f"is a {type(modules[path]).__name__}, not an nn.Linear"
        for path in matched
        if path not in layers
    }
    if not isinstance(target_modules, str):
        for name in target_modules:
            if not any(path == name or path.endswith("." + name) for path in modules):
                skipped[name] = "matches no module"
    return skipped


def has_peft_layers(model: nn.Module) -> bool:
    """Whether PEFT has put adapters in."""
    return any(type(module).__module__.startswith("peft.tuners") for module in model.modules())


def is_linear(module: nn.Module) -> bool:
    """Whether `inject` can replace it: an `nn.Linear`, or a quantised one of others."""
    return type(module) is nn.Linear or foreign.is_quantized(module)


def _count(model: nn.Module) -> int:
    """All parameters; of a quantised weight those that it stands for, not its codes and scales."""
    quantized = [m for m in model.modules() if isinstance(m, QuantizedWeight)]
    parts = {p for weight in quantized for p in weight.parameters()}
    plain = sum(p.numel() for p in model.parameters() if p not in parts)
    return plain + sum(weight.numel() for weight in quantized)


Number = TypeVar("Number", int, float)


def per_layer(
    name: str, pattern: Mapping[str, Number], default: Number, paths: list[str]
) -> dict[str, Number]:
    """The number for each path, by PEFT's rule for rank_pattern and alpha_pattern."""
    values = dict.fromkeys(paths, default)
    for key, value in reversed(list(pattern.items())):  # the first match counts, so it comes last
        for path in match_paths(name, rf"(.*\.)?({key})", paths):
            values[path] = value
    return values


def match_modules(
    model: nn.Module,
    target_modules: str | Collection[str],
    exclude_modules: str | Collection[str] | None,
) -> list[str]:
    """The paths of the modules that PEFT's rules match, of any type; see `inject`."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if target_modules == "all-linear":
        matched = _without_output_head(model, modules)
    else:
        matched = match_paths("target_modules", target_modules, list(modules))
    if exclude_modules is None:
        return matched
    excluded = set(match_paths("exclude_modules", exclude_modules, matched))
    return [path for path in matched if path not in excluded]


# Of torch.compile, checkpoint_wrapper and FSDP1: parts of a path that the model itself has not.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def own_path(path: str) -> str:
    """A module's path, or that of what is in it, in the model without wrappers."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def match_paths(name: str, patterns: object, paths: list[str]) -> list[str]:
    """The paths that PEFT would match: a regular expression in full, or a list of suffixes."""
    if isinstance(patterns, str):
        try:
            pattern = re.compile(patterns)
        except re.error as error:
            raise ValueError(f"{name}: {patterns!r} is no regular expression: {error}") from None
        return [p for p in paths if pattern.fullmatch(own_path(p)) or pattern.fullmatch(p)]
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(
        isinstance(suffix, str) for suffix in patterns
    ):
        raise TypeError(f"{name}: got {patterns!r}, wanted a string or a list of strings")
    ends = tuple("." + suffix for suffix in patterns if suffix)
    return [p for p in paths if any(f".{path}".endswith(ends) for path in (own_path(p), p))]


def _without_output_head(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Every linear layer but the one that transformers calls the output embeddings."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    linear = (path for path, m in modules.items() if m is not head)
    return [p for p in linear if is_linear(modules[p]) or type(modules[p]) is FusedMultiLoRALinear]
