"""One look at many tensors: Dynamo's guards compare all that they are in a single call.

They are private to PyTorch: where they are not what they were, there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

Sizes = Sequence[Sequence[int | None]]  # one for each dimension of each tensor


def guards_of(tensors: Sequence[Tensor], sizes: Sizes, strides: Sizes) -> Any:
    """Its ``check(*tensors)`` is True for as many of the same kind; None where PyTorch has none.

    The same types, dtypes, devices, layouts, requires_grad, modes of autograd, autocast and
    torch.func, and these sizes and strides, None being any.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        known: dict[str, Any] = {"dynamic_dims_sizes": sizes, "dynamic_dims_strides": strides}
        guards = TensorGuards(*tensors, **known)
        return guards if guards.check(*tensors) is True else None
    except (ImportError, AttributeError, TypeError):
        return None
