"""How one call of a LoRA layer lies on a mesh of DTensors: which part of it each rank computes.

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
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from . import checks

NAMES = ("x", "weight", "lora_A", "lora_B", "bias")
WHOLE, SUM = Replicate(), Partial()


@dataclass(frozen=True)
class Rule:
    """One line of the table above; ``gradients`` in the order of `NAMES` without weight."""

    arguments: tuple[Placement, ...]
    y: Placement
    gradients: tuple[Placement, ...]


def rules_of(ndim: int) -> list[Rule]:
    """The layouts that an x of ``ndim`` dimensions can have."""
    columns = Shard(ndim - 1)
    whole = Rule((WHOLE,) * 5, WHOLE, (WHOLE,) * 4)
    colwise = Rule(
        (WHOLE, Shard(0), WHOLE, Shard(0), Shard(0)), columns, (SUM, SUM, Shard(0), Shard(0))
    )
    rowwise = Rule((columns, Shard(1), Shard(1), WHOLE, WHOLE), SUM, (columns, Shard(1), SUM, SUM))
    batch = [
        Rule((Shard(i), *(WHOLE,) * 4), Shard(i), (Shard(i), SUM, SUM, SUM))
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
    rules: tuple[Rule, ...]
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
                    "see fused_lora.layouts for the placements"
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


def _rule(placed: dict[str, DTensor], dim: int) -> Rule:
    got = {name: tensor.placements[dim] for name, tensor in placed.items()}
    for rule in rules_of(placed["x"].ndim):
        wanted = dict(zip(NAMES, rule.arguments, strict=True))
        if all(placement == wanted[name] for name, placement in got.items()):
            return rule
    described = ", ".join(f"{name} {placement}" for name, placement in got.items())
    raise TypeError(
        f"x, weight, lora_A, lora_B: no layout of fused_lora.layouts has {described} on dimension "
        f"{dim} of {placed['x'].device_mesh}; wanted ColwiseParallel's (Replicate, Shard(0), "
        "Replicate, Shard(0)), RowwiseParallel's (Shard(-1), Shard(1), Shard(1), Replicate), or "
        "parameters that are Replicate with x Replicate or split along its batch"
    )
