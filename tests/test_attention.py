"""`FusedLoRAAttention` against the seed document's formula and against `nn.MultiheadAttention`."""

import copy
import math
import re

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRAAttention, FusedLoRALinear, attention

E, H, L, S, B = 24, 4, 7, 9, 3
ALL = attention.PROJECTIONS


class SimpleAttention(nn.Module):
    """The document's single-head attention, with its own formula y = W0 x + (alpha / r) B A x."""

    def __init__(self, fused, alpha, r):
        super().__init__()
        self.projections = {n: getattr(fused, n) for n in ALL}
        self.alpha, self.r = alpha, r

    def project(self, name, x):
        layer = self.projections[name]
        y = x @ layer.weight.t() + layer.bias
        if hasattr(layer, "lora_A"):
            y = y + self.alpha / self.r * ((x @ layer.lora_A.t()) @ layer.lora_B.t())
        return y

    def forward(self, x):
        Q, K, V = (self.project(name, x) for name in ALL[:3])
        scores = Q @ K.transpose(-2, -1) / math.sqrt(Q.shape[-1])
        return self.project("out_proj", torch.softmax(scores, dim=-1) @ V)


def _train(module):
    """Adapters that do something."""
    for layer in module.modules():
        if isinstance(layer, FusedLoRALinear):
            nn.init.normal_(layer.lora_B, std=0.3)
    return module


def _gradients(module, y):
    y.square().sum().backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", [("k_proj", "v_proj"), ("q_proj",), ("out_proj",), ALL])
def test_is_the_documents_formula(targets):
    fused = FusedLoRAAttention(E, 1, 4, 8, target_modules=targets, batch_first=True)
    _train(fused.double())
    x = torch.randn(B, L, E, dtype=torch.float64)
    torch.testing.assert_close(fused(x), SimpleAttention(fused, 8, 4)(x))
    got = _gradients(fused, fused(x))
    fused.zero_grad()
    expected = _gradients(fused, SimpleAttention(fused, 8, 4)(x))
    assert sorted(got) == sorted(f"{t}.lora_{ab}" for t in targets for ab in "AB")
    for name in got:
        torch.testing.assert_close(got[name], expected[name])


def test_adapters_see_the_input_and_not_the_projections_output():
    """What the document's LoRAAttention computed instead needs in_features == out_features."""
    fused = _train(FusedLoRAAttention(E, 1, 4, kdim=10, vdim=12))
    assert fused.k_proj.lora_A.shape == (4, 10)
    assert fused.v_proj.lora_A.shape == (4, 12)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 10, "vdim": 12}, {"kdim": 10}])
def test_starts_as_nn_multihead_attention(batch_first, bias, sizes):
    mha = nn.MultiheadAttention(E, H, bias=bias, batch_first=batch_first, **sizes).eval()
    if bias:
        nn.init.normal_(mha.in_proj_bias)
        nn.init.normal_(mha.out_proj.bias)
    fused = FusedLoRAAttention.from_multihead_attention(mha, r=4, target_modules=ALL)
    assert not fused.training
    q, k = (torch.randn(*((B, n) if batch_first else (n, B)), E) for n in (L, S))
    k, v = k[..., : mha.kdim], torch.randn(*k.shape[:-1], mha.vdim)
    torch.testing.assert_close(fused(q, k, v), mha(q, k, v)[0])
    torch.testing.assert_close(fused(q[:, 0], k[:, 0], v[:, 0]), mha(q[:, 0], k[:, 0], v[:, 0])[0])
    if not sizes:
        torch.testing.assert_close(fused(q), mha(q, q, q)[0])
        torch.testing.assert_close(fused(q, k), mha(q, k, k)[0])


def test_weights_are_shared_and_frozen():
    mha = nn.MultiheadAttention(E, H)
    before = {n: p.clone() for n, p in mha.named_parameters()}
    fused = FusedLoRAAttention.from_multihead_attention(mha)
    assert fused.q_proj.weight.data_ptr() == mha.in_proj_weight.data_ptr()
    assert fused.out_proj.weight.data_ptr() == mha.out_proj.weight.data_ptr()
    trainable = [n for n, p in fused.named_parameters() if p.requires_grad]
    assert trainable == [f"{n}.lora_{ab}" for n in ("k_proj", "v_proj") for ab in "AB"]
    assert all(p.requires_grad for p in mha.parameters())
    optimizer = torch.optim.SGD(fused.parameters(), lr=1.0)
    fused(torch.randn(L, B, E)).sum().backward()
    optimizer.step()
    assert all(torch.equal(before[n], p) for n, p in mha.named_parameters())
    assert all(p.grad is None for p in mha.parameters())


