"""Triton's interpreter without what it does again and again: half of its time.

For each call of a device function it looks through all of triton.language and patches what the
launch has patched before; for each load it makes the table of NumPy's dtypes anew; and for each
value its type's name, its shape and the types of that.
"""

from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def make_quick() -> None:
    """For this process; no result changes."""
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = _kept(interpreter._get_np_dtype)
    tl.block_type.__init__ = _block_type(tl.block_type.__init__)
    tl.tensor.__init__ = _tensor(tl.tensor.__init__)


def _once_a_launch(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """For each module that functions are of: what is patched follows from its globals."""
    launch, patched = interpreter.GridExecutor.__call__, set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            patched.clear()

    def once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    interpreter.GridExecutor.__call__ = launched
    return once


def _kept(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A block's is its elements'; types of blocks have no hash, but all have names."""
    known: dict[str, Any] = {}

    def quick(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = numpy_dtype(dtype)
        return known[name]

    return quick


def _block_type(init: Callable[..., None]) -> Callable[..., None]:
    """What it has but for its elements' type: the same for the same shape and name."""
    known: dict[Any, dict[str, Any]] = {}

    def quick(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *shape
        if key not in known:
            init(self, element_ty, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key], element_ty=element_ty)

    return quick


def _tensor(init: Callable[..., None]) -> Callable[..., None]:
    """What it has but for its value and type: the same for the type's name."""
    known: dict[str, dict[str, Any]] = {}

    def quick(self: Any, handle: Any, type: Any) -> None:
        if type.name not in known:
            init(self, None, type)
            known[type.name] = dict(vars(self))
        vars(self).update(known[type.name], handle=handle, type=type, dtype=type.scalar)

    return quick
