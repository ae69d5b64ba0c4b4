"""`FusedLoRAAttention`: multi-head attention with adapters on any of its four projections."""

from __future__ import annotations

import functools
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .calls import Backend
from .explanation import Explanation
from .linear import FusedLoRALinear
from .together import explain_together, forward_together

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class FusedLoRAAttention(nn.Module):
    """softmax(Q K^T / sqrt(head_dim) + mask) V, then the output projection, all weights frozen.

    Each of q_proj, k_proj, v_proj and out_proj is a `FusedLoRALinear` if it is among
    ``target_modules``, and a frozen `nn.Linear` otherwise. Projections of the same tensor run
    together (`lora_linear_group`): q, k and v in self-attention, k and v where key is value.

    The adapter's input is the projection's input, y = W0 x + scaling * B A x, as in the paper
    (https://arxiv.org/abs/2106.09685).

    Args:
        embed_dim, num_heads, bias, kdim, vdim, dropout, batch_first, device, dtype: as in
            `nn.MultiheadAttention`; ``dropout`` is on the attention weights, in training.
        num_kv_heads: heads of key and value (grouped-query attention); num_heads by default.
        target_modules: which projections get an adapter.
        r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, backend: see `FusedLoRALinear`.

    Raises TypeError or ValueError where a number or a name is not possible.
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    out_proj: nn.Module

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        num_kv_heads: int | None = None,
        target_modules: Collection[str] = ("k_proj", "v_proj"),
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        dropout: float = 0.0,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> None:
        checks.check_integer("embed_dim", embed_dim, 1)
        kdim = embed_dim if kdim is None else kdim
        vdim = embed_dim if vdim is None else vdim
        checks.check_integer("kdim", kdim, 1)
        checks.check_integer("vdim", vdim, 1)
        checks.check_flag("bias", bias)
        kv_heads = _check_heads(embed_dim, num_heads, num_kv_heads)
        width = embed_dim // num_heads * kv_heads
        checks.check_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self._adopt(
            {
                "q_proj": nn.Linear(embed_dim, embed_dim, **options),
                "k_proj": nn.Linear(kdim, width, **options),
                "v_proj": nn.Linear(vdim, width, **options),
                "out_proj": nn.Linear(embed_dim, embed_dim, **options),
            },
            num_heads,
            kv_heads,
            target_modules,
            dropout,
            batch_first,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            adapter_dtype=adapter_dtype,
            backend=backend,
        )

    @classmethod
    def from_linears(
        cls,
        q_proj: nn.Linear,
        k_proj: nn.Linear,
        v_proj: nn.Linear,
        out_proj: nn.Linear,
        num_heads: int,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        num_kv_heads: int | None = None,
        target_modules: Collection[str] = ("k_proj", "v_proj"),
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        dropout: float = 0.0,
        batch_first: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> FusedLoRAAttention:
        """Attention over the linears' own weights and biases: the storage is shared, not copied.

        Raises TypeError unless each is exactly an `nn.Linear`, ValueError unless their sizes fit.
        """
        linears = {"q_proj": q_proj, "k_proj": k_proj, "v_proj": v_proj, "out_proj": out_proj}
        for name, linear in linears.items():
            if type(linear) is not nn.Linear:
                raise TypeError(f"{name}: got {type(linear).__name__}, wanted torch.nn.Linear")
        kv_heads = _check_heads(q_proj.out_features, num_heads, num_kv_heads)
        width = q_proj.out_features // num_heads * kv_heads
        for name in ("k_proj", "v_proj"):
            got = linears[name].out_features
            if got != width:
                raise ValueError(f"{name}: got {got} out_features, wanted {width} to fit q_proj")
        if out_proj.in_features != q_proj.out_features:
            raise ValueError(
                f"out_proj: got {out_proj.in_features} in_features, wanted {q_proj.out_features} "
                "to fit q_proj"
            )
        attention = cls.__new__(cls)
        attention._adopt(
            linears,
            num_heads,
            kv_heads,
            target_modules,
            dropout,
            batch_first,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            adapter_dtype=adapter_dtype,
            backend=backend,
        )
        return attention.train(q_proj.training)

    @classmethod
    def from_multihead_attention(
        cls,
        attention: nn.MultiheadAttention,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        target_modules: Collection[str] = ("k_proj", "v_proj"),
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        backend: Backend = "auto",
    ) -> FusedLoRAAttention:
        """What ``attention`` computes, with adapters; its weights are shared, not copied.

        Raises TypeError unless it is exactly an `nn.MultiheadAttention`, ValueError if it adds
        biases or zeros to the keys (add_bias_kv, add_zero_attn).
        """
        if type(attention) is not nn.MultiheadAttention:
            got = type(attention).__name__
            raise TypeError(f"attention: got {got}, wanted torch.nn.MultiheadAttention")
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("attention: got add_bias_kv or add_zero_attn, which is not supported")
        weights: Any = (
            attention.q_proj_weight,
            attention.k_proj_weight,
            attention.v_proj_weight,
        )
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        bias = attention.in_proj_bias
        biases: Any = (None,) * 3 if bias is None else bias.chunk(3)
        q_proj, k_proj, v_proj = (_frozen(w, b) for w, b in zip(weights, biases, strict=True))
        return cls.from_linears(
            q_proj,
            k_proj,
            v_proj,
            _frozen(attention.out_proj.weight, attention.out_proj.bias),
            attention.num_heads,
            r,
            lora_alpha,
            target_modules=target_modules,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            dropout=attention.dropout,
            batch_first=attention.batch_first,
            adapter_dtype=adapter_dtype,
            backend=backend,
        ).train(attention.training)

    def _adopt(
        self,
        linears: dict[str, nn.Linear],
        num_heads: int,
        num_kv_heads: int,
        target_modules: Collection[str],
        dropout: float,
        batch_first: bool,
        **adapter: Any,
    ) -> None:
        super().__init__()
        wrong = f"target_modules: got {target_modules!r}, wanted some of {list(PROJECTIONS)}"
        if isinstance(target_modules, str) or not isinstance(target_modules, Collection):
            raise TypeError(wrong)
        if not target_modules or any(name not in PROJECTIONS for name in target_modules):
            raise ValueError(wrong)
        checks.check_dropout("dropout", dropout)
        checks.check_flag("batch_first", batch_first)
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = linears["q_proj"].out_features // num_heads
        self.dropout = float(dropout)
        self.batch_first = batch_first
        for name, linear in linears.items():
            if name in target_modules:
                layer: nn.Module = FusedLoRALinear.from_linear(linear, **adapter)
            else:
                layer = _frozen(linear.weight, linear.bias)
            self.add_module(name, layer)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """The output [..., L, embed_dim], laid out as query.

        Args:
            query: [L, B, embed_dim], [B, L, embed_dim] with ``batch_first``, or [L, embed_dim].
            key, value: as query, of length S. key is query and value is key by default.
            key_padding_mask: [B, S] ([S] without a batch); True, or minus infinity where it is of
                floating point, at the keys to ignore, as in `nn.MultiheadAttention`.
            attn_mask: [L, S] or [B * num_heads, L, S]; True, or minus infinity, where query l may
                not see key s.
            is_causal: query l sees no key after l. Needs no attn_mask, and adds to one.

        Raises TypeError or ValueError unless shapes and dtypes fit together.
        """
        checks.check_flag("is_causal", is_causal)
        key, value = _or_query(query, key, value)
        unbatched, L, S, B = self._check(query, key, value)
        masks = [
            _as_4d("key_padding_mask", key_padding_mask, (B, 1, 1, S), unbatched),
            _as_4d("attn_mask", attn_mask, (B, self.num_heads, L, S), unbatched),
        ]
        given = [mask for mask in masks if mask is not None]
        if given and is_causal:
            given.append(torch.ones(L, S, dtype=torch.bool, device=query.device).triu(1))
        mask = _combined(given) if given else None
        q, k, v = (self._split_heads(t, unbatched) for t in self._project(query, key, value))
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal and mask is None,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )  # [B, H, L, D]
        y = y.transpose(1, 2) if self.batch_first or unbatched else y.permute(2, 0, 1, 3)
        y = y.flatten(-2)
        output: Tensor = self.out_proj(y.squeeze(0) if unbatched else y)
        return output

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The three projections; adapted ones of the same tensor in one call."""
        inputs = {"q_proj": query, "k_proj": key, "v_proj": value}
        outputs: dict[str, Tensor] = {}
        for name, x in inputs.items():
            layer = self.get_submodule(name)
            if name in outputs:
                continue
            if not isinstance(layer, FusedLoRALinear):
                outputs[name] = layer(x)
                continue
            adapted = self._adapted(inputs, x)
            ys = forward_together(adapted.values(), x)
            outputs |= dict(zip(adapted, ys, strict=True))
        return [outputs[name] for name in inputs]

    def _adapted(self, inputs: dict[str, Tensor], x: Tensor) -> dict[str, nn.Module]:
        """The projections of x that have adapters: they run together."""
        layers = {name: self.get_submodule(name) for name, t in inputs.items() if t is x}
        return {name: m for name, m in layers.items() if isinstance(m, FusedLoRALinear)}

    def explain(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None
    ) -> dict[str, Explanation]:
        """Which backend and strategy each projection with an adapter takes, and why.

        By the names of the projections that run together, such as "q_proj, k_proj, v_proj". The
        arguments are `forward`'s; computes nothing.
        """
        key, value = _or_query(query, key, value)
        self._check(query, key, value)
        inputs = {"q_proj": query, "k_proj": key, "v_proj": value}
        inputs["out_proj"] = query.new_empty((*query.shape[:-1], self.num_heads * self.head_dim))
        found: dict[str, Explanation] = {}
        for x in inputs.values():
            adapted = self._adapted(inputs, x)
            if adapted and ", ".join(adapted) not in found:
                found[", ".join(adapted)] = explain_together(adapted, x)
        return found

    def _split_heads(self, t: Tensor, unbatched: bool) -> Tensor:
        """[..., H * D] -> [B, H, length, D], a view."""
        t = t.view(*t.shape[:-1], t.shape[-1] // self.head_dim, self.head_dim)
        if unbatched:
            return t.transpose(0, 1).unsqueeze(0)
        return t.transpose(1, 2) if self.batch_first else t.permute(1, 2, 0, 3)

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[bool, int, int, int]:
        tensors = {"query": query, "key": key, "value": value}
        for name, t in tensors.items():
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}: got {type(t).__name__}, wanted a torch.Tensor")
        if query.ndim not in (2, 3):
            raise ValueError(f"query: got shape {list(query.shape)}, wanted 2 or 3 dimensions")
        unbatched = query.ndim == 2
        length, batch = (1, 0) if self.batch_first else (0, 1)
        for name, projection in zip(tensors, ("q_proj", "k_proj", "v_proj"), strict=True):
            t, width = tensors[name], self.get_submodule(projection).in_features
            like = key if name == "value" else t
            fits = t.ndim == query.ndim and t.shape[-1] == width
            if fits and not unbatched:
                fits = t.shape[batch] == query.shape[batch]
            if not fits or t.shape[:-1] != like.shape[:-1]:
                raise ValueError(
                    f"{name}: got shape {list(t.shape)}, wanted [..., {width}] to fit {projection}"
                    f" and query {list(query.shape)}, key {list(key.shape)}"
                )
        if unbatched:
            return True, query.shape[0], key.shape[0], 1
        return False, query.shape[length], key.shape[length], query.shape[batch]

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"dropout={self.dropout}, batch_first={self.batch_first}"
        )


