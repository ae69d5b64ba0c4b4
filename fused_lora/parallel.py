"""Tensor, sequence and data parallelism through DTensor: layouts and `parallelize_module` styles.

    parallelize_module(model, mesh, {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()})

The weight is split as Megatron-LM does (https://arxiv.org/abs/1909.08053) and of the adapter the
factor that the split passes through; the other one is small and whole on every rank. The kernels
run on the local shards, and only what PyTorch sends for an `nn.Linear` is sent, plus one all-reduce
of the whole factor's gradient. On each dimension of the mesh a call has one of these layouts:

    x         weight    lora_A    lora_B    bias      y         summed over ranks in backward
    Replicate Shard(0)  Replicate Shard(0)  Shard(0)  Shard(-1) dx, dA         column-wise
    Shard(-1) Shard(1)  Shard(1)  Replicate Replicate Partial   dB, dbias      row-wise
    Shard(i)  Replicate Replicate Replicate Replicate Shard(i)  dA, dB, dbias  split batch
    Replicate Replicate Replicate Replicate Replicate Replicate none           the same everywhere

Dropout: seed the generators of a mesh's ranks alike, as DTensor's own random operators need it.
Ranks that hold the same x then draw the same mask, and ranks that hold different parts of it
different ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor import parallel as torch_parallel

from . import checks
from .linear import FusedLoRALinear
from .multi_linear import FusedMultiLoRALinear
from .quantized_weight import QuantizedWeight
from .together import FusedLoRAGroup

NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
WHOLE, SUM = Replicate(), Partial()


@dataclass(frozen=True)
class _Rule:
    """One line of the table above; ``gradients`` in the order of `NAMES` without weight."""

    arguments: tuple[Placement, ...]
    y: Placement
    gradients: tuple[Placement, ...]


def _rules(ndim: int) -> list[_Rule]:
    """The layouts that an x of ``ndim`` dimensions can have."""
    columns = Shard(ndim - 1)
    whole = _Rule((WHOLE,) * 5, WHOLE, (WHOLE,) * 4)
    colwise = _Rule(
        (WHOLE, Shard(0), WHOLE, Shard(0), Shard(0)), columns, (SUM, SUM, Shard(0), Shard(0))
    )
    rowwise = _Rule((columns, Shard(1), Shard(1), WHOLE, WHOLE), SUM, (columns, Shard(1), SUM, SUM))
    batch = [
        _Rule((Shard(i), *(WHOLE,) * 4), Shard(i), (Shard(i), SUM, SUM, SUM))
        for i in range(ndim - 1)
    ]
    return [whole, colwise, rowwise, *batch]


class _Arrived(torch.autograd.Function):
    """The tensor itself, and in backward its gradient, after the collective that makes it.

    DTensor hands on what has not arrived yet, as a subclass that waits when an operator reads it. A
    kernel reads memory.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _arrived(tensor)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _arrived(g)


def _arrived(tensor: Tensor) -> Tensor:
    waited: Tensor = tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor
    return waited.view_as(waited)


def _arrive(tensor: Tensor) -> Tensor:
    arrived: Tensor = _Arrived.apply(tensor)  # type: ignore[no-untyped-call]
    return arrived


def arrived(x: Tensor) -> Tensor:
    """x, or its plain tensor if DTensor has handed it on before its collective is done."""
    return _arrive(x) if isinstance(x, AsyncCollectiveTensor) else x


