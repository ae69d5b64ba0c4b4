"""`FusedLoRAExperts`: a frozen mixture of experts of transformers', with adapters.

PEFT's ``target_parameters``: one adapter for each projection of all experts together, A [E r, in]
with the experts one after the other and B [out, r E] with the ranks one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .calls import Backend
from .codes import Format
from .expert_modules import (
    as_stack,
    explain_experts_module,
    in_codes,
    in_order,
    misfit,
    obstacle,
    parameter_for,
    plain_weight,
    projections,
    routed,
    run_experts,
    weight_of,
)
from .expert_stack import ExpertAdapter
from .explanation import Explanation
from .initial import adapter_dtype_over, initial_values, scaling_of
from .quantize import Quantizer, check_format
from .quantized_weight import QuantizedWeight
from .sharded import is_sharded
from .switch import Switchable


def nested(experts: nn.Module, adapted: Collection[str]) -> dict[str, str]:
    """By projection, where in PEFT's wrappers of the module its adapter is.

    It wraps the module once for each, in the order of the parameters: the first one is innermost.
    """
    names = [name for name in in_order(experts) if name in adapted]
    return {name: ".base_layer" * i for i, name in enumerate(reversed(names))}


class ExpertsAdapter(nn.Module):
    """The adapter of one projection of E experts.

    Attributes:
        lora_A [E * r, in], lora_B [out, r * E]: trainable parameters, in PEFT's layout.
        r, lora_alpha, use_rslora, scaling, merged: as of `FusedLoRALinear`; r is of one expert.
    """

    lora_dropout = 0.0
    use_dora = False
    lora_magnitude_vector = lora_A_init = lora_B_init = None

    def __init__(
        self,
        weight: Tensor,  # [E, out, in]
        r: int,
        lora_alpha: float,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
        init_lora_weights: bool,
    ) -> None:
        super().__init__()
        self.num_experts, self.out_features, self.in_features = weight.shape
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.merged = False
        self.scaling = scaling_of(lora_alpha, r, use_rslora)
        ranks = r * self.num_experts
        found = initial_values(init_lora_weights, weight[0], ranks, self.scaling)
        dtype = adapter_dtype or adapter_dtype_over(weight.dtype)
        self.lora_A = nn.Parameter(found.lora_A.to(weight.device, dtype))
        self.lora_B = nn.Parameter(found.lora_B.to(weight.device, dtype))

    def of_experts(self) -> ExpertAdapter:
        """A [E, r, in] and B [E, out, r], views."""
        return ExpertAdapter.of(self.lora_A, self.lora_B, self.num_experts, self.scaling)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.merged:  # else loading it would add the adapter a second time
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_experts}, in_features={self.in_features}, "
            f"out_features={self.out_features}, r={self.r}, lora_alpha={self.lora_alpha}"
        )


class FusedLoRAExperts(Switchable):
    """In place of a module of experts: what that computes, with adapters.

    Attributes:
        base_layer: that module, frozen, which `merge_and_unload` puts back. With ``quantize`` one
            like it, whose weights are each a `QuantizedWeight` [E, out, in].
        adapters: `ExpertsAdapter` by projection ("gate_up_proj", "down_proj", ...).
        merged: whether the adapters are in the weights. disabled, backend: as of `FusedLoRALinear`.
    """

    def __init__(
        self,
        experts: nn.Module,
        ranks: Mapping[str, int],
        alphas: Mapping[str, float],
        *,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        init_lora_weights: bool = True,
        backend: Backend = "auto",
        quantize: Format | Quantizer | None = None,
    ) -> None:
        """``ranks`` and ``alphas`` are of the projections that get an adapter.

        ``quantize``: as for `FusedLoRALinear.from_linear`, but of all projections, with an adapter
        or without; ``experts`` keeps its weights, for who still has it.

        Raises ValueError if ``experts`` is no such module or has hooks, or if a name is none of its
        projections; TypeError or ValueError if a number is out of range, or of what cannot be
        quantised. It is unchanged then.
        """
        super().__init__()
        why = obstacle(experts)
        if why is not None:
            raise ValueError(f"experts: {why}")
        checks.check_unhooked("experts", experts)
        known = projections(experts)
        if not ranks or ranks.keys() != alphas.keys() or not ranks.keys() <= {*known}:
            got = f"ranks of {sorted(ranks)} and alphas of {sorted(alphas)}"
            raise ValueError(f"ranks, alphas: got {got}, wanted both of some of {', '.join(known)}")
        for name in ranks:
            checks.check_rank(ranks[name])
            checks.check_number("lora_alpha", alphas[name])
        checks.check_flag("use_rslora", use_rslora)
        checks.check_flag("init_lora_weights", init_lora_weights)
        checks.check_backend(backend)
        if adapter_dtype is not None:
            checks.check_dtype("adapter_dtype", adapter_dtype)
        if quantize is not None:
            check_format(quantize)
        self.adapters = nn.ModuleDict()
        self.backend: Backend = backend
        self.merged = False
        # In a dict, so that they are no submodules: what a merged layer goes back to.
        self._before_merge: dict[str, QuantizedWeight] = {}
        for name in known:
            if name in ranks:
                numbers = (ranks[name], alphas[name], use_rslora)
                self.adapters[name] = ExpertsAdapter(
                    plain_weight(experts, name), *numbers, adapter_dtype, init_lora_weights
                )
        base = experts if quantize is None else in_codes(experts, quantize)
        self.base_layer = base.requires_grad_(False)
        self.train(experts.training)

    def _in_codes(self) -> bool:
        of_base = (getattr(self.base_layer, name) for name in in_order(self.base_layer))
        return any(isinstance(weight, QuantizedWeight) for weight in of_base)

    def _runs_base(self) -> bool:
        """Whether the module of experts computes by itself, which it cannot in codes."""
        return self.merged or (self.disabled > 0 and not self._in_codes())

    def _by_projection(self) -> dict[str, ExpertAdapter]:
        if self.disabled:
            return {}
        return {name: each.of_experts() for name, each in self.adapters.items()}  # type: ignore

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [T, hidden], top_k_index and top_k_weights [T, k] -> y [T, hidden].

        Raises RuntimeError if it is merged and in training mode; TypeError or ValueError if the
        arguments are not these.
        """
        if self.merged and self.training:
            raise RuntimeError(
                "FusedLoRAExperts is merged and in training mode: call unmerge() to train the "
                "adapter, or eval() to run the merged weights"
            )
        if self._runs_base():
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        return self._adapted(x, routed(*args, **kwargs))

    def _adapted(self, x: Tensor, choice: tuple[Any, Any] | None) -> Tensor:
        if choice is None:
            raise TypeError("forward: got other arguments than x, top_k_index and top_k_weights")
        self._check(x, choice)
        return run_experts(self.base_layer, x, *choice, self._by_projection(), self.backend)

    def _check(self, x: Tensor, choice: tuple[Any, Any]) -> None:
        if checks.is_hooked(self.base_layer):
            raise RuntimeError("FusedLoRAExperts: base_layer has hooks, which nothing would run")
        why = misfit(self.base_layer, x, *choice)
        if why is not None:
            raise ValueError(f"forward: {why}")

    def explain(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Explanation:
        """Which backend `forward` takes, and why; raises what that does, and computes nothing."""
        if self._runs_base():
            why = f"taken: the adapters are {'merged' if self.merged else 'disabled'}"
            return Explanation("torch", "experts", "experts", {"experts": why})
        self._check(x, (top_k_index, top_k_weights))
        adapters = self._by_projection()
        found = explain_experts_module(self.base_layer, x, top_k_index, adapters, self.backend)
        if self.disabled:
            found = found.with_reasons({"adapters": "left out: they are disabled"})
        return found

    @torch.no_grad()
    def _changed(self, name: str, sign: float) -> nn.Parameter:
        """A projection's weights plus or minus scaling * B A, expert by expert, in fp32.

        Of one without an adapter the values of its codes.
        """
        weight = weight_of(self.base_layer, name)
        new = parameter_for(self.base_layer, weight)
        adapter = self._by_projection().get(name)
        for e, out in enumerate(as_stack(self.base_layer, new)):
            if isinstance(weight, QuantizedWeight):
                (W,) = weight.dequantize(torch.float32, slice(e, e + 1))
            else:
                W = weight[e]
            if adapter is not None:
                A, B, scaling = adapter
                dtype = torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)
                W = W.to(dtype) + sign * scaling * (B[e].to(dtype) @ A[e].to(dtype))
            out.copy_(W)
            if not torch.isfinite(out).all():
                raise ValueError(f"{name}: W + scaling * B A has values that are not finite")
        return nn.Parameter(new, requires_grad=False)

    def _put(self, sign: float) -> None:
        if any(map(is_sharded, self.parameters())):
            raise RuntimeError("FusedLoRAExperts is spread over processes: merge where it is whole")
        # All of a module in codes: with a part of them transformers could not compute it.
        names = in_order(self.base_layer) if self._in_codes() else list(self.adapters)
        for name in names:
            if name not in (*self.base_layer._parameters, *self.base_layer._modules):
                raise RuntimeError(
                    f"{name}: is computed by a parametrization, and what is put into it would be "
                    "lost; call torch.nn.utils.parametrize.remove_parametrizations first"
                )
        new = {name: self._changed(name, sign) for name in names}
        self._set(new, merged=sign > 0)

    def _set(self, weights: Mapping[str, nn.Parameter | QuantizedWeight], *, merged: bool) -> None:
        before = {name: getattr(self.base_layer, name) for name in weights}
        self._before_merge = {n: w for n, w in before.items() if isinstance(w, QuantizedWeight)}
        for name, weight in weights.items():
            if isinstance(weight, QuantizedWeight):  # a parameter's name is not given to a module
                delattr(self.base_layer, name)
            setattr(self.base_layer, name, weight)
        self.merged = merged
        for adapter in self.adapters.values():
            adapter.merged = merged  # type: ignore[assignment]

    def merge(self) -> None:
        """Puts the adapters into new weights; they stay. Nothing happens if merged.

        Weights in codes become plain ones in their dtype, also those without an adapter.

        Raises ValueError, and merges nothing, if a result is not finite in the weights' dtype;
        RuntimeError if it is disabled, or spread over processes.
        """
        if self.disabled:
            raise RuntimeError("FusedLoRAExperts is disabled: merge outside of disable_adapter")
        if not self.merged:
            self._put(1.0)

    def unmerge(self) -> None:
        """Takes the adapters out again; exact up to rounding in the weights' dtype.

        Weights that were in codes are again the ones that they were, bit for bit.
        """
        if self._before_merge:
            now = {name: getattr(self.base_layer, name) for name in self._before_merge}
            codes = {
                name: weight.to(now[name].device, now[name].dtype)
                for name, weight in self._before_merge.items()
            }
            self._set(codes, merged=False)
        elif self.merged:
            self._put(-1.0)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.merged:  # then nothing of it is loaded, the weights neither
            args[4].append(f"{prefix} is merged: call unmerge() before loading")
            for key in [key for key in state_dict if key.startswith(prefix)]:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def weights(self) -> dict[str, nn.Parameter | QuantizedWeight]:
        """Those that have an adapter."""
        return {name: getattr(self.base_layer, name) for name in self.adapters}

    def unmerging(self) -> Callable[[], None]:
        """What undoes a merge that is still to come, without a rounding, if it has come."""
        before = {name: getattr(self.base_layer, name) for name in in_order(self.base_layer)}

        def undo() -> None:
            if self.merged:
                self._set(before, merged=False)

        return undo

    def plain(self) -> nn.Module:
        """The module of experts, of a merged layer with the merged weights."""
        return self.base_layer
