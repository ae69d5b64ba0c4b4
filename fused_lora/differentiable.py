"""What makes a registered operator differentiable: under torch.compile, torch.func, dispatch modes.

An operator's own autograd formula serves torch.compile; but it serves no transform, and gives
forward-mode AD zeros. An autograd.Function serves transforms and refuses forward mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .autograd import raise_second_derivative
from .operators import LIBRARY, name_of, register_autograd


def differentiable(
    operator: Any,
    backward_operator: Any,
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Any, ...]],
) -> type[torch.autograd.Function]:
    """Registers the formula of ``operator``; the Function that calls it everywhere else.

    ``setup_context`` as PyTorch wants it. ``backward(ctx, call, *grads)`` gives the gradients in
    the order of the operator's arguments, a list for a list, and calls ``backward_operator`` as
    ``call``. vmap runs each operator once for each example.
    """
    name = name_of(operator).partition("::")[2]

    class BackwardFunction(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return backward_operator(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> None:
            raise_second_derivative(name)

    class ForwardFunction(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return operator(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            gradients = backward(ctx, BackwardFunction.apply, *grads)
            return tuple(None if isinstance(grad, list) else grad for grad in gradients)

    ForwardFunction.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]

    def formula(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return backward(ctx, backward_operator, *grads)

    register_autograd(operator, formula, setup_context)
    _loop_over_examples(operator)
    _loop_over_examples(backward_operator)
    return ForwardFunction


def _loop_over_examples(operator: Any) -> None:
    """The loop that PyTorch has for operators without a list, and its warning."""

    def call(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        name = name_of(operator)
        warnings.warn(
            f"There is a performance drop: vmap runs {name} once for each example", stacklevel=2
        )
        if info.batch_size == 0:
            raise RuntimeError(f"{name}: got 0 examples under vmap, wanted at least one")
        values, structure = pytree.tree_flatten(args)
        dims = pytree.tree_leaves(in_dims)
        results = []
        for i in range(info.batch_size):
            example = [
                value.select(dim, i) if isinstance(value, Tensor) and dim is not None else value
                for value, dim in zip(values, dims, strict=True)
            ]
            outputs = operator(*pytree.tree_unflatten(example, structure))
            results.append(pytree.tree_leaves(outputs))
        stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
        as_outputs = pytree.tree_structure(outputs)
        out_dims = pytree.tree_unflatten([0] * len(stacked), as_outputs)
        return pytree.tree_unflatten(stacked, as_outputs), out_dims

    torch.library.register_vmap(name_of(operator), call, lib=LIBRARY)