def has_dtensor(*tensors: Tensor | None) -> bool:
    """Whether one of them is a DTensor, so that the call needs a `Layout`."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


@dataclass(frozen=True)
class Layout:
    """How one call lies on its mesh: a rule for each of the mesh's dimensions."""

    mesh: DeviceMesh
    rules: tuple[_Rule, ...]
    shape: torch.Size  # of y

    @classmethod
    def of(
        cls, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
    ) -> Layout:
        """The layout of a call of `lora_linear`.

        Raises TypeError if some are DTensors and some are not, or if no rule has their placements,
        and ValueError if their meshes differ; and what `checks.check_tensors` raises.
        """
        checks.check_tensors(x, weight, lora_A, lora_B, bias)
        tensors = (x, weight, lora_A, lora_B, bias)
        given = {n: t for n, t in zip(NAMES, tensors, strict=True) if t is not None}
        for name, tensor in given.items():
            if not isinstance(tensor, DTensor):
                others = [n for n, t in given.items() if isinstance(t, DTensor)]
                raise TypeError(
                    f"{name}: got a {type(tensor).__name__}, wanted a DTensor as {others[0]} is; "
                    "see fused_lora.parallel for the layouts"
                )
        placed = {n: t for n, t in given.items() if isinstance(t, DTensor)}
        mesh = placed["x"].device_mesh
        for name, dtensor in placed.items():
            if dtensor.device_mesh != mesh:
                raise ValueError(
                    f"{name}: is on {dtensor.device_mesh}, wanted the mesh that x is on, {mesh}"
                )
        rules = tuple(_rule(placed, dim) for dim in range(mesh.ndim))
        return cls(mesh, rules, torch.Size((*x.shape[:-1], weight.shape[0])))

    @property
    def shard(self) -> int | None:
        """The number of this rank's part of x among the parts that differ; None if none does."""
        number: int | None = None
        for dim, rule in enumerate(self.rules):
            if rule.arguments[0].is_shard():
                number = (number or 0) * self.mesh.size(dim) + self.mesh.get_local_rank(dim)
        return number

    def to_local(self, *tensors: Tensor | None) -> list[Any]:
        """This rank's x, weight, lora_A, lora_B and bias, differentiable."""
        shards: list[Any] = []
        for position, tensor in enumerate(tensors):
            if tensor is None:
                shards.append(None)
                continue
            assert isinstance(tensor, DTensor)
            gradients = [rule.gradients[max(position - 1, 0)] for rule in self.rules]
            # The redistribution moves nothing here. Its backward adds the parts of a gradient, so
            # that a parameter's .grad has the parameter's own layout.
            whole = tensor.redistribute(placements=tensor.placements)
            shards.append(_arrive(whole.to_local(grad_placements=gradients)))
        if shards[-1] is not None and not self._adds_bias:
            shards[-1] = shards[-1] * 0
        return shards

    @property
    def _adds_bias(self) -> bool:
        """Of the parts of a sum, the first one has the bias."""
        return not any(
            rule.y == SUM and self.mesh.get_local_rank(dim) for dim, rule in enumerate(self.rules)
        )

    def from_local(self, y: Tensor) -> DTensor:
        """The logical y of which this rank has computed its part."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            _arrive(y),
            self.mesh,
            [rule.y for rule in self.rules],
            shape=self.shape,
            stride=stride,
        )


def _rule(placed: dict[str, DTensor], dim: int) -> _Rule:
    got = {name: tensor.placements[dim] for name, tensor in placed.items()}
    for rule in _rules(placed["x"].ndim):
        wanted = dict(zip(NAMES, rule.arguments, strict=True))
        if all(placement == wanted[name] for name, placement in got.items()):
            return rule
    described = ", ".join(f"{name} {placement}" for name, placement in got.items())
    raise TypeError(
        f"x, weight, lora_A, lora_B: no layout of fused_lora.parallel has {described} on dimension "
        f"{dim} of {placed['x'].device_mesh}; wanted ColwiseParallel's (Replicate, Shard(0), "
        "Replicate, Shard(0)), RowwiseParallel's (Shard(-1), Shard(1), Shard(1), Replicate), or "
        "parameters that are Replicate with x Replicate or split along its batch"
    )


def _distribute(
    style: ColwiseParallel | RowwiseParallel,
    layer: FusedLoRALinear,
    mesh: DeviceMesh,
    rule: _Rule,
    split: str,
) -> nn.Module:
    """`distribute_module` as torch's styles call it, with the rule's placements."""
    name = type(style).__name__
    if mesh.ndim != 1:
        raise ValueError(f"{name}: got the {mesh.ndim}-D mesh {mesh}, wanted one of its dimensions")
    if layer.merged:
        raise RuntimeError(f"{name}: the layer is merged: call unmerge() first")
    if isinstance(layer.weight, QuantizedWeight) or layer.use_dora:
        what = "DoRA" if layer.use_dora else "a quantised weight"
        raise TypeError(f"{name}: the layer has {what}, which cannot be distributed")
    size = getattr(layer, split)
    if size % mesh.size():
        raise ValueError(f"{name}: {split} = {size} does not divide by the mesh's {mesh.size()}")

    def partition(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for parameter_name, placement in zip(NAMES[1:], rule.arguments[1:], strict=True):
            parameter = getattr(module, parameter_name)
            if parameter is not None:
                dtensor = distribute_tensor(
                    parameter, mesh, [placement], src_data_rank=style.src_data_rank
                )
                new = nn.Parameter(dtensor, requires_grad=parameter.requires_grad)
                module.register_parameter(parameter_name, new)

    return distribute_module(
        layer,
        mesh,
        partition,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )


def _refuse_modules(style: ColwiseParallel | RowwiseParallel, module: nn.Module) -> None:
    name = type(style).__name__
    if isinstance(module, FusedMultiLoRALinear):
        raise TypeError(f"{name}: got a layer of several adapters, which cannot be distributed")
    if isinstance(module, FusedLoRAGroup):
        raise TypeError(f"{name}: got a FusedLoRAGroup; wanted each of its layers, by their paths")


class ColwiseParallel(torch_parallel.ColwiseParallel):
    """torch's `ColwiseParallel` that takes a `FusedLoRALinear` too: splits out_features.

    Same arguments, and the same behaviour for `nn.Linear` and `nn.Embedding`. Raises ValueError
    if out_features does not divide by the number of ranks, TypeError for a quantised weight, DoRA
    or several adapters.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, FusedLoRALinear):
            return _distribute(self, module, device_mesh, _rules(2)[1], "out_features")
        _refuse_modules(self, module)
        return super()._apply(module, device_mesh)


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """torch's `RowwiseParallel` that takes a `FusedLoRALinear` too: splits in_features.

    Same arguments, and the same behaviour for `nn.Linear` and `nn.Embedding`. Raises ValueError
    if in_features does not divide by the number of ranks, TypeError for a quantised weight, DoRA or
    several adapters.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, FusedLoRALinear):
            self.desired_input_layouts = (Shard(-1),)
            return _distribute(self, module, device_mesh, _rules(2)[2], "in_features")
        _refuse_modules(self, module)
        return super()._apply(module, device_mesh)
