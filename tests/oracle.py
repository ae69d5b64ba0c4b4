"""Random LoRA problems and the rule that every result is held to.

The rule is FlashAttention's: our error against an fp64 oracle is at most 2 times (gradients: 3
times) the error of the same-dtype PyTorch expression on the same input. No hand-picked tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_lora import reference
from fused_lora.autograd import LoRALinearFunction
from fused_lora.calls import Backend, checked_call
from fused_lora.dispatch import Plan, plan
from fused_lora.kernels.dropout import dropout_threshold

if TYPE_CHECKING:
    from fused_lora.kernels.replay import Replays

FORWARD_FACTOR, GRADIENT_FACTOR = 2.0, 3.0


@dataclass
class Problem:
    """Arguments of one call, and the gradient of the loss with respect to its output."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    g: Tensor
    scaling: float
    dropout_p: float
    seed: Tensor

    def tensors(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v for name, v in values.items() if isinstance(v, Tensor)}


def problem(
    M: int | tuple[int, ...],
    N: int,
    K: int,
    r: int,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    bias: bool = True,
    dropout_p: float = 0.0,
) -> Problem:
    """Everything of order one, so that an error anywhere is as visible as anywhere else."""
    lead = (M,) if isinstance(M, int) else M

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape) * std).to(device, dtype)

    adapter_dtype = adapter_dtype or dtype
    return Problem(
        x=normal(*lead, K),
        weight=normal(N, K, std=max(K, 1) ** -0.5),
        lora_A=normal(r, K, std=max(K, 1) ** -0.5, dtype=adapter_dtype),
        lora_B=normal(N, r, std=r**-0.5, dtype=adapter_dtype),
        bias=normal(N) if bias else None,
        g=normal(*lead, N),
        scaling=1.25,
        dropout_p=dropout_p,
        seed=torch.empty(1, dtype=torch.int64).random_().to(device),
    )


Result = dict[str, Tensor]
TRAINED = ("x", "lora_A", "lora_B", "bias")


def run(call: Callable[..., Tensor], p: Problem, needs: tuple[str, ...] = TRAINED) -> Result:
    """The output of ``call`` and the gradients of ``needs``."""
    tensors = {name: t.detach() for name, t in p.tensors().items()}
    leaves = {name: tensors[name].requires_grad_() for name in needs if name in tensors}
    y = call(replace(p, **tensors))
    result = {"y": y.detach()}
    if leaves:
        grads = torch.autograd.grad(y, list(leaves.values()), p.g)
        result |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return result


def fused(backend: Backend | Plan, replays: Replays | None = None) -> Callable[[Problem], Tensor]:
    """`LoRALinearFunction` with the problem's own dropout seed."""

    def call(p: Problem) -> Tensor:
        threshold = dropout_threshold(p.dropout_p)
        chosen = backend
        if not isinstance(chosen, Plan):
            described = checked_call(p.x, p.weight, p.lora_A, p.lora_B, p.bias, threshold > 0)
            chosen = plan(described, chosen)
        seed = p.seed if threshold else None
        known = () if replays is None else (replays,)  # `benchmarks.run --base` has older commits
        y: Tensor = LoRALinearFunction.apply(
            p.x, p.weight, p.lora_A, p.lora_B, p.bias, p.scaling, seed, threshold, chosen, *known
        )
        return y

    return call


def expression(p: Problem) -> Tensor:
    """The pure PyTorch expression, in the problem's own dtypes."""
    return reference.lora_linear(
        p.x,
        p.weight,
        p.lora_A,
        p.lora_B,
        scaling=p.scaling,
        bias=p.bias,
        dropout_p=p.dropout_p,
        seed=p.seed,
    )


def in_fp64(p: Problem) -> Problem:
    doubled = {name: t.double() for name, t in p.tensors().items() if t.is_floating_point()}
    return replace(p, **doubled)


def magnitudes(p: Problem) -> Problem:
    """All terms positive: its results are the sizes that roundings in the sums are relative to."""
    return replace(p, **{n: t.abs() for n, t in p.tensors().items() if t.is_floating_point()})


def check(got: Result, p: Problem, expression: Callable[[Problem], Tensor] = expression) -> None:
    """Applies the rule to every tensor of ``got``."""
    needs = tuple(name[1:] for name in got if name != "y")
    exact = run(expression, in_fp64(p), needs)
    magnitude = run(expression, magnitudes(in_fp64(p)), needs)
    compare(got, exact, magnitude, run(expression, p, needs))


def compare(got: Result, exact: Result, magnitude: Result, same_dtype: Result) -> None:
    """The rule, with PyTorch's results for the problem, for it in fp64 and for its magnitudes."""
    for name, tensor in got.items():
        assert tensor.shape == exact[name].shape, name
        assert tensor.dtype == same_dtype[name].dtype, name
        factor = FORWARD_FACTOR if name.startswith("y") else GRADIENT_FACTOR
        # PyTorch's error is sometimes 0 by luck, on a handful of elements: one rounding of the
        # result and one of each of the expression's four sums are always allowed; and to a handful
        # two of what is summed, as large as that is: those of dh, for one row and rank 1, all have.
        accumulator = torch.promote_types(tensor.dtype, torch.float32)
        few = tensor.numel() < 64
        floor = (
            torch.finfo(tensor.dtype).eps / 2 * (2 * magnitude[name] if few else exact[name]).norm()
        )
        floor += torch.finfo(accumulator).eps * 2 * magnitude[name].norm()
        ours = (tensor.double() - exact[name]).norm()
        theirs = (same_dtype[name].double() - exact[name]).norm()
        assert ours <= factor * theirs + floor, f"{name}: error {ours:.2e}, PyTorch's {theirs:.2e}"


class Made(TorchDispatchMode):
    """Sizes of the floating tensors that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = func is not torch.ops.aten.detach.default
        if made and isinstance(result, Tensor) and result.is_floating_point():
            self.sizes.append(result.numel())
        return result
