"""Layers that share their input, together and one by one: `python -m benchmarks.groups`.

Whether a group pays: q, k, v and gate, up by `lora_linear_group`, the same layers by `lora_linear`
each, and their frozen layers alone; in turns, medians, and CPU time without waiting for the device.
Both are compared with each other before they are timed.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_lora import lora_linear, lora_linear_group
from fused_lora.dispatch import better_apart

from . import measure, rows
from .rows import Row
from .shapes import MODELS

RANK, SCALING = 16, 2.0
TOLERANCE = 2e-2  # of the norm, in 16-bit products


class Members:
    """Layers [N_i, K] with adapters, and their input x [M, K]."""

    def __init__(self, M: int, K: int, sides: Sequence[int], dropout_p: float, like: Tensor):
        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape, device=like.device) * shape[-1] ** -0.5).to(like.dtype)

        self.x = torch.randn(M, K, device=like.device).to(like.dtype).requires_grad_()
        self.weights = [normal(N, K) for N in sides]
        self.As = [normal(RANK, K).requires_grad_() for _ in sides]
        self.Bs = [normal(N, RANK).requires_grad_() for N in sides]
        self.gradients = [normal(M, N) for N in sides]
        self.dropout_p = dropout_p

    def group(self) -> Sequence[Tensor]:
        """All in one call."""
        ps = [self.dropout_p] * len(self.weights)
        adapters = self.As, self.Bs
        return lora_linear_group(self.x, self.weights, *adapters, scalings=SCALING, dropout_ps=ps)

    def apart(self) -> Sequence[Tensor]:
        """A call each."""
        return [
            lora_linear(self.x, W, A, B, scaling=SCALING, dropout_p=self.dropout_p)
            for W, A, B in zip(self.weights, self.As, self.Bs, strict=True)
        ]

    def linear(self) -> Sequence[Tensor]:
        """The frozen layers alone."""
        return [F.linear(self.x, W) for W in self.weights]

    def gradient(self, name: str) -> tuple[Tensor, ...]:
        """Forward and backward of one of the above."""
        trained = [self.x] if name == "linear" else [self.x, *self.As, *self.Bs]
        ys = getattr(self, name)()
        return torch.autograd.grad(ys, trained, self.gradients)

    def difference(self) -> float:
        """The largest between a group's results and those of layers apart, over their norms."""
        pairs = zip(
            (*self.group(), *self.gradient("group")),
            (*self.apart(), *self.gradient("apart")),
            strict=True,
        )
        return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def _measured(
    members: Members, seconds: float, names: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Medians in us by name, of every mode."""
    device = members.x.device
    forward: dict[str, measure.Call] = {name: getattr(members, name) for name in names}
    both: dict[str, measure.Call] = {name: partial(members.gradient, name) for name in names}
    for mode, calls, overhead in (
        ("forward", forward, False),
        ("forward+backward", both, False),
        ("overhead", both, True),
    ):
        times = measure.side_by_side(calls, device, seconds, overhead=overhead)
        yield mode, {name: statistics.median(samples) for name, samples in times.items()}


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if a group's results are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, help="whose q, k, v and gate, up")
    parser.add_argument("--rows", type=int, nargs="+", help="M")
    parser.add_argument("--seconds-a-mode", type=float, default=0.15)
    parser.add_argument("--out", type=Path, default=rows.RESULTS, help="folder for the rows")
    args = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    hidden, kv, intermediate = MODELS[args.model or ("llama-3.1-8b" if cuda else "smollm2-135m")]
    clock = "CUDA events" if cuda else measure.clock().__name__
    environment = rows.environment(device, clock, "")
    path = args.out / rows.file_name(environment).replace(".json", "-groups.csv")
    print(f"q,k,v and gate,up, r {RANK}, bf16, on {environment['device']} -> {path}")
    found: list[Row] = []
    failed = False
    for M in args.rows or ((8192, 2048, 512) if cuda else (512,)):
        for layers, sides in (("q,k,v", (hidden, kv, kv)), ("gate,up", (intermediate,) * 2)):
            for dropout_p in (0.0, 0.1):
                case = f"{layers} M {M} K {hidden} dropout {dropout_p:g}"
                if better_apart(like.new_empty(M, 1), dropout_p > 0, "auto"):
                    print(f"{case}: run apart anyway")
                    continue
                members = Members(M, hidden, sides, dropout_p, like)
                # Each member's mask has a seed of its own, and layers apart draw others.
                error = 0.0 if dropout_p else members.difference()
                if not error < TOLERANCE:
                    print(f"{case}: wrong by {error:.1e} of the norm")
                    failed = True
                    continue
                names = ("group", "apart", "linear")
                for mode, medians in _measured(members, args.seconds_a_mode, names):
                    sizes = {"layers": layers, "M": M, "K": hidden, "dropout": dropout_p}
                    found.append(sizes | {"mode": mode} | medians | environment)
                    ratio = medians["apart"] / medians["group"]
                    times = "  ".join(f"{name} {us:8.1f} us" for name, us in medians.items())
                    print(f"{case} {mode:16} {times}  {ratio:.3f}x", flush=True)
    if found:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, found[0])
            table.writeheader()
            table.writerows(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
