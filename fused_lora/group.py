"""Layers that share their input (q, k, v; gate, up): one call, one node of the graph, one dx."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import backends, checks
from .arguments import Arguments
from .autocast import autocast
from .autograd import Codes, as_saved, bias_gradient, check_first_derivative, to_save
from .calls import Backend, Call, as_products, checked_call
from .dispatch import Decision, Plan, better_apart, group_dx, plan, replays_of, why_torch
from .explanation import Explanation, describe_quantized
from .functional import call_layer
from .group_ops import dropouts_of, lora_linear_group_op, plans_of_all
from .kernels.configs import MAX_GROUP
from .kernels.dropout import dropout_threshold
from .observed import fold_scaling, is_observed, is_recorded
from .packing import pack
from .quantized_weight import Weight
from .recall import recall, remember
from .seeds import draw_seeds
from .strategies import runs_as

if TYPE_CHECKING:
    from .kernels.replay import Replays


class LoRALinearGroupFunction(torch.autograd.Function):
    """y_i = x W0_i^T + bias_i + scaling_i * (D_i o x) A_i^T B_i^T for every member i of a group.

    As `LoRALinearFunction`; what is saved: x once, the h_i side by side, the weights, the seeds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scalings: Sequence[float],
        seeds: Tensor | None,
        thresholds: Sequence[int],
        plans: Sequence[Plan],
        replays: Replays | None,
        *tensors: Weight | None,
    ) -> tuple[Tensor, ...]:
        """``tensors``: every weight, then every lora_A, every lora_B, every bias (or None).

        ``seeds``: int64 [members] on x's device, and ``thresholds`` make the dropout masks.
        """
        n = len(scalings)
        weights, As, Bs, biases = _in_four(tensors, n)
        dropouts = dropouts_of(seeds, thresholds)
        ys, h = backends.forward_group(
            x, weights, As, Bs, biases, scalings, dropouts, plans, replays
        )
        needs_x, needs_A, needs_B = _needs(ctx, n)[:3]
        ctx.save_for_backward(
            x if any(needs_A) else None,
            h if any(needs_B) else None,
            seeds if needs_x or any(needs_A) else None,
            *(to_save(W) if needs_x else None for W in weights),
            *As,
            *Bs,
        )
        ctx.quantized = [Codes.of(W) if needs_x else None for W in weights]
        ctx.set_materialize_grads(False)
        ctx.scalings, ctx.thresholds, ctx.plans, ctx.replays = scalings, thresholds, plans, replays
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients in the order of forward's arguments."""
        check_first_derivative("lora_linear_group", "lora_linear")
        n = len(ctx.scalings)
        x, h, seeds, *tensors = ctx.saved_tensors
        weights, As, Bs, _ = _in_four([*tensors, *[None] * n], n)
        needs_x, needs_A, needs_B, needs_bias = _needs(ctx, n)
        # A member whose output nobody used takes no part.
        live = [i for i in range(n) if grads[i] is not None]
        dropouts = dropouts_of(seeds, ctx.thresholds)
        hs = [None] * n if h is None else h.split_with_sizes([len(A) for A in As], dim=1)
        dAs: list[Tensor | None] = [None] * n
        dBs: list[Tensor | None] = [None] * n
        dx = None
        if live:
            dx, live_dAs, live_dBs = backends.backward_group(
                [grads[i] for i in live],  # type: ignore[misc]  # they are tensors
                x if any(needs_A[i] for i in live) else None,
                [as_saved(weights[i], ctx.quantized[i]) for i in live],
                [As[i] for i in live],
                [Bs[i] for i in live],
                [hs[i] if needs_B[i] else None for i in live],
                [ctx.scalings[i] for i in live],
                [dropouts[i] for i in live],
                [ctx.plans[i] for i in live],
                need_dx=needs_x,
                replays=ctx.replays if len(live) == n else None,
            )
            for i, dA, dB in zip(live, live_dAs, live_dBs, strict=True):
                dAs[i], dBs[i] = dA if needs_A[i] else None, dB
        dbiases = map(bias_gradient, grads, needs_bias)
        return dx, *[None] * (5 + n), *dAs, *dBs, *dbiases


