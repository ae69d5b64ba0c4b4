"""Finds out at run time that layers share their input, and computes them together.

A model calls q_proj(x), k_proj(x) and v_proj(x) one after another. Where that is known, the first
call computes all three and returns its own output; the others are handed out when their layers are
called with the very same tensor in the very same state. Whatever differs by then (another tensor, a
changed version of it or of a weight, another adapter, scaling, mode, stream, autocast or gradient
mode) is computed anew, as if nothing had been prepared: only time can be lost, never correctness.
But what is written through ``.data`` between two of the calls has no version, and is not seen; and
the outputs are one node of the graph: a backward pass through one of them alone frees what the
others need, unless it is told to retain the graph (losses of single layers: ``groups=False``).

One set of prepared outputs is kept a thread: until it has been handed out, or, should an exception
come between, until the thread's next group or `forget`. Nothing of the model's own code, hooks or
parameters is touched.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import Arguments
from .autocast import autocast_enabled
from .calls import Backend
from .dispatch import better_apart
from .group import call_group
from .paths import in_any_layer

# transformers' families whose attention calls q_proj, k_proj and v_proj, and whose MLP gate_proj
# and up_proj, one after another with the same tensor.
_FAMILIES = ("gemma", "gemma2", "gemma3", "llama", "mistral", "qwen2", "qwen3")
_WITH_EXPERTS = ("glm4_moe", "gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
_MODULES = {f"transformers.models.{name}.modeling_{name}" for name in (*_FAMILIES, *_WITH_EXPERTS)}
_SHARING = {"Attention": ("q_proj", "k_proj", "v_proj"), "MLP": ("gate_proj", "up_proj")}

# Without gradients a group saves nothing but reads of x, which are 2 us of an H200 at 512 x 4096 by
# the model, and takes 105 us of CPU time instead of 66 (three layers, the driver stubbed).
_ROWS_WITHOUT_GRADIENTS = 512  # on a GPU, up to which layers are called apart
_PATIENCE = 8  # groups in a row that were computed and not asked for, before the warning


class _Prepared(NamedTuple):
    group: SharedInput
    x: weakref.ref[Tensor]
    mode: tuple[object, ...]
    outputs: dict[nn.Module, tuple[Tensor, Arguments, tuple[object, ...]]]


_local = threading.local()


def forget() -> None:
    """Frees what this thread has prepared and not handed out."""
    _local.prepared = None


def _mode(x: Tensor) -> tuple[object, ...]:
    """All that an output depends on besides the layer's own arguments and state."""
    device = x.device.type
    return (
        x._version,
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast_enabled(x) and torch.get_autocast_dtype(device),
        torch.cuda.current_stream(x.device) if device == "cuda" else None,
        _is_captured(x),
    )


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _versions(arguments: Arguments) -> tuple[object, ...]:
    return tuple((t._version, t.requires_grad, t.data_ptr()) for t in arguments.tensors())


def _changes_its_input(layer: nn.Module) -> bool:
    """Whether something may run before the layer's forward, or give it another tensor."""
    return bool(
        layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
    )


def _fit(x: Tensor, calls: Sequence[Arguments]) -> bool:
    """Whether all can be called with x, now, as plain tensors that count their versions."""
    if x.ndim == 0:
        return False
    K, device, dtype = x.shape[-1], x.device, None if autocast_enabled(x) else x.dtype
    tensors = [x]
    for call in calls:
        if call.weight.shape[-1] != K or call.backend != calls[0].backend:
            return False
        for t in (call.weight, call.bias):
            if dtype is not None and isinstance(t, Tensor) and t.dtype != dtype:
                return False
        tensors += call.tensors()
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter) or t.is_inference() or t.device != device:
            return False
    return True


class Place(NamedTuple):
    """A layer's own in a group."""

    group: SharedInput
    number: int

    def take(self, layer: nn.Module) -> None:
        """For a copy of a layer, in the copy of its group."""
        members = self.group._members
        if members[self.number]() is None:  # a shallow copy's group has its own layer still
            members[self.number] = weakref.ref(layer)


def _nobody() -> None:
    return None


