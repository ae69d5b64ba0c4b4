"""A whole mixture of experts, as transformers has it: tokens to experts and back.

    z = x W_up^T (+ adapter), a = act(z), o = a W_down^T (+ adapter), y[t] = sum_j p[t, j] o[t, j]

transformers keeps all experts of a layer in one module: ``gate_up_proj`` (or ``up_proj``) and
``down_proj``, each [E, out, in], or [E, in, out] where ``is_transposed`` says so. What the module's
class computes is one function whichever of transformers' implementations runs it, and so is this.

z and a are in the experts' order, x, o and y in the tokens', and nothing is moved in between. Of a
row of the order z alone is kept for the backward (on PyTorch's path act(gate) too): a is made
again, and the gradient of p[t, j], <g[t], o[t, j]>, is <da, a> with da the gradient of a for p = 1,
which needs no o (SonicMoE, https://arxiv.org/abs/2512.14080). p counts where it is smallest: in h,
dh and da.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, torch_backend
from .autocast import autocast, autocast_enabled, no_autocast
from .autograd import alias, raise_second_derivative
from .backends import as_gradient
from .calls import Backend, are_plain
from .expert_backends import Experts, Path, grad_A, grad_B, project, project_back
from .experts import Routing, decided, explain_experts, routing_of
from .explanation import Explanation
from .functional import is_recorded
from .gated import Activation
from .gated_mlp import activation_of
from .products import WITHOUT_INSTRUCTIONS, mm


class ExpertAdapter(NamedTuple):
    """Of one projection: A [E, r, in], B [E, out, r], any strides."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    @classmethod
    def of(cls, A: Tensor, B: Tensor, num_experts: int, scaling: float) -> ExpertAdapter:
        """Of PEFT's A [E r, in], expert after expert, and B [out, r E], rank after rank: views."""
        of_A = A.view(num_experts, -1, A.shape[1])
        of_B = B.view(len(B), -1, num_experts).permute(2, 0, 1)
        return cls(of_A, of_B, scaling)


