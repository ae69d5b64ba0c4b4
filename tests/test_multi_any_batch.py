"""`lora_linear_multi` on batches that hypothesis thinks of."""

import pytest
import torch
from test_multi import PLANS, batch, check, fused, run

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=25, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 40)), max_size=6),
    ranks=st.tuples(*[st.integers(1, 40)] * 4),
    N=st.integers(1, 70),
    K=st.integers(1, 70),
    dropout_p=st.sampled_from([0.0, 0.4]),
    plan=st.sampled_from([p.values[0] for p in PLANS]),
    seed=st.integers(0, 2**31),
)
def test_multi_any_batch(runs, ranks, N, K, dropout_p, plan, seed):
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    b = batch(runs, ranks, N, K, device=device, dropout_p=dropout_p)
    check(run(fused(plan), b), b)