def test_the_documents_numbers():
    """d = 200, r = 10: of 80,000 weights in k and v, 8,000 train: 90 % saved."""
    fused = FusedLoRAAttention(200, 1, r=10, bias=False)
    assert sum(p.numel() for p in fused.parameters() if p.requires_grad) == 8_000
    assert sum(p.numel() for p in fused.parameters() if not p.requires_grad) == 160_000


def _masks():
    padding = torch.rand(B, S) < 0.3
    padding[:, 0] = False
    mask = torch.rand(L, S) < 0.3
    mask[:, 0] = False
    per_head = torch.rand(B * H, L, S) < 0.3
    per_head[..., 0] = False
    return {
        "padding": {"key_padding_mask": padding},
        "mask": {"attn_mask": mask},
        "mask per head": {"attn_mask": per_head},
        "padding and mask": {"key_padding_mask": padding, "attn_mask": mask},
        "float mask": {"attn_mask": torch.randn(L, S)},
        "float padding": {"key_padding_mask": torch.randn(B, S)},
        "float mask and padding": {
            "key_padding_mask": torch.zeros(B, S).masked_fill(padding, -torch.inf),
            "attn_mask": torch.randn(B * H, L, S),
        },
    }


@pytest.mark.parametrize("name", _masks())
@pytest.mark.parametrize("batch_first", [False, True])
def test_masks_are_nn_multihead_attentions(name, batch_first):
    masks = _masks()[name]
    mha = nn.MultiheadAttention(E, H, batch_first=batch_first).eval()
    fused = FusedLoRAAttention.from_multihead_attention(mha)
    q, k = (torch.randn(*((B, n) if batch_first else (n, B)), E) for n in (L, S))
    torch.testing.assert_close(fused(q, k, **masks), mha(q, k, k, **masks)[0])


def test_bool_and_float_masks_together():
    fused = FusedLoRAAttention(E, H).eval()
    q, k, masks = torch.randn(L, B, E), torch.randn(S, B, E), _masks()
    padding = masks["padding"]["key_padding_mask"]
    mask = torch.randn(L, S)
    both = fused(q, k, key_padding_mask=padding, attn_mask=mask)
    as_float = torch.zeros(B, S).masked_fill(padding, -torch.inf)
    torch.testing.assert_close(both, fused(q, k, key_padding_mask=as_float, attn_mask=mask))


@pytest.mark.parametrize("padded", [False, True])
def test_causal(padded):
    mha = nn.MultiheadAttention(E, H).eval()
    fused = FusedLoRAAttention.from_multihead_attention(mha)
    x, later = torch.randn(L, B, E), torch.ones(L, L, dtype=torch.bool).triu(1)
    padding = {"key_padding_mask": torch.arange(L) >= torch.tensor([L, L - 2, 3])[:, None]}
    padding = padding if padded else {}
    expected = mha(x, x, x, attn_mask=later, **padding)[0]
    torch.testing.assert_close(fused(x, is_causal=True, **padding), expected)
    torch.testing.assert_close(fused(x, is_causal=True, attn_mask=later, **padding), expected)