def _in_four(tensors: Sequence[Any], n: int) -> Iterator[list[Any]]:
    return (list(tensors[i * n : (i + 1) * n]) for i in range(4))


def _needs(ctx: Any, n: int) -> tuple[bool, list[bool], list[bool], list[bool]]:
    _, As, Bs, biases = _in_four(ctx.needs_input_grad[6:], n)
    return ctx.needs_input_grad[0], As, Bs, biases


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    *,
    scalings: float | Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    dropout_ps: Sequence[float] | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, ...]:
    """y_i = x W0_i^T + bias_i + scaling_i * (D_i o x) A_i^T B_i^T, as by `lora_linear` for each.

    What it saves over n calls of `lora_linear`: the A's are one matrix, so that one launch reads x
    for all h_i, and one for all dA_i; dx = sum_i g_i W0_i + D_i o (dh_i A_i) is accumulated in one
    launch and written once, where n calls write n gradients that are read again to be added
    (3 (n - 1) passes over x's size). The base products x W0_i^T remain a launch each: one for all
    would save n - 1 launches (about 4 us each, hidden behind the running ones where M is large)
    and cost a second kernel. In all n + 2 launches forward (one is the concatenation of the A's)
    instead of up to 2 n.

    Dropout gives each member its own mask, that is its own D_i o x, and different scalings a
    factor of its own: h_i is then made in a launch a member; with dropout dA_i too. dx stays one.

    Members may be quantised, in any formats beside each other. The base products turn their codes
    into values in the K loop or in a scratch tensor that goes before the next one is made. On the
    kernels' path dx, being one launch, has the scratches of all quantised members at a time; on
    PyTorch's there is never more than a tile.

    Args:
        x: input [..., K], shared.
        weights, lora_As, lora_Bs: each member's, as for `lora_linear`; N_i and r_i may differ.
        scalings: one for each member, or one number for all.
        biases, dropout_ps: one for each member; none by default.
        backend: as for `lora_linear`. More than 3 members run as several groups.

    Returns:
        The y_i [..., N_i] in x's dtype.

    Raises what `lora_linear` does, with the number of the member; TypeError for what is no list,
    ValueError if there is no member, or not the same number of everything.

    Under torch.func's transforms, dispatch modes, for tensor subclasses such as DTensor, for up to
    64 rows, and on a CPU with dropout or up to 2^17 elements of x in fp32, 2^16 in 16 bits, each
    member is a call of its own.

    The members are one node of the graph: a backward pass through one output alone frees what the
    others need too, unless it is told to retain the graph.
    """
    lists = (weights, lora_As, lora_Bs, scalings, biases, dropout_ps)
    return call_group(x, _members(*lists, backend))


def call_group(x: Tensor, members: Sequence[Arguments]) -> tuple[Tensor, ...]:
    """`lora_linear_group` of what layers of one backend pass on."""
    if not is_observed():
        known: _Decision | None = recall("lora_linear_group", x, members)
        if known is not None:
            return _run(known, x, members)
    if _special((x, *(part for member in members for part in member[:3]))):
        return _apart(x, members)
    if torch.compiler.is_compiling():
        return _traced(x, members)
    x_cast, cast, calls, plans = _checked(x, members)
    apart = any(better_apart(x_cast, member) for member in cast)
    decision = _Decision(apart, plans)
    own = x_cast is x and all(
        ours.weight is given.weight and ours.bias is given.bias
        for ours, given in zip(cast, members, strict=True)
    )
    if own and all(call.plain_tensors for call in calls):
        replays = {} if decision.apart else _replays(x, members, calls, plans)
        known = decision._replace(replays=replays)
        remember(known, "lora_linear_group", x, members)
    return _run(decision, x_cast, cast)


def _replays(
    x: Tensor, members: Sequence[Arguments], calls: Sequence[Call], plans: Sequence[Plan]
) -> dict[int, Replays | None]:
    """By the first member of each group."""
    # A replay has all of its memory at a time, and a group one scratch of a W0 after another.
    if any(call.quantized for call in calls):
        return {}
    layers = [
        Decision(call, chosen, float(member.scaling), dropout_threshold(member.dropout_p))
        for call, chosen, member in zip(calls, plans, members, strict=True)
    ]
    starts = range(0, len(layers), MAX_GROUP)
    return {i: replays_of(x.shape, *layers[i : i + MAX_GROUP]) for i in starts}


