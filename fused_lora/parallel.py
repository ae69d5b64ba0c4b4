"""Tensor and sequence parallelism: `parallelize_module` styles of LoRA layers.

    parallelize_module(model, mesh, {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()})

The placements are those of layouts.py.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as torch_parallel

from .layouts import NAMES, Rule, rules_of
from .linear import FusedLoRALinear
from .multi_linear import FusedMultiLoRALinear
from .quantized_weight import QuantizedWeight
from .together import FusedLoRAGroup


def _distribute(
    style: ColwiseParallel | RowwiseParallel,
    layer: FusedLoRALinear,
    mesh: DeviceMesh,
    rule: Rule,
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
    if out_features does not divide by the number of ranks or the mesh has several dimensions,
    TypeError for a quantised weight, DoRA, several adapters or a group, RuntimeError if merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, FusedLoRALinear):
            return _distribute(self, module, device_mesh, rules_of(2)[1], "out_features")
        _refuse_modules(self, module)
        return super()._apply(module, device_mesh)


class RowwiseParallel(torch_parallel.RowwiseParallel):
    """torch's `RowwiseParallel` that takes a `FusedLoRALinear` too: splits in_features.

    Same arguments, and the same behaviour for `nn.Linear` and `nn.Embedding`. Raises ValueError
    if in_features does not divide by the number of ranks or the mesh has several dimensions,
    TypeError for a quantised weight, DoRA, several adapters or a group, RuntimeError if merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, FusedLoRALinear):
            self.desired_input_layouts = (Shard(-1),)
            return _distribute(self, module, device_mesh, rules_of(2)[2], "in_features")
        _refuse_modules(self, module)
        return super()._apply(module, device_mesh)