def test_unbatched_masks():
    mha = nn.MultiheadAttention(E, H).eval()
    fused = FusedLoRAAttention.from_multihead_attention(mha)
    q, k = torch.randn(L, E), torch.randn(S, E)
    masks = {"key_padding_mask": torch.arange(S) > 4, "attn_mask": torch.randn(H, L, S)}
    masks["key_padding_mask"] = torch.zeros(S).masked_fill(masks["key_padding_mask"], -torch.inf)
    torch.testing.assert_close(fused(q, k, **masks), mha(q, k, k, **masks)[0])


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("masks", [{}, {"is_causal": True}])
def test_grouped_query_heads_are_repeated_ones(kv_heads, masks):
    fused = FusedLoRAAttention(
        E, H, 4, num_kv_heads=kv_heads, target_modules=ALL, batch_first=True, dtype=torch.float64
    )
    _train(fused)
    assert fused.k_proj.out_features == E // H * kv_heads

    def repeated(linear):
        """The same linear with every key and value head written out for each of its queries."""
        full = nn.Linear(E, E, dtype=torch.float64)
        weight = linear.weight + linear.scaling * linear.lora_B @ linear.lora_A
        for new, old in ((full.weight, weight), (full.bias, linear.bias)):
            heads = old.detach().unflatten(0, (kv_heads, -1))
            new.data = heads.repeat_interleave(H // kv_heads, dim=0).flatten(0, 1)
        return full

    merged = [copy.deepcopy(fused.q_proj), copy.deepcopy(fused.out_proj)]
    for i, layer in enumerate(merged):
        layer.eval().merge()
        merged[i] = nn.Linear(E, E, dtype=torch.float64)
        merged[i].load_state_dict(layer.state_dict())
    full = FusedLoRAAttention.from_linears(
        merged[0], repeated(fused.k_proj), repeated(fused.v_proj), merged[1], H, batch_first=True
    )
    x = torch.randn(B, L, E, dtype=torch.float64)
    torch.testing.assert_close(fused(x, **masks), full(x, **masks))


def test_explain():
    fused = FusedLoRAAttention(E, H, target_modules=ALL)
    x, y = torch.randn(L, B, E), torch.randn(S, B, E)
    found = fused.explain(x)
    assert list(found) == ["q_proj, k_proj, v_proj", "out_proj"]
    assert "group: not taken: few rows, and on a CPU dropout" in str(
        found["q_proj, k_proj, v_proj"]
    )
    assert "library: taken: F.linear" in str(found["out_proj"])
    assert list(fused.explain(x, y)) == ["q_proj", "k_proj, v_proj", "out_proj"]
    some = FusedLoRAAttention(E, H, target_modules=("k_proj",))
    assert list(some.explain(x, y, y + 1)) == ["k_proj"]
    with pytest.raises(ValueError, match="value: was given without a key"):
        fused.explain(x, value=y)


@pytest.mark.parametrize("targets", [ALL, ("k_proj", "v_proj"), ("q_proj", "out_proj")])
def test_projections_of_the_same_tensor_run_together(device, launches, targets):
    fused = _train(FusedLoRAAttention(E, H, target_modules=targets, backend="triton"))
    fused.to(device)
    x, y = torch.randn(L, B, E, device=device), torch.randn(S, B, E, device=device)
    shared = sum(name in targets for name in ALL[:3])

    def grouped(*inputs):
        launches.clear()
        fused(*inputs)
        return launches.count("gemm_add_lora")

    assert grouped(x) == (shared if shared > 1 else 0)
    both = {"k_proj", "v_proj"} <= set(targets)
    assert grouped(x, y) == (2 if both else 0)
    assert grouped(x, y, y + 1) == 0


def test_dropout_on_the_attention_weights_in_training_only():
    fused = FusedLoRAAttention(E, H, dropout=0.5)
    x = torch.randn(L, B, E)
    assert not torch.equal(fused(x), fused(x))
    fused.eval()
    assert torch.equal(fused(x), fused(x))


def test_state_dict_names_and_round_trip():
    fused, other = (_train(FusedLoRAAttention(E, H)) for _ in range(2))
    assert list(fused.state_dict()) == [
        f"{name}.{key}"
        for name in ALL
        for key in ("weight", "bias") + (("lora_A", "lora_B") if name[0] in "kv" else ())
    ]
    other.load_state_dict(fused.state_dict())
    x = torch.randn(L, B, E)
    assert torch.equal(fused(x), other(x))


def test_autocast_and_half():
    fused = FusedLoRAAttention(E, H)
    x, mask = torch.randn(L, B, E), torch.randn(L, L)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x, attn_mask=mask).dtype == torch.bfloat16
    half = FusedLoRAAttention(E, H, dtype=torch.bfloat16)
    assert half.k_proj.lora_A.dtype == torch.float32
    assert half(x.bfloat16(), attn_mask=mask).dtype == torch.bfloat16


