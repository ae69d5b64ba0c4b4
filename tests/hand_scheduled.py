"""Calls of the hand-scheduled kernel, with their exact results."""

import torch

from fused_lora.kernels.configs import tunable
from fused_lora.kernels.device import SHARED_MEMORY, DeviceInfo
from fused_lora.kernels.gemm import ColumnScale
from fused_lora.kernels.specialized import (
    specialized_add_lora,
    specialized_group,
    specialized_plain,
    specialized_produced,
)

H100 = DeviceInfo(90, 132, SHARED_MEMORY[90], name="NVIDIA H100")
TOLERANCE = 2e-3  # of the result's norm: a few roundings


class Operands:
    """Random operands, laid out as the forward reads them or as the input gradient does."""

    def __init__(self, m, n, k, r, *, transposed, device="cpu", dtype=torch.float16):
        def normal(rows, columns, dtype=dtype):
            shape = (columns, rows) if transposed else (rows, columns)
            t = (torch.randn(*shape) * rows**-0.5).to(device, dtype)
            return t.t() if transposed else t

        self.x = torch.randn(m, k + 8 + -k % 8).to(device, dtype)[:, :k]  # rows apart
        self.w = normal(k + -k % 8, n)[:k]
        self.a, self.b = normal(k, r, torch.float32), normal(r, n)
        self.bias = torch.randn(n).to(device)

    def run(self, form, config):
        """The form's results, each with its exact value."""
        x, w, a, b, bias = (t.double() for t in (self.x, self.w, self.a, self.b, self.bias))
        if form == "plain":
            return [(specialized_plain(config, self.x, self.w), x @ w)]
        h = 0.5 * x @ a
        if form == "second":
            given = h.to(self.x.dtype)
            y = specialized_add_lora(config, self.x, self.w, given, self.b, bias=self.bias)
            return [(y, x @ w + given.double() @ b + bias)]
        if form == "dora":
            given, scale = h.to(self.x.dtype), self.bias.float().abs() + 0.5
            dora = ColumnScale(scale, self.x.new_empty(len(x), len(bias)))
            options = {"bias": self.bias, "dora": dora}
            y = specialized_add_lora(config, self.x, self.w, given, self.b, **options)
            z = x @ w + given.double() @ b
            return [(dora.z, z), (y, z * scale.double() + bias)]
        y, made = specialized_produced(
            config, self.x, self.w, self.a, self.b, bias=self.bias, scale=0.5
        )
        return [(made, h), (y, x @ w + made.double() @ b + bias)]

    def check(self, form, config, tolerance=TOLERANCE):
        for got, exact in self.run(form, config):
            error = ((got.double() - exact).norm() / exact.norm()).item()
            assert error < tolerance, error


def check_sum(config, m, n, Ks, *, adapters, tolerance=TOLERANCE, **kwargs):
    """sum_i x_i w_i of members of these K, with h b of rank 24 or without."""
    members = [Operands(m, n, k, 24, **kwargs) for k in Ks]
    xs, ws, b = [o.x for o in members], [o.w for o in members], members[0].b
    h = torch.randn(m, 24).to(b.device, b.dtype)
    exact = sum(x.double() @ w.double() for x, w in zip(xs, ws, strict=True))
    if adapters:
        exact += h.double() @ b.double()
    got = specialized_group(config, xs, ws, *((h, b) if adapters else (None, None)))
    error = ((got.double() - exact).norm() / exact.norm()).item()
    assert error < tolerance, error


def all_tiles():
    """All that a table may choose, the default ones first."""
    return tunable("ws_second", 16, 2, False, H100)
