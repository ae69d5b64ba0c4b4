"""Initial values of adapters: PEFT's `init_lora_weights`, the same numbers from the same seed.

    True          A Kaiming-uniform, B = 0 (as the LoRA authors' code)
    False         A and B as `nn.Linear`'s own weights: y does not start at W0 x
    "gaussian"    A ~ N(0, 1/r^2), B = 0 (the LoRA paper)
    "orthogonal"  A and B in orthogonal subspaces: neither is 0, and B A is
    "pissa"       A, B = the r principal components of W0 (https://arxiv.org/abs/2404.02948)
    "pissa_niter_N"   the same by a randomised SVD with N iterations, which is much faster
    "olora"       A, B = the first rows of R and columns of Q, W0 = Q R
                  (https://arxiv.org/abs/2406.01775)
    "loftq"       A, B = the r principal components of W0 - Q(W0), the error of quantised codes
                  (https://arxiv.org/abs/2310.08659)
    "loftq_niter_N"  the same in N turns, each with the codes of W0 - scaling * B A

The last five leave the residual W0 - scaling * B A for the base weight, over a quantised one in its
own format (QPiSSA): W0 is the weight before it was quantised, or what its codes stand for. "loftq"
needs the former. Its scaling * B A is the error's best approximation; PEFT leaves the scaling out.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .quantize import quantize_like
from .quantized_weight import QuantizedWeight, Weight

_RESIDUAL = re.compile(r"pissa|pissa_niter_\d+|olora|loftq|loftq_niter_[1-9]\d*")
_NAMES = '"gaussian", "orthogonal", "pissa", "pissa_niter_<N>", "olora", "loftq"'


class Initial(NamedTuple):
    """Values for a layer that is about to be trained."""

    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    # [N, K]: the residual, new storage; None if the base weight stays
    weight: Weight | None


def scaling_of(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """What B A x is multiplied by: lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA."""
    return float(lora_alpha) / (math.sqrt(r) if use_rslora else r)


def adapter_dtype_over(dtype: torch.dtype) -> torch.dtype:
    """PEFT's, of adapters over a weight of ``dtype``, or over the codes of other libraries."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_init(init: object, r: int, scaling: float, out_features: int, in_features: int) -> None:
    """Raises TypeError or ValueError unless ``init`` is one of the above and the rest suits it."""
    if not isinstance(init, (bool, str)):
        raise TypeError(f"init_lora_weights: got {init!r}, wanted True, False, {_NAMES}")
    if isinstance(init, bool) or init == "gaussian":
        return
    if init == "eva":
        raise ValueError(
            'init_lora_weights: got "eva", which needs activations of training data; make the '
            "model with peft, call peft.initialize_lora_eva_weights, then fused_lora.peft.fuse"
        )
    if init == "orthogonal":
        if r % 2:
            raise ValueError(f'r: got {r}, wanted an even one for init_lora_weights="orthogonal"')
    elif not _RESIDUAL.fullmatch(init):
        raise ValueError(f"init_lora_weights: got {init!r}, wanted True, False, {_NAMES}")
    elif not scaling > 0 and init != "olora":
        raise ValueError(
            f"lora_alpha: got a scaling of {scaling}, wanted one above 0, whose root "
            f"init_lora_weights={init!r} divides by"
        )
    elif r > min(out_features, in_features):
        raise ValueError(
            f"r: got {r}, wanted at most {min(out_features, in_features)} to take init_lora_weights"
            f"={init!r} from a weight [{out_features}, {in_features}]"
        )


@torch.no_grad()
def initial_values(
    init: bool | str,
    weight: Weight,
    r: int,
    scaling: float,
    original: Tensor | None = None,
) -> Initial:
    """A, B and, for the residual kinds, a new base weight, all in ``weight``'s dtype.

    ``original``: [N, K], what a quantised ``weight`` was made of, or what it stands for together
    with an adapter. Draws what PEFT draws, in its order, on the CPU; the randomised SVD alone draws
    on ``weight``'s device. Decompositions run in fp32 or better.
    """
    N, K = weight.shape
    # Both nn.Linears' own draws are made whatever comes after, as in PEFT.
    lora_A = nn.Linear(K, r, bias=False, device="cpu").weight.detach()
    lora_B = nn.Linear(r, N, bias=False, device="cpu").weight.detach()
    residual: Weight | None = None
    if init is True or init == "gaussian":
        if init is True:
            nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        else:
            nn.init.normal_(lora_A, std=1 / r)
        lora_B.zero_()
    elif init == "orthogonal":
        q, _ = torch.linalg.qr(torch.randn(r, r, device="cpu"))
        lora_A = (torch.randn(K, r // 2, device="cpu") @ q[0::2]).t() / 10.0
        lora_B = torch.randn(r // 2, N, device="cpu").t() @ q[1::2] / 10.0
    elif isinstance(init, str):
        if type(weight) not in (Tensor, nn.Parameter, QuantizedWeight):
            raise RuntimeError(
                f"weight: is a {type(weight).__name__}, and init_lora_weights={init!r} decomposes "
                "all of it; initialise before the model is sharded"
            )
        exact = _exact(weight if original is None else original)
        if init.startswith("loftq"):
            assert isinstance(weight, QuantizedWeight)
            lora_A, lora_B, residual = _loftq(init, exact, weight, r, scaling)
        else:
            decompose = _olora if init == "olora" else _pissa
            lora_A, lora_B = decompose(init, exact, r, scaling)
            rest = exact - scaling * lora_B @ lora_A
            if isinstance(weight, QuantizedWeight):
                residual = quantize_like(weight, rest)
            else:
                residual = rest.to(weight.dtype)
    # PEFT brings adapters to the base's dtype first, and to float32 after.
    return Initial(lora_A.to(weight.dtype), lora_B.to(weight.dtype), residual)


def _exact(weight: Weight) -> Tensor:
    """The values in fp32 or better."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype) if isinstance(weight, Tensor) else weight.dequantize(dtype)


def _pissa(init: str, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight, r, niter=int(init.rpartition("_")[2]))
        Vh = V.t()
    root = torch.sqrt(S[:r] / scaling)
    return torch.diag(root) @ Vh[:r], U[:, :r] @ torch.diag(root)


def _olora(init: str, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    Q, R = torch.linalg.qr(weight)
    return R[:r], Q[:, :r]


def _loftq(
    init: str, weight: Tensor, like: QuantizedWeight, r: int, scaling: float
) -> tuple[Tensor, Tensor, QuantizedWeight]:
    """Codes in the format of ``like``, and the principal components of what they are wrong by."""
    turns = int(init.rpartition("_")[2]) if init != "loftq" else 1
    rest = weight
    for _ in range(turns):
        codes = quantize_like(like, rest)
        lora_A, lora_B = _pissa("pissa", weight - codes.dequantize(weight.dtype), r, scaling)
        rest = weight - scaling * lora_B @ lora_A
    return lora_A, lora_B, codes