class _Decision(NamedTuple):
    """All that there is to know of a group's call before it runs."""

    apart: bool
    plans: tuple[Plan, ...]
    replays: Mapping[int, Replays | None] = {}  # by the first member of each group


def _run(decision: _Decision, x: Tensor, members: Sequence[Arguments]) -> tuple[Tensor, ...]:
    """x and members as autocast would have them."""
    if decision.apart:
        return _apart(x, members)
    ys: tuple[Tensor, ...] = ()
    for first in range(0, len(members), MAX_GROUP):
        part = members[first : first + MAX_GROUP]
        weights, As, Bs, scalings, biases, ps, _ = map(list, zip(*part, strict=True))
        scalings, thresholds = [*map(float, scalings)], [*map(dropout_threshold, ps)]
        backend = members[0].backend
        seeds = draw_seeds(len(part), x.device, backend) if any(thresholds) else None
        plans, replays = decision.plans[first : first + MAX_GROUP], decision.replays.get(first)
        if is_recorded():
            ys += LoRALinearGroupFunction.apply(
                x, scalings, seeds, thresholds, plans, replays, *weights, *As, *Bs, *biases
            )
        else:
            dropouts = dropouts_of(seeds, thresholds)
            arguments = (x, weights, As, Bs, biases, scalings, dropouts, plans, replays)
            ys += tuple(backends.forward_group(*arguments)[0])
    return ys


def _apart(x: Tensor, members: Sequence[Arguments]) -> tuple[Tensor, ...]:
    return tuple(call_layer(x, member) for member in members)


def _is_list(values: Any) -> bool:
    return hasattr(values, "__len__") and not isinstance(values, Tensor | str)


def _members(
    weights: Sequence[Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: float | Sequence[float],
    biases: Sequence[Tensor | None] | None,
    dropout_ps: Sequence[float] | None,
    backend: Backend,
) -> list[Arguments]:
    n = len(weights) if _is_list(weights) else 0
    lists: dict[str, Any] = {
        "weights": weights,
        "lora_As": lora_As,
        "lora_Bs": lora_Bs,
        "scalings": scalings if _is_list(scalings) else [scalings] * n,
        "biases": [None] * n if biases is None else biases,
        "dropout_ps": [0.0] * n if dropout_ps is None else dropout_ps,
    }
    for name, values in lists.items():
        if not _is_list(values):
            raise TypeError(f"{name}: got {type(values).__name__}, wanted a list of one a member")
        if len(values) != n:
            raise ValueError(f"{name}: got {len(values)}, wanted {n}, one for each of weights")
    if n == 0:
        raise ValueError("weights: got none, wanted at least one member")
    rows = zip(*lists.values(), strict=True)
    return [Arguments(W, A, B, s, bias, p, backend) for W, A, B, s, bias, p in rows]


def _checked(
    x: Tensor, members: Sequence[Arguments]
) -> tuple[Tensor, list[Arguments], list[Call], tuple[Plan, ...]]:
    """x and the members as autocast would have them, each one's call, and the decision for all."""
    cast: list[Arguments] = []
    calls: list[Call] = []
    plans: list[Plan] = []
    x_cast = x
    for i, member in enumerate(members):
        try:
            backend = member.backend
            checks.check_options(member.weight, member.scaling, member.dropout_p, backend)
            x_cast, W, bias = autocast(x_cast, member.weight, member.bias)
            dropout = dropout_threshold(member.dropout_p) > 0
            calls.append(checked_call(x_cast, W, member.lora_A, member.lora_B, bias, dropout))
            plans.append(plan(calls[-1], backend, "part"))
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"member {i}: {error}") from None
        cast.append(member._replace(weight=W, bias=bias))
    return x_cast, cast, calls, plans_of_all(plans)


def explain_group(
    x: Tensor,
    weights: Sequence[Weight],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    *,
    scalings: float | Sequence[float] = 1.0,
    biases: Sequence[Tensor | None] | None = None,
    dropout_ps: Sequence[float] | None = None,
    backend: Backend = "auto",
) -> Explanation:
    """Which backend and strategy `lora_linear_group` takes for these arguments, and why.

    Takes and raises what it does; computes nothing.
    """
    lists = (weights, lora_As, lora_Bs, scalings, biases, dropout_ps)
    return explain_members(x, _members(*lists, backend))