class Middle(NamedTuple):
    """What is between the projections: a = act(gate) o up of z = (gate, up), or any function."""

    known: Activation | None
    function: Callable[[Tensor], Tensor] | None = None  # where it is not known

    def forward(self, path: Path, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """a [M, K], and what to keep of it beside z."""
        if self.known is None:
            assert self.function is not None
            return self.function(z), None
        gate, up = z.chunk(2, dim=-1)
        if path == "torch":
            acted = torch_backend.activated(gate, self.known)
            return acted * up, acted
        from .kernels.gated import gated

        return gated(gate, up, self.known), None

    def again(
        self, path: Path, z: Tensor, acted: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """a once more, and what makes z's gradient of a's, whose memory it may take."""
        if self.known is None:
            assert self.function is not None
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                a = self.function(leaf)
            return a.detach(), lambda da: torch.autograd.grad(a, leaf, da)[0]
        known = self.known
        gate, up = z.chunk(2, dim=-1)

        def backward(da: Tensor) -> Tensor:
            dz = torch.empty_like(z)
            dgate, dup = dz.chunk(2, dim=-1)
            if acted is not None:
                torch_backend.gated_backward(da, gate, up, acted, known, dgate, dup)
            else:
                from .kernels.gated import gated_backward

                gated_backward(da, gate, up, known, dgate, dup)
            return dz

        if acted is not None:
            return acted * up, backward
        return self.forward(path, z)[0], backward


class ExpertsMLP(NamedTuple):
    """All of a call but its tensors."""

    path: Path
    routing: Routing
    middle: Middle
    scaling_up: float
    scaling_down: float

    def layers(
        self,
        up: Tensor,
        down: Tensor,
        up_A: Tensor | None,
        up_B: Tensor | None,
        down_A: Tensor | None,
        down_B: Tensor | None,
    ) -> tuple[Experts, Experts]:
        """The two projections."""
        rows, k = self.routing.groups, self.routing.shape[-1]
        return (
            Experts(up, up_A, up_B, self.scaling_up, None, rows, fan=k, scatters=False),
            Experts(down, down_A, down_B, self.scaling_down, None, rows, gathers=False, fan_g=k),
        )


class LoRAExpertsMLPFunction(torch.autograd.Function):
    """x [T, hidden] and p [T, k] -> y [T, hidden]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        p: Tensor,
        up: Tensor,
        down: Tensor,
        up_A: Tensor | None,
        up_B: Tensor | None,
        down_A: Tensor | None,
        down_B: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        call: ExpertsMLP,
    ) -> Tensor:
        """The weights [E, out, in], the adapters as `ExpertAdapter` has them, biases [E, out]."""
        needs = ctx.needs_input_grad
        layers = call.layers(up, down, up_A, up_B, down_A, down_B)
        y, z, acted, h_up, h_down = _forward(x, p, *layers, up_bias, down_bias, call)
        ctx.save_for_backward(
            x if needs[4] else None,
            p,
            alias(up),
            alias(down),
            *(None if t is None else alias(t) for t in (up_A, up_B, down_A, down_B)),
            down_bias if needs[1] else None,
            z,
            acted,
            h_up if needs[5] else None,
            h_down if needs[7] else None,
        )
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        if torch.is_grad_enabled():
            raise_second_derivative("a fused mixture of experts")
        x, p, *weights, down_bias, z, acted, h_up, h_down = ctx.saved_tensors
        needs_x, needs_p, _, _, needs_up_A, needs_up_B, needs_down_A, _ = ctx.needs_input_grad[:8]
        call = ctx.call
        path, rows = call.path, call.routing.groups
        up, down = call.layers(*weights)
        g = as_gradient(g, path)
        dp = dx = dA_up = dB_up = dA_down = dB_down = None
        with no_autocast(g):
            order = rows.order
            weights_p = p.flatten().index_select(0, order)[:, None]
            a, middle_backward = call.middle.again(path, z, acted)
            needs_dz = needs_x or needs_up_A or needs_up_B
            da, dh = project_back(path, g, down, need_dx=needs_dz or needs_p, need_dh=needs_down_A)
            if needs_p and da is not None:
                dp = torch.empty_like(p.flatten()).index_copy_(0, order.long(), _dots(da, a, p))
                dp = dp.view_as(p)
                if down_bias is not None:
                    dp += _of_bias(g, down_bias, call.routing, p)
            if needs_down_A and dh is not None:
                dA_down = grad_A(path, a, dh.mul_(weights_p), down)
            del a, dh
            if h_down is not None:
                dB_down = grad_B(path, g, (h_down * weights_p).to(g.dtype), down)
            if needs_dz and da is not None:
                dz = middle_backward(da.mul_(weights_p))
                del da
                dx, dh = project_back(path, dz, up, need_dx=needs_x, need_dh=needs_up_A)
                if needs_up_A and dh is not None:
                    dA_up = grad_A(path, x, dh, up)
                if h_up is not None:
                    dB_up = grad_B(path, dz, h_up, up)
        return dx, dp, None, None, dA_up, dB_up, dA_down, dB_down, None, None, None


def _forward(
    x: Tensor,
    p: Tensor,
    up: Experts,
    down: Experts,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    call: ExpertsMLP,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, z, what the middle keeps, and h of both projections."""
    with no_autocast(x):
        z, h_up = project(call.path, x, up, up_bias)
        a, acted = call.middle.forward(call.path, z)
        out, h_down = project(call.path, a, down, down_bias)
        return combined(out.view(*p.shape, out.shape[1]), p), z, acted, h_up, h_down


def _slow_in(t: Tensor) -> bool:
    """Whether a CPU multiplies t's matrices element by element."""
    return t.dtype in WITHOUT_INSTRUCTIONS and t.device.type == "cpu"


def combined(out: Tensor, p: Tensor) -> Tensor:
    """sum_j p[t, j] * out[t, j], [T, N] of out [T, k, N], in its dtype."""
    if p.dtype != out.dtype or _slow_in(out):
        return (out * p[..., None]).sum(1).to(out.dtype)
    return torch.bmm(p[:, None], out)[:, 0]


def _dots(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Of each row of a and b [M, K], in fp32 or by it, in like's dtype."""
    if _slow_in(a):
        return (a * b).sum(1, dtype=torch.float32).to(like.dtype)
    return torch.bmm(a[:, None], b[:, :, None])[:, 0, 0].to(like.dtype)


def _of_bias(g: Tensor, bias: Tensor, routing: Routing, p: Tensor) -> Tensor:
    """<g[t], bias of (t, j)'s expert> [T, k], by the products with all of them."""
    of_all = mm(g, bias.t()).to(p.dtype)  # [T, E]
    of_none = of_all.new_zeros((len(g), 1))
    index = routing.experts.view_as(p) % (len(bias) + 1)  # -1, no expert, is the last
    return torch.cat((of_all, of_none), dim=1).gather(1, index.long())


def projections(experts: Any) -> tuple[str, str]:
    """The names of a module's two."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def obstacle(experts: Any) -> str | None:
    """Why a module is no such mixture, or has a part that nobody would hear of; None if it is."""
    name = type(experts).__name__
    if not all(hasattr(experts, flag) for flag in ("_is_expert_parallel", "has_gate", "has_bias")):
        return f"{name} is not of transformers' experts interface"
    if experts.has_post_expert_norm:
        return f"{name} has a norm after each expert"
    act = getattr(experts, "act_fn", None)
    if isinstance(act, nn.Module) and (checks.is_hooked(act) or any(act.parameters())):
        return f"the activation of {name} has hooks or parameters"
    return None


def _middle(experts: Any) -> Middle:
    if not experts.has_gate:
        return Middle(None, experts.act_fn)
    gate = experts._apply_gate
    usual = getattr(gate, "__func__", None) is _usual_gate()
    return Middle(activation_of(experts.act_fn) if usual else None, gate)


@functools.cache
def _usual_gate() -> object:
    """transformers' act(gate) o up of (gate, up)."""
    from transformers.integrations import moe

    return moe._default_apply_gate


class Projection(NamedTuple):
    """Of all experts."""

    weight: Tensor  # [E, out, in]
    bias: Tensor | None  # [E, out]
    adapter: ExpertAdapter | None


def run_experts(
    experts: Any,
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    adapters: Mapping[str, ExpertAdapter],
    backend: Backend = "auto",
) -> Tensor:
    """What ``experts(x, top_k_index, top_k_weights)`` is with ``adapters``, by projections' names.

    x [T, hidden], top_k_index and top_k_weights [T, k].
    """
    first, last = (
        Projection(*_frozen(experts, name), adapters.get(name)) for name in projections(experts)
    )
    return run_projections(x, top_k_index, top_k_weights, first, last, _middle(experts), backend)


def run_projections(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    first: Projection,
    last: Projection,
    middle: Middle,
    backend: Backend = "auto",
) -> Tensor:
    """`run_experts` of the parts of a module, which may be anybody's."""
    cast, up, up_bias = autocast(x, first.weight, first.bias)
    _, down, down_bias = autocast(x, last.weight, last.bias)
    up_A, up_B, scaling_up = first.adapter or (None, None, 1.0)
    down_A, down_B, scaling_down = last.adapter or (None, None, 1.0)
    indexed = top_k_index.shape
    checked = decided(cast, up, up_A, up_B, indexed, scaling_up, up_bias, 0.0, backend)
    a = cast.new_empty(1).expand(*indexed, down.shape[2])  # like it
    decided(a, down, down_A, down_B, indexed, scaling_down, down_bias, 0.0, backend)
    routing = routing_of(top_k_index, len(up))
    call = ExpertsMLP(checked.path, routing, middle, scaling_up, scaling_down)
    adapted = (up_A, up_B, down_A, down_B)
    y: Tensor
    if is_recorded():
        apply: Any = LoRAExpertsMLPFunction.apply
        y = apply(cast, top_k_weights, up, down, *adapted, up_bias, down_bias, call)
    else:
        layers = call.layers(up, down, *adapted)
        y = _forward(cast, top_k_weights, *layers, up_bias, down_bias, call)[0]
    return y.to(x.dtype)


def weight_of(experts: Any, name: str) -> Tensor:
    """The weights [E, out, in] of a projection, a view."""
    weight: Tensor = getattr(experts, name)
    return weight.mT if experts.is_transposed else weight


def _frozen(experts: Any, name: str) -> tuple[Tensor, Tensor | None]:
    bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
    return weight_of(experts, name), bias


def routed(*args: Any, **kwargs: Any) -> tuple[Any, Any] | None:
    """A router's choice among the arguments beside x; None if there are others."""
    given = {**dict(zip(("top_k_index", "top_k_weights"), args, strict=False)), **kwargs}
    if len(args) > 2 or given.keys() != {"top_k_index", "top_k_weights"}:
        return None
    return given["top_k_index"], given["top_k_weights"]


def misfit(experts: Any, x: Any, index: Any, weights: Any) -> str | None:
    """Why these are not what `run_experts` takes; None if they are."""
    if not all(isinstance(t, Tensor) and are_plain(t) for t in (x, index, weights)):
        return "an argument is not a plain tensor"
    if x.ndim != 2 or index.ndim != 2 or index.shape != weights.shape or len(x) != len(index):
        got = ", ".join(str(list(t.shape)) for t in (x, index, weights))
        return f"x, top_k_index, top_k_weights: got {got}, wanted [T, hidden], [T, k] and [T, k]"
    if index.dtype != torch.int64 or index.device != x.device or index.shape[1] == 0:
        return f"top_k_index: got {index.dtype} on {index.device}, wanted int64 on x's device"
    weight: Any = experts.down_proj
    if not are_plain(weight):
        return f"the experts' weights are {type(weight).__name__}s"
    if x.device != weight.device or x.dtype not in checks.DTYPES:
        return f"x: got {x.dtype} on {x.device}, the experts are on {weight.device}"
    if x.dtype != weight.dtype and not autocast_enabled(x):
        return f"x: got {x.dtype}, wanted the experts' dtype, {weight.dtype}"
    return None


def explain_experts_module(
    experts: Any,
    x: Tensor,
    top_k_index: Tensor,
    adapters: Mapping[str, ExpertAdapter],
    backend: Backend,
) -> Explanation:
    """How `run_experts` computes the projection that x goes to."""
    name, _ = projections(experts)
    weight, bias = _frozen(experts, name)
    A, B, scaling = adapters.get(name) or (None, None, 1.0)
    options: Any = {"scaling": scaling, "bias": bias, "backend": backend}
    return explain_experts(x, weight, A, B, expert_indices=top_k_index, **options)
