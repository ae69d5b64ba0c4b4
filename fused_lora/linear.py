"""`FusedLoRALinear`: `nn.Linear` with a frozen weight and a LoRA adapter, in one fused pass."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .dispatch import Backend
from .functional import lora_linear

if TYPE_CHECKING:
    from .sharing import SharedInput


class FusedLoRALinear(nn.Module):
    """y = x W0^T + bias + scaling * (D o x) A^T B^T with W0 and bias frozen, A and B trainable.

    Args:
        in_features, out_features: K and N.
        r: rank of the adapter, at least 1.
        lora_alpha: numerator of ``scaling``.
        lora_dropout: dropout probability in [0, 1) on the adapter's input, in training only.
        bias: whether the base layer has a bias (frozen).
        use_rslora: ``scaling`` is lora_alpha / sqrt(r) instead of lora_alpha / r
            (https://arxiv.org/abs/2312.03732).
        device, dtype: of ``weight`` and ``bias``.
        adapter_dtype: of ``lora_A`` and ``lora_B``. None follows PEFT: float32 over a bf16 or fp16
            base, the base's own dtype otherwise.
        backend: "auto", "triton" or "torch", as for `lora_linear`.

    Attributes:
        weight [N, K], bias [N] or None: frozen parameters, named as in `nn.Linear`.
        lora_A [r, K], lora_B [N, r]: trainable parameters.
        scaling: float. merged: whether the adapter is added into ``weight``.

    The state dict has `nn.Linear`'s keys plus ``lora_A`` and ``lora_B``; a plain `nn.Linear`'s
    loads and leaves the adapter as it is. That of a merged layer is a plain `nn.Linear`'s.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    shared_input: SharedInput | None = None  # set by `inject`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        *,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> None:
        checks.check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._adopt(base, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, backend)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> FusedLoRALinear:
        """A layer over ``linear``'s own weight and bias: the storage is shared, not copied.

        The parameters are new objects, so that ``linear``'s ``requires_grad`` stays as it is.
        Raises TypeError unless ``linear`` is exactly an `nn.Linear`: a subclass (quantised, say)
        may compute something else.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"linear: got {type(linear).__name__}, wanted torch.nn.Linear")
        layer = cls.__new__(cls)
        layer._adopt(linear, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, backend)
        return layer.train(linear.training)

    def _adopt(
        self,
        base: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
        backend: Backend,
    ) -> None:
        super().__init__()
        checks.check_rank(r)
        checks.check_number("lora_alpha", lora_alpha)
        checks.check_dropout("lora_dropout", lora_dropout)
        checks.check_backend(backend)
        checks.check_dtype("the base weight's dtype", base.weight.dtype)
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(base.weight.dtype, torch.float32)
        checks.check_dtype("adapter_dtype", adapter_dtype)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = float(lora_dropout)
        self.use_rslora = use_rslora
        self.scaling = self.scaling_of(lora_alpha, r, use_rslora)
        self.backend: Backend = backend
        self.merged = False
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        if base.bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(base.bias.detach(), requires_grad=False)
        factory: dict[str, Any] = {"device": base.weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.Parameter(torch.empty((r, self.in_features), **factory))
        self.lora_B = nn.Parameter(torch.empty((self.out_features, r), **factory))
        self.reset_lora_parameters()

    @staticmethod
    def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
        """What B A x is multiplied by: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
        return lora_alpha / (math.sqrt(r) if use_rslora else r)

    def reset_lora_parameters(self) -> None:
        """Kaiming-uniform A (a = sqrt(5), as `nn.Linear` and PEFT) and zero B: y starts at W0 x."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features].

        Raises RuntimeError if the layer is merged and in training mode, where the adapter could
        not learn; and what `lora_linear` raises.
        """
        if self.merged:
            if self.training:
                raise RuntimeError(
                    "FusedLoRALinear is merged and in training mode: call unmerge() to train the "
                    "adapter, or eval() to run the merged weight"
                )
            return F.linear(x, self.weight, self.bias)
        if self.shared_input is not None and not torch.compiler.is_compiling():
            shared = self.shared_input.output(self, x)
            if shared is not None:
                return shared
        return lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            bias=self.bias,
            dropout_p=self.lora_dropout if self.training else 0.0,
            backend=self.backend,
        )

    @torch.no_grad()
    def _delta_weight(self) -> Tensor:
        """scaling * B A [N, K], in fp32 or better."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        return self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    @torch.no_grad()
    def _add_to_weight(self, delta: Tensor) -> None:
        if "weight" not in self._parameters:
            raise RuntimeError(
                "weight: is computed by a parametrization, and what is added to it would be lost; "
                "call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        merged = (self.weight.to(delta.dtype) + delta).to(self.weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError("lora_A, lora_B: W0 + scaling * B A has values that are not finite")
        if type(self.weight) is nn.Parameter:
            # Not in place: the storage may be another layer's too (from_linear, tying).
            self.weight.data = merged
        else:  # a DTensor's storage is its own, and its .data is not what FSDP gathers
            self.weight.copy_(merged)

    def merge(self) -> None:
        """Adds scaling * B A into ``weight``; the adapter stays. Nothing happens if merged.

        ``weight`` gets new storage: layers that shared the old one are not changed. Raises
        ValueError, and merges nothing, if the sum is not finite in the weight's dtype.
        """
        if not self.merged:
            self._add_to_weight(self._delta_weight())
            self.merged = True

    def unmerge(self) -> None:
        """Subtracts the adapter again; exact up to rounding in the weight's dtype, as in PEFT."""
        if self.merged:
            self._add_to_weight(-self._delta_weight())
            self.merged = False

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # else loading it would add the adapter a second time
            del destination[prefix + "lora_A"], destination[prefix + "lora_B"]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.merged:
            error_msgs.append(f"{prefix or 'the layer '}is merged: call unmerge() before loading")
            return
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        adapter = {prefix + "lora_A", prefix + "lora_B"}
        if adapter <= set(missing):  # a plain nn.Linear's: the adapter stays as it is
            missing = [key for key in missing if key not in adapter]
        missing_keys.extend(missing)

    def extra_repr(self) -> str:
        parts = [
            f"in_features={self.in_features}, out_features={self.out_features}",
            f"bias={self.bias is not None}, r={self.r}, lora_alpha={self.lora_alpha}",
        ]
        if self.lora_dropout:
            parts.append(f"lora_dropout={self.lora_dropout}")
        if self.use_rslora:
            parts.append("use_rslora=True")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        if self.merged:
            parts.append("merged=True")
        return ", ".join(parts)