def _or_query(query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, Tensor]:
    """key and value as `forward` takes them."""
    if key is None:
        if value is not None:
            raise ValueError("value: was given without a key")
        key = query
    return key, key if value is None else value


def _frozen(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen layer over the storage of these tensors."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _check_heads(width: int, num_heads: int, num_kv_heads: int | None) -> int:
    """The number of key and value heads."""
    checks.check_integer("num_heads", num_heads, 1)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    checks.check_integer("num_kv_heads", kv_heads, 1)
    if width % num_heads:
        raise ValueError(f"num_heads: got {num_heads}, wanted a divisor of {width}")
    if num_heads % kv_heads:
        raise ValueError(f"num_kv_heads: got {kv_heads}, wanted a divisor of num_heads {num_heads}")
    return kv_heads


def _as_4d(
    name: str, mask: Tensor | None, shape: tuple[int, int, int, int], unbatched: bool
) -> Tensor | None:
    """The mask so that it broadcasts to [B, H, L, S]."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, wanted a torch.Tensor")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}: got {mask.dtype}, wanted torch.bool or floating point")
    B, H, L, S = shape
    wanted: list[tuple[int, ...]] = [(L, S), (B * H, L, S)]
    if name == "key_padding_mask":
        wanted = [(S,)] if unbatched else [(B, S)]
    if tuple(mask.shape) not in wanted:
        shapes = " or ".join(str(list(s)) for s in wanted)
        raise ValueError(f"{name}: got shape {list(mask.shape)}, wanted {shapes}")
    if name == "attn_mask" and mask.ndim == 2:
        return mask[None, None]
    return mask.reshape(shape)


def _combined(masks: list[Tensor]) -> Tensor:
    """One mask as `scaled_dot_product_attention` takes it: True where a key is seen, or added."""
    if all(mask.dtype == torch.bool for mask in masks):
        return ~functools.reduce(torch.logical_or, masks)
    terms = [
        torch.zeros_like(mask, dtype=torch.float32).masked_fill(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask
        for mask in masks
    ]
    return functools.reduce(torch.add, terms)
