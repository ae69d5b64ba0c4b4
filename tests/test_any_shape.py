"""The kernels on shapes that hypothesis thinks of."""

import pytest
import torch
from oracle import check, fused, problem, run

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=30, deadline=None)
@given(
    M=st.integers(0, 70),
    N=st.integers(1, 90),
    K=st.integers(1, 90),
    r=st.integers(1, 70),
    dropout_p=st.sampled_from([0.0, 0.05, 0.5]),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(M, N, K, r, dropout_p, bias, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = problem(M, N, K, r, device=device, dropout_p=dropout_p, bias=bias)
    check(run(fused("triton"), p), p)