class SharedInput:
    """Layers that are known to be called one after another with the same tensor, in this order.

    It keeps none of them alive; without all of them it does nothing. A copy of all has a copy of
    it, a copy of some has one that does nothing.

    Args:
        members: the layers; the first computes for all. Each has a method ``passed_on(x)``: what
            it passes to `lora_linear` for x in its present state; None where it does something
            else. The same tensors as long as the state is the same.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        self._members: list[Callable[[], Any]] = [weakref.ref(member) for member in members]
        self._unused = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied or pickled without its layers, which take their places when they have been."""
        return SharedInput._of_nobody, (len(self._members),)

    @classmethod
    def _of_nobody(cls, size: int) -> SharedInput:
        group = cls(())
        group._members = [_nobody] * size
        return group

    @property
    def members(self) -> tuple[Any, ...]:
        """The layers; none of them if one is gone."""
        found = tuple(member() for member in self._members)
        return () if any(member is None for member in found) else found

    def places(self) -> Iterator[tuple[Any, Place]]:
        """Every layer and its place."""
        for number, member in enumerate(self.members):
            yield member, Place(self, number)

    def pays(self, x: object, own: Arguments | None, backend: Backend) -> bool:
        """Whether `output` may have something to give: a quick look, before the others' arguments.

        ``own``: what the layer's ``passed_on`` gives.
        """
        if torch.compiler.is_compiling() or not isinstance(x, Tensor):
            return False
        if x.is_cuda and backend != "triton" and not torch.is_grad_enabled():
            return x.shape[:-1].numel() > _ROWS_WITHOUT_GRADIENTS
        return own is None or not better_apart(x, own)

    def output(self, layer: nn.Module, x: Tensor, own: Arguments | None) -> Tensor | None:
        """The layer's output for x; None if it has to compute it itself.

        ``own``: what its ``passed_on`` gives.
        """
        if layer is self._members[0]():
            return self._prepare(x, own)
        return self._take(layer, x, own)

    def explain(self, x: Tensor, own: Arguments | None, backend: Backend) -> dict[str, str]:
        """The reason "group" for a layer's `Explanation`, if it may be computed in one."""
        if not self.pays(x, own, backend) or self._calls(x) is None:
            return {}
        return {
            "group": f"one of {len(self._members)} layers that are computed together when they are "
            "called one after another with the same tensor: see lora_linear_group"
        }

    def _calls(self, x: Tensor, first: Arguments | None = None) -> list[Arguments] | None:
        """What every layer passes on, if they can be computed together, and had better be.

        ``first``: the first one's, if it is known.
        """
        calls: list[Arguments] = []
        for i, layer in enumerate(self.members):
            call = layer.passed_on(x) if i or first is None else first
            if call is None or _changes_its_input(layer):
                return None
            calls.append(call)
            if better_apart(x, call):
                return None
        return calls if calls and _fit(x, calls) else None

    def _prepare(self, x: Tensor, own: Arguments | None) -> Tensor | None:
        self._drop_prepared()
        # torch.func's tensors have no address to compare; and a CUDA graph of another member alone,
        # with the same x, would be empty, and its output that of this graph.
        if torch._C._are_functorch_transforms_active() or _is_captured(x):
            return None
        calls = None if own is None else self._calls(x, own)
        if calls is None:
            return None
        mode, versions = _mode(x), [_versions(call) for call in calls]
        first, *others = call_group(x, calls)
        prepared = zip(others, calls[1:], versions[1:], strict=True)
        outputs = dict(zip(self.members[1:], prepared, strict=True))
        _local.prepared = _Prepared(self, weakref.ref(x), mode, outputs)
        return first

    def _take(self, layer: nn.Module, x: Tensor, own: Arguments | None) -> Tensor | None:
        prepared: _Prepared | None = getattr(_local, "prepared", None)
        if prepared is None or prepared.group is not self or layer not in prepared.outputs:
            return None
        if prepared.x() is not x or prepared.mode != _mode(x):
            self._drop_prepared()
            return None
        y, call, versions = prepared.outputs.pop(layer)
        if not prepared.outputs:
            forget()
            self._unused = 0
        unchanged = own is not None and call.same(own) and versions == _versions(own)
        return y if unchanged else None

    def _drop_prepared(self) -> None:
        prepared: _Prepared | None = getattr(_local, "prepared", None)
        forget()
        if prepared is None:
            return
        group = prepared.group
        group._unused += 1
        if group._unused == _PATIENCE and group.members:
            warnings.warn(
                f"fused_lora: a {type(group.members[0]).__name__} computed for its group, "
                f"{_PATIENCE} times in a row, what was not asked for with the same input; "
                "groups=False (of fuse and of inject) computes each layer on its own",
                stacklevel=2,
            )


def find_groups(model: nn.Module, kinds: Collection[type[nn.Module]]) -> Iterator[tuple[str, ...]]:
    """Paths of the layers of these types that a block calls one after another with one input.

    Only in blocks of transformers' own classes that are known to. A layer that is one of two such
    blocks, or twice in one, is in the first group alone.
    """
    grouped: set[nn.Module] = set()
    for path, block in model.named_modules():
        for suffix, names in _SHARING.items():
            if type(block).__module__ in _MODULES and type(block).__name__.endswith(suffix):
                members = [name for name in names if type(getattr(block, name, None)) in kinds]
                members = [name for name in members if getattr(block, name) not in grouped]
                layers = {getattr(block, name) for name in members}
                if len(members) > 1 and len(layers) == len(members):
                    grouped |= layers
                    yield tuple(f"{path}.{name}" if path else name for name in members)


def describe_groups(groups: Iterable[tuple[str, ...]]) -> list[str]:
    """A line for each kind of group, for the reports."""
    kinds = Counter(tuple(map(in_any_layer, paths)) for paths in groups)
    lines = []
    for paths, times in kinds.items():
        names = ", ".join(path.rpartition(".")[2] for path in paths)
        lines.append(f"  {paths[0].rpartition('.')[0]}: {names} share their input, {times} x")
    return lines