def test_compile():
    torch._dynamo.reset()
    fused, x = _train(FusedLoRAAttention(E, H, target_modules=ALL)), torch.randn(L, B, E)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, is_causal=True), fused(x, is_causal=True))
    padding = torch.arange(L)[None] > torch.tensor([[3], [4], [5]])
    torch.testing.assert_close(
        compiled(x, key_padding_mask=padding), fused(x, key_padding_mask=padding)
    )


BAD = {
    "heads do not divide": ({"num_heads": 5}, ValueError, "num_heads: got 5, wanted a divisor"),
    "kv heads do not divide": ({"num_kv_heads": 3}, ValueError, "num_kv_heads: got 3"),
    "no heads": ({"num_heads": 0}, ValueError, "num_heads: got 0"),
    "heads of a half": ({"num_heads": 1.5}, TypeError, "num_heads: got 1.5"),
    "embed_dim": ({"embed_dim": -3}, ValueError, "embed_dim: got -3"),
    "targets": ({"target_modules": ["query"]}, ValueError, "target_modules: got ['query'], wanted"),
    "a target": ({"target_modules": "q_proj"}, TypeError, "target_modules: got 'q_proj'"),
    "no target": ({"target_modules": []}, ValueError, "target_modules: got []"),
    "dropout": ({"dropout": 1.0}, ValueError, "dropout: got 1.0"),
    "r": ({"r": 0}, ValueError, "r: got 0"),
    "dtype": ({"dtype": torch.int8}, TypeError, "dtype: got torch.int8"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=re.escape(message)):
        FusedLoRAAttention(**{"embed_dim": E, "num_heads": H} | changes)


def test_refused_modules():
    q, small = nn.Linear(E, E), nn.Linear(E, E // 2)
    with pytest.raises(TypeError, match="attention: got Linear, wanted torch"):
        FusedLoRAAttention.from_multihead_attention(q)
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        with pytest.raises(ValueError, match="attention: got add_bias_kv or add_zero_attn"):
            FusedLoRAAttention.from_multihead_attention(nn.MultiheadAttention(E, H, **options))
    with pytest.raises(TypeError, match="v_proj: got Identity"):
        FusedLoRAAttention.from_linears(q, q, nn.Identity(), q, H)
    with pytest.raises(ValueError, match="k_proj: got 12 out_features, wanted 24"):
        FusedLoRAAttention.from_linears(q, small, q, q, H)
    with pytest.raises(ValueError, match="out_proj: got 12 in_features, wanted 24"):
        FusedLoRAAttention.from_linears(q, q, q, nn.Linear(12, E), H)


X = torch.randn(L, B, E)
BAD_CALLS = {
    "query": (([1.0],), {}, TypeError, "query: got list"),
    "4-D": ((X[None],), {}, ValueError, "query: got shape [1, 7, 3, 24]"),
    "width": ((X[..., 1:],), {}, ValueError, "query: got shape [7, 3, 23], wanted [..., 24]"),
    "key's batch": ((X, X[:, :1]), {}, ValueError, "key: got shape [7, 1, 24]"),
    "value's length": ((X, X, X[1:]), {}, ValueError, "value: got shape [6, 3, 24]"),
    "unbatched key": ((X, X[:, 0]), {}, ValueError, "key: got shape [7, 24]"),
    "value without key": ((X, None, X), {}, ValueError, "value: was given without a key"),
    "mask's shape": (
        (X,),
        {"attn_mask": torch.ones(L, S)},
        ValueError,
        "attn_mask: got shape [7, 9], wanted [7, 7] or [12, 7, 7]",
    ),
    "mask's dtype": (
        (X,),
        {"attn_mask": torch.ones(L, L, dtype=torch.int64)},
        TypeError,
        "attn_mask: got torch.int64, wanted torch.bool",
    ),
    "padding's shape": (
        (X,),
        {"key_padding_mask": torch.ones(L, B)},
        ValueError,
        "key_padding_mask: got shape [7, 3], wanted [3, 7]",
    ),
    "padding": ((X,), {"key_padding_mask": 3}, TypeError, "key_padding_mask: got int"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_refused_calls(name, launches):
    inputs, masks, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=re.escape(message)):
        FusedLoRAAttention(E, H)(*inputs, **masks)
    assert launches == []
