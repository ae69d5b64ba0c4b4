"""`LoRALinearFunction`: forward and backward of a LoRA layer as one node of the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import backends
from .dispatch import Plan
from .kernels.dropout import dropout_of
from .quantized_weight import QuantizedWeight, Weight

if TYPE_CHECKING:
    from .kernels.replay import Replays


def raise_second_derivative(name: str, reference: str | None = None) -> NoReturn:
    """The RuntimeError that second derivatives of the function ``name`` get.

    ``reference``: the function in reference.py that has them, where it has another name.
    """
    raise RuntimeError(
        f"{name}: its gradients cannot be differentiated again (create_graph=True); "
        f"fused_lora.reference.{reference or name}'s can"
    )


def check_first_derivative(name: str, reference: str | None = None) -> None:
    """`raise_second_derivative` in the backward pass of ``name``, if that is recorded itself.

    `once_differentiable` would let it pass where only A and B depend on the second derivative, and
    leave their share out of it.
    """
    if torch.is_grad_enabled():
        raise_second_derivative(name, reference)


def bias_gradient(g: Tensor | None, needed: bool) -> Tensor | None:
    """sum_M g [N] of g [..., N]."""
    return g.sum_to_size(g.shape[-1:]) if needed and g is not None else None


class Codes(NamedTuple):
    """A quantised W0 between forward and backward: autograd looks after tensors that it saves."""

    weight: QuantizedWeight
    versions: tuple[int, ...]

    @staticmethod
    def _versions(weight: QuantizedWeight) -> tuple[int, ...]:
        parts = (part for part in weight._parameters.values() if part is not None)
        return tuple(0 if part.is_inference() else part._version for part in parts)

    @classmethod
    def of(cls, weight: Weight) -> Codes | None:
        """What to keep of a weight that is quantised."""
        if isinstance(weight, QuantizedWeight):
            return cls(weight, cls._versions(weight))
        return None

    def unchanged(self) -> QuantizedWeight:
        """The weight; RuntimeError if it was changed in place, as autograd's for tensors."""
        if self.versions != self._versions(self.weight):
            raise RuntimeError(
                "weight: a quantised W0 that the gradient needs was changed in place after the "
                "forward pass"
            )
        return self.weight


def to_save(weight: Weight) -> Tensor | None:
    """What a context saves of a weight; nothing of codes, for which it has `Codes`.

    Like A and B it is the parameter itself, as PyTorch's own layers save theirs: hooks on saved
    tensors know it (offloading leaves parameters where they are), and who gives it other memory
    between forward and backward (DeepSpeed's ZeRO-3) gets that memory read.
    """
    return weight if isinstance(weight, Tensor) else None


def as_saved(saved: Any, codes: Codes | None) -> Any:
    """The weight again, of `to_save` and `Codes.of`; RuntimeError if codes were changed."""
    return saved if codes is None else codes.unchanged()


class LoRALinearFunction(torch.autograd.Function):
    """y = x W0^T + bias + scaling * (D o x) A^T B^T with gradients for x, A, B and bias.

    Saves x, h [M, r], the weights and the dropout seed (on a CPU the mask, a byte an element): no
    dropped copy of x, nothing of size [M, N]. Computes the gradients that `needs_input_grad` asks
    for and no others; W0 is frozen and gets none. Differentiable once: backward raises RuntimeError
    under ``create_graph=True``. `lora_linear` is the checked way in.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scaling: float,
        seed: Tensor | None,
        threshold: int,
        plan: Plan,
        replays: Replays | None = None,
    ) -> Tensor:
        """x [..., K], weight [N, K], lora_A [r, K], lora_B [N, r], bias [N] or None -> y [..., N].

        ``seed`` (int64, one element, on x's device) and ``threshold`` (p * 2^16) make the dropout
        mask, or on PyTorch's path ``seed`` is the mask [M, K], bool; None is no dropout. ``plan``:
        from `dispatch.plan`. ``replays``: of calls that differ in the tensors alone.
        """
        dropout = dropout_of(seed, threshold)
        needs_x, _, needs_A, needs_B = ctx.needs_input_grad[:4]
        operands = (x, weight, lora_A, lora_B, bias)
        y, h = backends.forward(*operands, scaling, dropout, plan, need_h=needs_B, replays=replays)
        ctx.save_for_backward(
            x if needs_A else None,
            to_save(weight) if needs_x else None,
            lora_A,
            lora_B,
            h,
            seed if needs_x or needs_A else None,
        )
        ctx.quantized = Codes.of(weight) if needs_x else None
        ctx.scaling, ctx.threshold, ctx.plan, ctx.replays = scaling, threshold, plan, replays
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        check_first_derivative("lora_linear")
        x, weight, lora_A, lora_B, h, seed = ctx.saved_tensors
        dropout = dropout_of(seed, ctx.threshold)
        dx, dA, dB = backends.backward(
            g,
            x,
            as_saved(weight, ctx.quantized),
            lora_A,
            lora_B,
            h,
            ctx.scaling,
            dropout,
            ctx.plan,
            need_dx=ctx.needs_input_grad[0],
            replays=ctx.replays,
        )
        dbias = bias_gradient(g, ctx.needs_input_grad[4])
        return dx, None, dA, dB, dbias, None, None, None, None, None
