"""`FusedLoRALinear`: `nn.Linear` with a frozen weight and a LoRA adapter, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import checks
from .arguments import Arguments
from .calls import Backend
from .codes import Format
from .dora import over_norm
from .explanation import Explanation
from .frozen import FrozenLinear, check_linear, read_base
from .functional import call_layer, dora_linear, explain
from .initial import adapter_dtype_over, check_init, initial_values, scaling_of
from .lookup import parameters
from .quantize import Quantizer, quantize_like
from .quantized_weight import QuantizedWeight, Weight
from .sharded import fill, is_sharded
from .torch_backend import weight_norm

_ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector", "lora_A_init", "lora_B_init")

if TYPE_CHECKING:
    from .sharing import Place


class FusedLoRALinear(FrozenLinear):
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
        init_lora_weights: True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_<N>" or
            "olora", as in PEFT and with its numbers from the same seed (see `fused_lora.initial`);
            and "loftq", where `from_linear` quantises the weight.
        use_dora: y = m / ||W0 + scaling * B A|| o (x W0^T + scaling * x A^T B^T) + bias instead
            (https://arxiv.org/abs/2402.09353), see `dora_linear`. With lora_dropout, training costs
            a second product with W0, as in PEFT.
        backend: "auto", "triton" or "torch", as for `lora_linear`.

    Raises TypeError or ValueError where an argument is of the wrong type or out of range.

    Attributes:
        weight [N, K], bias [N] or None: see `FrozenLinear`.
        lora_A [r, K], lora_B [N, r]: trainable parameters, and with use_dora
            lora_magnitude_vector m [N] (None without), which starts as the norm itself.
        scaling: float. merged: whether the adapter is added into ``weight``.
        lora_A_init, lora_B_init: buffers, None but after "pissa", "olora" and "loftq". There
            ``weight`` is the residual W0 - scaling * B_init A_init in storage of its own, and these
            two are what brings W0 back; if it is quantised, but for the error of its codes.

    The state dict has `nn.Linear`'s keys plus those of the adapter and of the buffers that are not
    None; a plain `nn.Linear`'s loads and leaves the adapter as it is, except into a layer
    whose weight is a residual. That of a merged layer is a plain `nn.Linear`'s.
    """

    lora_magnitude_vector: nn.Parameter | None
    lora_A_init: Tensor | None
    lora_B_init: Tensor | None
    merged_scale: Tensor | None
    shared_input: Place | None = None  # set by `inject`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        backend: Backend = "auto",
    ) -> None:
        check_linear(in_features, out_features, bias, dtype)
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._adopt(
            base.weight,
            base.bias,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            adapter_dtype,
            init_lora_weights,
            use_dora,
            backend,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear | QuantizedWeight,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        backend: Backend = "auto",
        quantize: Format | Quantizer | None = None,
    ) -> FusedLoRALinear:
        """A layer over ``linear``'s own weight and bias: the storage is shared, not copied.

        The parameters are new objects, so that ``linear``'s ``requires_grad`` stays as it is. The
        initialisations that change the base weight ("pissa", "olora", "loftq") give the layer a new
        one and never write into ``linear``'s.

        Args:
            linear: an `nn.Linear`; bitsandbytes' Linear4bit or Linear8bitLt; an `nn.Linear` that
                torchao made int8 or float8; or a `QuantizedWeight`, which makes a layer with no
                bias. A weight in codes is read as it is. x is not quantised, whatever the layer's
                own library does with it.
            quantize: "nf4", "fp4", "mxfp4", "int8" or "fp8", or a function such as `quantize_nf4`
                with options of its own: the layer gets ``linear``'s weight in codes.
                "pissa" and "olora" start from the weight itself, and put the rest of it into codes;
                over a weight that is in codes already, from what these stand for.

        Raises TypeError for any other layer: a subclass may compute something else. ValueError for
        one that its library has not quantised yet, if ``quantize`` is asked of one that is, and for
        "loftq" without it.
        """
        weight, bias = read_base(linear, quantize)
        layer = cls.__new__(cls)
        layer._adopt(
            weight,
            bias,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            adapter_dtype,
            init_lora_weights,
            use_dora,
            backend,
            original=linear.weight if quantize and isinstance(linear, nn.Linear) else None,
        )
        return layer.train(linear.training)

    def _adopt(
        self,
        weight: Weight,
        bias: Tensor | None,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
        init_lora_weights: bool | str,
        use_dora: bool,
        backend: Backend,
        original: Tensor | None = None,  # what a quantised weight was made of just now
    ) -> None:
        checks.check_rank(r)
        checks.check_number("lora_alpha", lora_alpha)
        checks.check_flag("use_rslora", use_rslora)
        checks.check_flag("use_dora", use_dora)
        self._adopt_base(weight, bias, lora_dropout, backend)
        if adapter_dtype is None:
            adapter_dtype = adapter_dtype_over(weight.dtype)
        checks.check_dtype("adapter_dtype", adapter_dtype)
        self.scaling = scaling_of(lora_alpha, r, use_rslora)
        sizes = (self.out_features, self.in_features)
        check_init(init_lora_weights, r, self.scaling, *sizes)
        if isinstance(init_lora_weights, str) and init_lora_weights.startswith("loftq"):
            _check_loftq(weight, original)
        self.r = r
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.init_lora_weights = init_lora_weights
        self.merged = False
        # In a tuple, so that it is no submodule: what a merged layer goes back to.
        self._before_merge: tuple[QuantizedWeight, ...] = ()
        factory: dict[str, Any] = {"device": weight.device, "dtype": adapter_dtype}
        self.lora_A = nn.Parameter(torch.empty((r, self.in_features), **factory))
        self.lora_B = nn.Parameter(torch.empty((self.out_features, r), **factory))
        self.use_dora = use_dora
        self.lora_magnitude_vector = (
            nn.Parameter(torch.empty(self.out_features, **factory)) if use_dora else None
        )
        self.register_buffer("merged_scale", None, persistent=False)  # DoRA's m / norm, if merged
        self.register_buffer("lora_A_init", None)
        self.register_buffer("lora_B_init", None)
        self._start(original)

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Starts the adapter afresh, as ``init_lora_weights`` says.

        A ``weight`` that is a residual is made W0 again first, exact up to rounding in its dtype or
        the error of its codes. On the meta device nothing happens. Raises RuntimeError if merged,
        or if the weight is no parameter of its own (a DTensor, parametrised) and the start
        depends on its values ("pissa", "olora", use_dora).
        """
        if self.merged:
            raise RuntimeError("FusedLoRALinear is merged: call unmerge() before the reset")
        original = None
        if self.lora_A_init is not None and self.lora_B_init is not None:
            self._check_whole()
            product = self._product(self.lora_A_init, self.lora_B_init)
            if isinstance(self.weight, QuantizedWeight):
                original = self.weight.dequantize(product.dtype) + product
                self.weight = quantize_like(self.weight, original)
            else:
                self._set_weight(self.weight.to(product.dtype) + product)
            self.lora_A_init = self.lora_B_init = None
        self._start(original)

    def _check_whole(self) -> None:
        if type(self.weight) not in (nn.Parameter, QuantizedWeight):
            raise RuntimeError(
                "weight: is sharded or computed by a parametrization, and the start depends on all "
                f"of it; wanted an nn.Parameter, got a {type(self.weight).__name__}"
            )

    @torch.no_grad()
    def _start(self, original: Tensor | None) -> None:
        """``original``: of which a quantised weight has the codes, where it is known."""
        if self.weight.device.type == "meta":
            return
        if self.use_dora:
            self._check_whole()
        start = initial_values(self.init_lora_weights, self.weight, self.r, self.scaling, original)
        fill(self.lora_A, start.lora_A)
        fill(self.lora_B, start.lora_B)
        if start.weight is not None:
            if isinstance(start.weight, QuantizedWeight):
                self.weight = start.weight
            else:
                self._set_parameter(start.weight)
            self.lora_A_init, self.lora_B_init = self.lora_A.clone(), self.lora_B.clone()
        if self.lora_magnitude_vector is not None:
            # PEFT's is rounded to the base's dtype; this one starts at W0 x in any.
            self.lora_magnitude_vector.copy_(self._norm())

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
            return self._base(x)
        if self.disabled:
            return self._base(x)
        call = self.arguments()
        if self.use_dora:  # not the magnitude, which nn.Module takes 0.4 us to find
            assert self.lora_magnitude_vector is not None
            adapter = (call.lora_A, call.lora_B, self.lora_magnitude_vector)
            return dora_linear(x, call.weight, *adapter, **call.options())
        if self.shared_input is not None:
            group = self.shared_input.group
            shared = group.output(self, x, call) if group.pays(x, call, self.backend) else None
            if shared is not None:
                return shared
        return call_layer(x, call)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy belongs to a copy of its group."""
        super().__setstate__(state)
        if self.shared_input is not None:
            self.shared_input.take(self)

    def arguments(self) -> Arguments:
        """What `forward` passes to `lora_linear`, in the layer's present mode."""
        weight, lora_A, lora_B, bias = parameters(self, "weight", "lora_A", "lora_B", "bias")
        dropout_p = self.lora_dropout if self.training else 0.0
        return Arguments(weight, lora_A, lora_B, self.scaling, bias, dropout_p, self.backend)

    def passed_on(self, x: Tensor) -> Arguments | None:
        """What `forward` passes to `lora_linear` for any x; None if it does something else."""
        return None if self.merged or self.disabled or self.use_dora else self.arguments()

    def explain(self, x: Tensor) -> Explanation:
        """Which backend and strategy `forward` takes for x, and why; computes nothing.

        `fused_lora.explain` with the layer's own tensors; raises what that does.
        """
        if self.merged or self.disabled:
            why = "merged into the weight" if self.merged else "disabled"
            return self._explain_base(f"the adapter is {why}")
        call, magnitude = self.arguments(), self.lora_magnitude_vector
        adapter = (call.lora_A, call.lora_B)
        found = explain(x, call.weight, *adapter, magnitude=magnitude, **call.options())
        if self.shared_input is not None:
            found = found.with_reasons(self.shared_input.group.explain(x, call, self.backend))
        return found

    @torch.no_grad()
    def _product(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """scaling * B A [N, K], in fp32 or better, and no worse than W0."""
        dtype = torch.promote_types(lora_A.dtype, self.weight.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        return self.scaling * (lora_B.to(dtype) @ lora_A.to(dtype))

    def _plain(self) -> nn.Parameter:
        assert not isinstance(self.weight, QuantizedWeight)
        return self.weight

    def _norm(self) -> Tensor:
        return weight_norm(self.weight, self.lora_A, self.lora_B, self.scaling)

    @torch.no_grad()
    def _set_weight(self, value: Tensor) -> None:
        if "weight" not in self._parameters:
            raise RuntimeError(
                "weight: is computed by a parametrization, and what is put into it would be lost; "
                "call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        weight = value.to(self.weight.dtype)
        if not torch.isfinite(weight).all():
            raise ValueError("lora_A, lora_B: W0 + scaling * B A has values that are not finite")
        if type(self.weight) is nn.Parameter:
            self._set_parameter(weight)
        else:  # a DTensor's storage is its own, and its .data is not what FSDP gathers
            self._plain().copy_(weight)

    def _set_parameter(self, value: Tensor) -> None:
        """A new one: the storage may be another layer's too (from_linear), and so may the old one
        itself (tied weights, which then are no longer)."""
        gathered = not (is_sharded(self.weight) or is_sharded(self.lora_A))
        if gathered and getattr(self, "_is_fsdp_managed_module", False):
            raise RuntimeError(
                "weight: is gathered by FSDP2, which keeps nothing that is put into it; call "
                "reshard() of what fully_shard returned before"
            )
        self.weight = nn.Parameter(value, requires_grad=self._plain().requires_grad)

    def _merge_quantized(self, weight: QuantizedWeight, requantize: bool) -> float:
        merged = weight.dequantize(torch.float32) + self._product(self.lora_A, self.lora_B)
        if self.lora_magnitude_vector is not None:
            merged *= over_norm(self.lora_magnitude_vector, self._norm())[:, None]
        values = merged.to(weight.dtype)
        if not torch.isfinite(values).all():
            raise ValueError("lora_A, lora_B: W0 + scaling * B A has values that are not finite")
        new: nn.Parameter | QuantizedWeight = nn.Parameter(values, requires_grad=False)
        error = 0.0
        if requantize:
            new = quantize_like(weight, values)
            error = ((new.dequantize(merged.dtype) - merged).norm() / merged.norm()).item()
        self._before_merge, self.weight, self.merged = (weight,), new, True
        return error

    @torch.no_grad()
    def merge(self, *, requantize: bool = False) -> float:
        """Puts the adapter into ``weight``; the adapter stays. Nothing happens if merged.

        ``weight`` is a new parameter: layers that shared the old one, or its storage, are not
        changed. Raises RuntimeError if FSDP2 has gathered it, and ValueError, and merges nothing,
        if the result is not finite in the weight's dtype or has DoRA rows of magnitude 0, which
        could not be brought back (of a quantised weight they are).

        A quantised weight becomes a plain parameter in its dtype, or with ``requantize`` a
        quantised one again. Returns the error that this makes, ||Q(W) - W|| / ||W|| over the merged
        W, and 0 where nothing is requantised. Raises ValueError if there is nothing to requantise.
        """
        if self.merged:
            return 0.0
        if self.disabled:
            raise RuntimeError("FusedLoRALinear is disabled: merge outside of disable_adapter")
        if requantize and not isinstance(self.weight, QuantizedWeight):
            raise ValueError("requantize: the layer's weight is not quantised")
        if isinstance(self.weight, QuantizedWeight):
            return self._merge_quantized(self.weight, requantize)
        product = self._product(self.lora_A, self.lora_B)
        value, scale = self.weight.to(product.dtype) + product, None
        if self.lora_magnitude_vector is not None:
            scale = over_norm(self.lora_magnitude_vector, self._norm()).to(product.dtype)
            if not scale.all():
                raise ValueError("lora_magnitude_vector: has zeros, which merging cannot undo")
            value *= scale[:, None]
        self._set_weight(value)
        self.merged, self.merged_scale = True, scale
        return 0.0

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the adapter out again; exact up to rounding in the weight's dtype, as in PEFT.

        A weight that was quantised is again the one that it was, bit for bit.
        """
        if not self.merged:
            return
        if self._before_merge:
            codes = self._before_merge[0].to(self.weight.device, self.weight.dtype)
            del self.weight  # a parameter's name is not given to a module
            self.weight = codes
            self._before_merge, self.merged = (), False
            return
        product = self._product(self.lora_A, self.lora_B)
        value = self._plain().to(product.dtype)
        if self.merged_scale is not None:
            value = value / self.merged_scale[:, None]
        self._set_weight(value - product)
        self.merged, self.merged_scale = False, None

    def unmerging(self) -> Callable[[], None]:
        """What undoes a merge that is still to come, without a rounding, if it has come."""
        weight = self.weight

        def undo() -> None:
            if isinstance(weight, QuantizedWeight):
                self.unmerge()
            elif self.merged:
                self.weight, self.merged, self.merged_scale = weight, False, None

        return undo

    def plain(self) -> nn.Linear:
        """An `nn.Linear` of the merged layer's weight and bias."""
        assert isinstance(self.weight, nn.Parameter)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.weight
        linear.register_parameter("bias", self.bias)
        return linear

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:  # else loading it would add the adapter a second time
            for name in _ADAPTER:
                destination.pop(prefix + name, None)

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
        holds = {name for name in (*_ADAPTER, "weight") if prefix + name in state_dict}
        if prefix + "weight.codes" in state_dict:
            holds.add("weight")
        new_init = "lora_A_init" in holds and self.lora_A_init is None
        if new_init:
            self.lora_A_init = torch.empty_like(self.lora_A)
            self.lora_B_init = torch.empty_like(self.lora_B)
        elif "lora_A_init" not in holds and "weight" in holds and self.lora_A_init is not None:
            if "lora_A" not in holds:  # the adapter would add W0's principal part a second time
                error_msgs.append(
                    f"{prefix}weight is a residual that goes with the adapter "
                    f"(init_lora_weights={self.init_lora_weights!r}): load nn.Linear's before"
                )
                return
            self.lora_A_init = self.lora_B_init = None
        missing: list[str] = []
        failed: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, failed
        )
        if failed and new_init:  # of which nothing may have been loaded
            self.lora_A_init = self.lora_B_init = None
        error_msgs.extend(failed)
        if not holds & set(_ADAPTER):  # a plain nn.Linear's: the adapter stays as it is
            missing = [key for key in missing if key.removeprefix(prefix) not in _ADAPTER]
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
        if self.use_dora:
            parts.append("use_dora=True")
        if self.init_lora_weights is not True:
            parts.append(f"init_lora_weights={self.init_lora_weights!r}")
        if self.backend != "auto":
            parts.append(f"backend={self.backend!r}")
        if self.merged:
            parts.append("merged=True")
        return ", ".join(parts)


def _check_loftq(weight: Weight, original: Tensor | None) -> None:
    if original is None:
        got = weight.layout.format if isinstance(weight, QuantizedWeight) else weight.dtype
        raise ValueError(
            'init_lora_weights: "loftq" starts from the error of codes; wanted a plain nn.Linear '
            f'and quantize="nf4", ..., got a weight in {got}'
        )
