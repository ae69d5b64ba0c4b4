"""The reference itself: its random numbers against published ones, its mask's statistics."""

import pytest
import torch
import torch.nn.functional as F

from fused_lora import reference
from fused_lora.kernels.dropout import Dropout, dropout_threshold


def _words(*values):
    return tuple(torch.tensor([v], dtype=torch.int64) for v in values)


# From Random123's kat_vectors file, "philox4x32 7" and "philox4x32 10".
KNOWN_ANSWERS = [
    (7, (0, 0, 0, 0), (0, 0), "5f6fb709 0d893f64 4f121f81 4f730a48"),
    (10, (0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (7, (2**32 - 1,) * 4, (2**32 - 1,) * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    (10, (2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(rounds, counter, key, expected):
    words = reference.philox_4x32(_words(*counter), _words(*key), rounds)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def test_mask_of_a_long_matrix_is_made_in_pieces_that_fit_together(monkeypatch):
    seeds = torch.tensor([7]), torch.tensor([-7])
    whole = [reference.keep_mask(seed, 20_000, 60, 50) for seed in seeds]
    monkeypatch.setattr(reference, "_CHUNK", 8)
    assert all(
        torch.equal(keep, reference.keep_mask(seed, 20_000, 60, 50))
        for keep, seed in zip(whole, seeds, strict=True)
    )
    assert torch.equal(whole[0][:20, :11], reference.keep_mask(seeds[0], 20_000, 20, 11))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("p", [0.0, 2**-16, 0.1, 0.5, 0.999])
def test_share_of_kept_elements(p, sign):
    seed = sign * torch.empty(1, dtype=torch.int64).random_()
    n = 1000 * 1000
    kept = reference.keep_mask(seed, reference.dropout_threshold(p), 1000, 1000).sum().item()
    sigma = (n * p * (1 - p)) ** 0.5
    assert abs(kept - n * (1 - p)) <= 6 * sigma + n * 2**-17


@pytest.mark.parametrize("shape", [(1, 7), (2, 1024), (3, 1024), (41, 50), (41, 51)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_drawn_mask_is_the_same_in_every_dtype(shape, dtype):
    """One by one, or four to a draw: backward may have it in another dtype than forward."""

    def drawn(dtype):
        return reference.drawn_mask(1 << 15, *shape, dtype, torch.Generator().manual_seed(5))

    keep = drawn(torch.bool)
    assert torch.equal(drawn(dtype), keep.to(dtype))
    assert abs(keep.double().mean().item() - 0.5) <= 3 / keep.numel() ** 0.5


@pytest.mark.parametrize("seed", [3, -3])
def test_rows_columns_and_seeds_are_uncorrelated(seed):
    keep = reference.keep_mask(torch.tensor([seed]), 1 << 15, 512, 512).float() - 0.5
    other = reference.keep_mask(torch.tensor([seed - 1]), 1 << 15, 512, 512).float() - 0.5
    for a, b in [
        (keep[:, :-1], keep[:, 1:]),
        (keep[:-1], keep[1:]),
        (keep[:, :-8], keep[:, 8:]),
        (keep, other),
    ]:
        correlation = 4 * (a * b).mean().item()
        assert abs(correlation) < 6 / a.numel() ** 0.5


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.9999999])
def test_threshold_is_the_kernels(p):
    assert reference.dropout_threshold(p) == dropout_threshold(p) < 1 << 16
    assert Dropout(torch.zeros(1), dropout_threshold(p)).keep_scale >= 1.0


def test_dropout_is_unbiased_on_the_adapter_branch_only():
    x, eye = torch.ones(2000, 64), torch.eye(64)
    y = reference.lora_linear(x, eye, eye, eye, scaling=1.0, dropout_p=0.25)
    assert set(((y - 1) * 3).round().unique().tolist()) == {0.0, 4.0}
    assert abs(y.mean().item() - 2.0) < 0.02


def test_without_dropout_it_is_the_formula():
    x, W, b = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
    A, B = torch.randn(2, 7), torch.randn(3, 2)
    expected = F.linear(x, W, b) + 0.5 * x @ A.t() @ B.t()
    torch.testing.assert_close(reference.lora_linear(x, W, A, B, scaling=0.5, bias=b), expected)
