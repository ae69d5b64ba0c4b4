"""What PyTorch users do with modules: copies, dtypes, meta device, state dicts, ties."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fused_lora import FusedLoRALinear, inject

K, N, R = 8, 6, 2
both_backends = pytest.mark.parametrize("backend", ["triton", "torch"])


def _layer(device="cpu", backend="auto", **kwargs):
    layer = FusedLoRALinear(K, N, R, device=device, backend=backend, **kwargs)
    nn.init.normal_(layer.lora_B)
    return layer


def _gradients(layer, x):
    layer.zero_grad()
    layer(x).square().sum().backward()
    return {n: p.grad for n, p in layer.named_parameters()}


def _copy_by_saving(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@both_backends
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _copy_by_saving]
)
def test_copies_are_whole_and_separate(device, launches, backend, copied):
    layer = _layer(device, backend, lora_dropout=0.1, use_rslora=True)
    other = copied(layer)
    assert repr(other) == repr(layer)
    assert [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in layer.parameters()
    ]
    x = torch.randn(4, K, device=device)
    torch.manual_seed(0)
    expected = layer(x)
    torch.manual_seed(0)
    assert torch.equal(other(x), expected)
    nn.init.zeros_(other.lora_B)
    assert layer.lora_B.any()
    assert bool(launches) == (backend == "triton")


def test_a_merged_layer_is_copied_merged():
    layer = _layer().eval()
    layer.merge()
    other = copy.deepcopy(layer)
    assert other.merged
    other.unmerge()
    x = torch.randn(4, K)
    torch.testing.assert_close(other(x), layer(x))


@both_backends
def test_deepcopy_of_a_model_keeps_ties(device, backend):
    model = nn.Sequential(_layer(device, backend), nn.Tanh())
    model.append(model[0])
    other = copy.deepcopy(model)
    assert other[0] is other[2]
    assert other[0].weight.data_ptr() != model[0].weight.data_ptr()


@pytest.mark.parametrize(
    ("move", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to(torch.float16), torch.float16),
        (lambda m: m.to(dtype=torch.bfloat16), torch.bfloat16),
    ],
)
def test_dtypes(device, move, dtype):
    layer = move(_layer(device))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = torch.randn(4, K, device=device, dtype=dtype)
    assert layer(x).dtype == dtype
    assert _gradients(layer, x)["lora_A"].dtype == dtype


@both_backends
def test_adapters_back_in_fp32(device, backend):
    """A half-precision model whose adapters train in fp32, as PEFT sets it up."""
    layer = _layer(device, backend).half()
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    gradients = _gradients(layer, torch.randn(4, K, device=device).half())
    assert gradients["lora_A"].dtype == gradients["lora_B"].dtype == torch.float32


@pytest.mark.gpu
def test_devices(device):
    layer = _layer()
    x = torch.randn(4, K)
    expected = layer(x)
    moved = layer.to(device)
    torch.testing.assert_close(moved(x.to(device)).cpu(), expected)
    assert moved.cpu()(x).device.type == "cpu"
    with pytest.raises(ValueError, match="weight: is on cpu, wanted x's device, cuda:0"):
        layer(x.to(device))


@both_backends
def test_meta_device(device, backend):
    """Built without memory, given some, initialised."""
    with torch.device("meta"):
        layer = FusedLoRALinear(K, N, R, backend=backend)
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device=device)
    layer.reset_lora_parameters()
    base = nn.Linear(K, N, device=device)
    layer.load_state_dict(base.state_dict())
    x = torch.randn(4, K, device=device)
    torch.testing.assert_close(layer(x), base(x))
    assert not layer.weight.requires_grad
    assert layer.lora_A.requires_grad
    assert layer.lora_A.any()


def test_adapters_can_be_injected_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, K))
    inject(model, R, 4, "all-linear")
    assert all(p.is_meta for p in model.parameters())
    state = {n: torch.randn(p.shape) for n, p in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    model(torch.randn(4, K)).sum().backward()
    assert model[0].lora_B.grad is not None


def test_state_dict_hooks():
    layer = _layer()
    layer.register_state_dict_post_hook(
        lambda m, state, prefix, metadata: state.update(extra=torch.ones(1))
    )
    layer.register_load_state_dict_pre_hook(lambda m, state, *args: state.pop("extra"))
    seen = []
    layer.register_load_state_dict_post_hook(lambda m, keys: seen.append(keys))
    other = _layer()
    state = layer.state_dict()
    assert "extra" in state
    layer.load_state_dict(state)
    assert not seen[0].missing_keys
    assert not seen[0].unexpected_keys
    with pytest.raises(RuntimeError, match="Unexpected key.*extra"):
        other.load_state_dict(layer.state_dict())


@both_backends
def test_load_with_assign(device, backend):
    """The given tensors become the parameters, with their dtype and storage."""
    layer = _layer(device, backend)
    state = {n: torch.randn_like(p).half() for n, p in layer.named_parameters()}
    layer.load_state_dict(state, assign=True)
    assert layer.weight.data_ptr() == state["weight"].data_ptr()
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    gradients = _gradients(layer, torch.randn(4, K, device=device).half())
    assert gradients["weight"] is None
    assert gradients["lora_A"] is not None


def test_load_of_a_wrong_shape_names_the_parameter():
    state = _layer().state_dict()
    state["lora_A"] = torch.randn(R + 1, K)
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        _layer().load_state_dict(state)


@both_backends
def test_tied_weights(device, backend):
    """Two layers over one weight, each with its adapter; and one weight for embedding and head."""
    one, two = _layer(device, backend), _layer(device, backend)
    two.weight = one.weight
    model = nn.ModuleList([one, two])
    assert len(list(model.parameters())) == len(list(one.parameters())) * 2 - 1
    x = torch.randn(4, K, device=device)
    (one(x) + two(x)).sum().backward()
    assert one.lora_A.grad is not None
    assert two.lora_A.grad is not None
    moved = copy.deepcopy(model).half()
    assert moved[0].weight is moved[1].weight

    embedding = nn.Embedding(N, K, device=device)
    head = nn.Linear(K, N, bias=False, device=device)
    head.weight = embedding.weight
    layer = FusedLoRALinear.from_linear(head, R, backend=backend)
    assert layer.weight.data_ptr() == embedding.weight.data_ptr()
    layer(embedding(torch.arange(N, device=device))).sum().backward()
    assert embedding.weight.grad is not None  # through the embedding only
    assert layer.weight.grad is None


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@both_backends
def test_parametrized_base_weight(device, launches, backend):
    """The weight is computed at each call, from parameters that are frozen too."""
    layer = _layer(device, backend)
    x = torch.randn(4, K, device=device)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        doubled.weight.mul_(2)
    expected = _gradients(doubled, x)
    parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(layer(x), doubled(x))
    got = _gradients(layer, x)
    for name in ("lora_A", "lora_B"):
        torch.testing.assert_close(got[name], expected[name])
    with pytest.raises(RuntimeError, match="remove_parametrizations"):
        layer.merge()
    assert not layer.merged
    parametrize.remove_parametrizations(layer, "weight")
    layer.merge()
    assert layer.merged
    assert bool(launches) == (backend == "triton")


@both_backends
def test_parametrized_adapter(device, backend):
    """Its parameters are trainable, and get the gradient through the parametrization."""
    layer = _layer(device, backend)
    parametrizations.orthogonal(layer, "lora_A")
    layer(torch.randn(4, K, device=device)).square().sum().backward()
    assert layer.parametrizations.lora_A.original.grad is not None


@both_backends
def test_weight_norm_of_the_frozen_weight(device, backend):
    layer = _layer(device, backend)
    x = torch.randn(4, K, device=device)
    expected = layer(x)
    parametrizations.weight_norm(layer, "weight")
    for name in ("original0", "original1"):
        getattr(layer.parametrizations.weight, name).requires_grad_(False)
    torch.testing.assert_close(layer(x), expected)


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    file = str(tmp_path / "model.safetensors")
    model = nn.Sequential(_layer(), nn.Tanh(), FusedLoRALinear(N, K, R))
    safetensors.save_model(model, file)
    other = nn.Sequential(_layer(), nn.Tanh(), FusedLoRALinear(N, K, R))
    assert safetensors.load_model(other, file) == (set(), [])
    x = torch.randn(4, K)
    assert torch.equal(other(x), model(x))
    tied = nn.ModuleList([_layer(), _layer()])
    tied[1].weight = tied[0].weight
    safetensors.save_model(tied, file)
    loaded = nn.ModuleList([_layer(), _layer()])
    loaded[1].weight = loaded[0].weight
    safetensors.load_model(loaded, file)
    assert torch.equal(loaded[1](x), tied[1](x))


def test_module_traversal():
    """Names, apply, requires_grad_, parameters for the optimiser."""
    layer = _layer()
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias", "lora_A", "lora_B"]
    assert not list(layer.buffers())
    seen = []
    layer.apply(lambda m: seen.append(type(m)))
    assert seen == [FusedLoRALinear]
    trainable = [p for p in layer.parameters() if p.requires_grad]
    before = layer.weight.clone()
    optimizer = torch.optim.AdamW(trainable, lr=0.1, weight_decay=0.1)
    layer(torch.randn(4, K)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before)


@both_backends
def test_share_memory(device, backend):
    if device.type == "cuda":
        pytest.skip("share_memory is for CPU tensors")
    layer = _layer(device, backend).share_memory()
    assert layer.lora_A.is_shared()
    assert layer(torch.randn(4, K)).shape == (4, N)
