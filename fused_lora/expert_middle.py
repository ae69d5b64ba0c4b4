"""What a mixture of experts has between its projections, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import torch_backend
from .expert_backends import Path
from .expert_combine import Passed, dots_of
from .gated import Activation


class Middle(NamedTuple):
    """What is between the projections: a = act(gate) o up of z = (gate, up), or any function."""

    known: Activation | None
    function: Callable[[Tensor], Tensor] | None = None

    def traced(self, z: Tensor) -> Tensor:
        """a, by operators that autograd records."""
        if self.known is None:
            assert self.function is not None
            return self.function(z)
        gate, up = z.chunk(2, dim=-1)
        return torch_backend.gated(gate, up, self.known)

    def forward(self, path: Path, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """a [M, K], and what to keep of it beside z."""
        if self.known is None:
            return self.traced(z), None
        gate, up = z.chunk(2, dim=-1)
        if path == "torch":
            acted = torch_backend.activated(gate, self.known)
            return acted * up, acted
        from .kernels.gated import gated

        return gated(gate, up, self.known), None

    def passed(
        self,
        path: Path,
        z: Tensor,
        acted: Tensor | None,
        da: Tensor,
        p_rows: Tensor,
        *,
        need_a: bool,
        need_dots: bool,
    ) -> Passed:
        """a once more, if it is needed, and what makes z's gradient; takes da's memory."""
        known = self.known
        if known is None:
            with torch.enable_grad():
                leaf = z.detach().requires_grad_()
                made = self.traced(leaf)
            dots = dots_of(da, made.detach()) if need_dots else None
            return Passed(
                made.detach(), dots, lambda: torch.autograd.grad(made, leaf, da.mul_(p_rows))[0]
            )
        gate, up = z.chunk(2, dim=-1)
        if path == "triton":
            from .kernels.gated import gated_backward

            dz = torch.empty_like(z)
            grads, scale = dz.chunk(2, dim=-1), p_rows.view(-1)
            options: Any = {"scale": scale, "keep_x": need_a, "dots": need_dots}
            dots = gated_backward(da, gate, up, known, *grads, **options)
            return Passed(da if need_a else None, dots, lambda: dz)
        assert acted is not None
        a = acted * up if need_a or need_dots else None
        dots = dots_of(da, a) if need_dots and a is not None else None

        def back() -> Tensor:
            dz = torch.empty_like(z)
            grads = dz.chunk(2, dim=-1)
            torch_backend.gated_backward(da.mul_(p_rows), gate, up, acted, known, *grads)
            return dz

        return Passed(a, dots, back)