def explain_members(x: Tensor, members: Sequence[Arguments]) -> Explanation:
    """`explain_group` of what layers of one backend pass on."""
    backend = members[0].backend
    x, cast, calls, plans = _checked(x, members)
    on_kernels = plans[0].backend == "triton"
    way: str = "library"
    strategies = [plan.strategy for plan in plans]
    reasons: dict[str, str] = {}
    if on_kernels:
        reasons["torch"] = "not taken: the kernels take every member"
        gs = [torch.empty((c.M, c.N), dtype=c.dtype, device="meta") for c in calls]
        way = group_dx(plans, gs, [member.weight for member in cast], x.device)
        for i, (member, call) in enumerate(zip(cast, calls, strict=True)):
            of_y, _ = as_products((x, *member[:3]), call.dtype)
            strategies[i], _ = runs_as(strategies[i], None, *of_y)
    else:
        for i, call in enumerate(calls):
            if (why := why_torch(call, backend)) is not None:
                reasons["triton"] = f"not taken: {why} (member {i})"
                break
    if any(better_apart(x, member) for member in cast):
        reasons["group"] = "not taken: few rows, and on a CPU dropout, are faster each on its own"
    else:
        reasons |= _describe(cast, calls, on_kernels, way)
    for i, call in enumerate(calls):
        if call.quantized is not None:
            how = describe_quantized(call, plans[i].backend, plans[i].strategy == "in_loop")
            reasons[f"quantised W0 of member {i}"] = how
    forward = ", ".join(dict.fromkeys(strategies))
    return Explanation(plans[0].backend, forward, way, reasons)


def _describe(
    members: Sequence[Arguments], calls: Sequence[Call], on_kernels: bool, way: str
) -> dict[str, str]:
    """What a group does at once."""
    h = "one product for all members: x is read once"
    if any(call.dropout for call in calls):
        h = "a product for each member: dropout gives each a mask of its own"
    elif on_kernels and len({member.scaling for member in members}) > 1:
        h = "a product for each member: their scalings differ"
    dx = "one tensor, each member added to it in place"
    if way != "library":
        dx = f"one launch for {min(len(calls), MAX_GROUP)} members"
        if any(call.quantized for call in calls):
            dx += ", with the values of all that are quantised in scratch tensors"
        if way == "ws_split" and any(call.dropout for call in calls):
            dx += ", and one for every member's h B, with its mask"
    return {"h": h, "dx": dx}


def _special(tensors: Sequence[Any]) -> bool:
    """Whether `lora_linear` has ways of its own: torch.func, dispatch modes, tensor subclasses."""
    return (
        torch._C._are_functorch_transforms_active()
        or (not torch.compiler.is_compiling() and _get_current_dispatch_mode() is not None)
        or any(isinstance(t, Tensor) and type(t) not in (Tensor, nn.Parameter) for t in tensors)
    )


def _traced(x: Tensor, members: Sequence[Arguments]) -> tuple[Tensor, ...]:
    """By the registered operator, as `lora_linear` does it."""
    cast = []
    backend = members[0].backend
    for W, A, B, s, bias, p, _ in members:
        checks.check_options(W, s, p, backend)
        x, W, bias = autocast(x, W, bias)
        checks.check_tensors(x, W, A, B, bias)
        B, s = fold_scaling(B, s)
        cast.append((W, A, B, x.new_empty(0) if bias is None else bias, s, dropout_threshold(p)))
    ys: list[Tensor] = []
    for first in range(0, len(cast), MAX_GROUP):
        weights, As, Bs, biases, scalings, thresholds = (
            list(kind) for kind in zip(*cast[first : first + MAX_GROUP], strict=True)
        )
        seeds = draw_seeds(len(thresholds), x.device, backend) if any(thresholds) else None
        need_h = torch.is_grad_enabled() and any([B.requires_grad for B in Bs])
        rest = (*pack(*weights), scalings, seeds, thresholds, backend, need_h)
        ys += lora_linear_group_op(x, As, Bs, biases, *rest)[:-1]
    return tuple(ys)
