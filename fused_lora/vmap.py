"""`torch.vmap` of registered operators: one call for each example."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def loop_over_examples(operator: Any) -> None:
    """Registers a loop and its warning: PyTorch's own fallback takes no operator with a list."""

    def call(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        warnings.warn(
            f"There is a performance drop because {operator._qualname} runs once for each example "
            "under vmap",
            stacklevel=2,
        )
        if info.batch_size == 0:
            raise RuntimeError(f"{operator._qualname}: got 0 examples under vmap, wanted some")
        values, structure = pytree.tree_flatten(args)
        dims = pytree.tree_leaves(in_dims)

        def example(i: int) -> Any:
            mine = [
                value.select(dim, i) if isinstance(value, Tensor) and dim is not None else value
                for value, dim in zip(values, dims, strict=True)
            ]
            return operator(*pytree.tree_unflatten(mine, structure))

        results, structures = zip(
            *(pytree.tree_flatten(example(i)) for i in range(info.batch_size)), strict=True
        )
        stacked = [torch.stack(outputs) for outputs in zip(*results, strict=True)]
        out_dims = pytree.tree_unflatten([0] * len(stacked), structures[0])
        return pytree.tree_unflatten(stacked, structures[0]), out_dims

    operator.register_vmap(call)
