"""Several adapters in a model: loaded from disk, served in one batch, trained jointly, saved."""

import copy
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("safetensors")
peft = pytest.importorskip("peft")
from fused_lora import (  # noqa: E402
    FusedLoRALinear,
    FusedMultiLoRALinear,
    add_adapter,
    delete_adapter,
    inject,
    load_adapter,
    lora_linear_multi,
    merge_and_unload,
    route,
    save_adapter,
)

CONFIGS = {
    "german": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "french": {
        "r": 6,
        "target_modules": "all-linear",
        "use_rslora": True,
        "lora_dropout": 0.1,
        "rank_pattern": {"layers.1.mlp.up_proj": 3},
        "alpha_pattern": {"o_proj": 5},
    },
    "legal": {
        "r": 2,
        "target_modules": ["down_proj", "q_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
}


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of adapters that PEFT made, and the PEFT model with all of them."""
    folder = tmp_path_factory.mktemp("adapters")
    model = peft.get_peft_model(llama(), peft.LoraConfig(**CONFIGS["german"]), "german")
    for name in ("french", "legal"):
        model.add_adapter(name, peft.LoraConfig(**CONFIGS[name]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)  # each in a folder of its name
    return folder, model.eval()


def loaded(folder, *names):
    model = llama()
    for name in names or CONFIGS:
        load_adapter(model, folder / name, adapter_name=name)
    return model.eval()


TOKENS = torch.tensor([[5, 9, 2, 33], [7, 1, 60, 12], [5, 9, 2, 33], [8, 8, 8, 8]])
NAMES = ["german", "french", "legal", "__base__"]


def alone(theirs, name, tokens):
    """What PEFT gives for one sample with one adapter."""
    if name == "__base__":
        with theirs.disable_adapter():
            return theirs(tokens[None]).logits[0]
    theirs.set_adapter(name)
    return theirs(tokens[None]).logits[0]


@torch.no_grad()
def test_multi_adapters_from_disk_are_served_in_one_batch(saved):
    folder, theirs = saved
    model = loaded(folder)
    with route(model, adapter_names=NAMES):
        logits = model(TOKENS).logits
    expected = torch.stack([alone(theirs, n, t) for n, t in zip(NAMES, TOKENS, strict=True)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)  # the same tokens, other adapters
    with route(model, adapter_names=NAMES):
        generated = model.generate(TOKENS, max_new_tokens=4, do_sample=False)
    theirs.set_adapter("french")
    french = theirs.generate(input_ids=TOKENS[1:2], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated[1:2], french)


@torch.no_grad()
def test_multi_adapters_packed_in_one_row(saved):
    """Ragged segments in one sample; no attention across them is the attention's business."""
    folder, theirs = saved
    model, mlp = loaded(folder, "legal", "french"), "model.layers.1.mlp.down_proj"
    x = torch.randn(1, 7, 48)
    with route(model, segments=[("legal", 2), ("french", 5)]):
        y = model.get_submodule(mlp)(x)
    layer = theirs.base_model.model.get_submodule(mlp)
    expected = layer(x.expand(2, 7, 48), adapter_names=["legal", "french"])
    torch.testing.assert_close(y[0, :2], expected[0, :2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[0, 2:], expected[1, 2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_multi_adapters_saved_one_by_one_load_in_peft_and_here(saved, tmp_path, name):
    folder, theirs = saved
    save_adapter(loaded(folder), tmp_path, adapter_name=name)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    expected = alone(theirs, name, TOKENS[0])
    torch.testing.assert_close(again(TOKENS[:1]).logits[0], expected, rtol=1e-4, atol=1e-4)
    single = llama()
    load_adapter(single, tmp_path)
    torch.testing.assert_close(single.eval()(TOKENS[:1]).logits[0], expected, rtol=1e-4, atol=1e-4)


def test_multi_joint_training_of_a_model_is_each_adapters_own(saved, tmp_path):
    folder, _ = saved
    joint = loaded(folder, "german", "french").train()
    for layer in joint.modules():
        if isinstance(layer, FusedMultiLoRALinear):
            layer.lora_dropout = 0.0
    alone = {name: copy.deepcopy(joint) for name in ("german", "french")}
    trained = [n for n, p in joint.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_A." in n or ".lora_B." in n for n in trained)
    tokens = {"german": TOKENS[:2], "french": TOKENS[2:]}
    with route(joint, adapter_names=["german"] * 2 + ["french"] * 2):
        out = joint(TOKENS, labels=TOKENS)
    out.loss.backward()
    for name, model in alone.items():
        with route(model, adapter_names=name):
            model(tokens[name], labels=tokens[name]).loss.backward()
        for (n, p), (_, q) in zip(joint.named_parameters(), model.named_parameters(), strict=True):
            if n.endswith(name):
                torch.testing.assert_close(2 * p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=n)


def test_multi_new_adapters_beside_others_and_their_end():
    model = llama()
    report = add_adapter(model, "one", 2, 4, ["q_proj"])
    assert len(report.layers) == 2
    before = copy.deepcopy(model.state_dict())
    report = add_adapter(model, "two", 3, 4, "all-linear", lora_dropout=0.2, use_rslora=True)
    assert len(report.layers) == 14
    new = [p for n, p in model.named_parameters() if p.requires_grad and n.endswith("two")]
    assert report.trainable == sum(p.numel() for p in new)
    q, up = model.model.layers[0].self_attn.q_proj, model.model.layers[0].mlp.up_proj
    assert (q.adapters, q.lora_dropout, up.adapters, up.lora_dropout) == (
        ["one", "two"], 0.0, ["two"], 0.2
    )  # fmt: skip
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())
    assert q.lora_A["one"].requires_grad
    assert type(model.lm_head) is nn.Linear
    delete_adapter(model, "two")
    assert (q.adapters, up.adapters) == (["one"], [])
    with torch.no_grad(), route(model, adapter_names="one"):
        torch.testing.assert_close(model(TOKENS).logits, llama()(TOKENS).logits)


def test_multi_adapters_over_nf4(saved):
    folder, theirs = saved
    model = llama()
    add_adapter(model, "unused", 2, 4, ["q_proj", "down_proj"], quantize="nf4")
    load_adapter(model, folder / "legal", adapter_name="legal")
    down = model.model.layers[0].mlp.down_proj
    assert down.weight.layout.format == "nf4"
    with route(model, adapter_names="legal"):
        y = model(TOKENS).logits
    expected = torch.stack([alone(theirs, "legal", t) for t in TOKENS])
    assert (y - expected).norm() < 0.3 * expected.norm()  # the format's error, not another model


def test_multi_route_is_one_threads_at_a_time():
    model = llama()
    add_adapter(model, "one", 2, 4, ["q_proj"])
    add_adapter(model, "two", 2, 4, ["q_proj"])

    def generate():
        return model(TOKENS).logits

    def serve():
        with route(model, adapter_names="two"):
            return generate()

    with ThreadPoolExecutor(1) as other:
        with torch.no_grad(), route(model, adapter_names="one"):
            with pytest.raises(RuntimeError, match="another thread is inside route"):
                other.submit(serve).result()
            with route(model, adapter_names="two"):
                inner = generate()
            y = other.submit(torch.no_grad()(generate)).result()
            torch.testing.assert_close(y, generate())
        torch.testing.assert_close(other.submit(serve).result(), inner)


def test_multi_a_copy_made_in_route_is_outside_of_it():
    model = nn.Sequential(nn.Linear(8, 8))
    for name in ("a", "b"):
        add_adapter(model, name, 2, 4, ["0"])
    with route(model, adapter_names="b"):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        with pytest.raises(ValueError, match="wanted a call inside fused_lora.route"):
            other(torch.randn(3, 8))
        with route(other, adapter_names="a"):
            other(torch.randn(3, 8))


def test_multi_route_names_what_is_wrong():
    model = llama()
    add_adapter(model, "one", 2, 4, ["q_proj"])
    add_adapter(model, "two", 2, 4, ["v_proj"])
    with (
        pytest.raises(ValueError, match="adapter_indices: the layers' adapters differ"),
        route(model, adapter_indices=[0] * 4),
    ):
        pass
    with (
        pytest.raises(ValueError, match="adapter_names: got 'three', wanted one of"),
        route(model, adapter_names="three"),
    ):
        model(TOKENS)


def _state(model):
    return {n: (type(m), tuple(m._parameters)) for n, m in model.named_modules()}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"adapter_name": "one"}, ValueError, "there is an adapter 'one' already"),
        ({"adapter_name": "a.b"}, ValueError, "name: got 'a.b'"),
        ({"adapter_name": 3}, TypeError, "name: got int"),
        ({"r": 0}, ValueError, "r: got 0"),
        ({"rank_pattern": {"q_proj": -1}}, ValueError, "rank_pattern['q_proj']: got -1"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha: got nan"),
        ({"target_modules": ["nothing"]}, ValueError, "['nothing'] matches no nn.Linear"),
        ({"target_modules": ["norm"]}, ValueError, "['norm'] matches no nn.Linear"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout: got 1.0"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype: got torch.int8"),
        ({"quantize": "int3"}, ValueError, "quantize: got 'int3'"),
        ({"backend": "cuda"}, ValueError, "backend: got 'cuda'"),
        ({"model": nn.Linear(2, 2)}, ValueError, "model: got a Linear itself"),
        ({"model": []}, TypeError, "model: got list"),
    ],
)
def test_multi_adapters_that_are_refused_change_nothing(changes, error, message):
    model = llama()
    add_adapter(model, "one", 2, 4, ["q_proj"])
    before = _state(model)
    arguments = {"model": model, "adapter_name": "two", "r": 2, "lora_alpha": 4}
    arguments |= {"target_modules": ["q_proj", "v_proj"]} | changes
    with pytest.raises(error, match=re.escape(message)):
        add_adapter(**arguments)
    assert _state(model) == before


def test_multi_other_adapters_in_the_model_are_refused():
    injected = llama()
    inject(injected, 2, 4, ["q_proj"])
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for model in (injected, theirs):
        with pytest.raises(ValueError, match="model: has adapters already"):
            add_adapter(model, "one", 2, 4, ["v_proj"])
    with pytest.raises(ValueError, match="'one', which no layer has"):
        delete_adapter(injected, "one")


def test_multi_files_that_do_not_fit_change_nothing(saved, tmp_path):
    folder, _ = saved
    model = loaded(folder, "german")
    before = _state(model)
    with pytest.raises(FileNotFoundError):
        load_adapter(model, tmp_path, adapter_name="new")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / "legal" / name).read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    changes = [
        ({"r": 5}, r"got shape \[2, 48\], wanted \[5, 48\]"),
        ({"target_modules": ["q_proj"]}, "does not fit the model's layers"),
        ({"use_dora": True}, "use_dora: got True, wanted False"),
    ]
    for change, message in changes:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path, adapter_name="new")
    with pytest.raises(ValueError, match=r"adapter_name: got 'new', wanted one of \['german'\]"):
        save_adapter(model, tmp_path / "other", adapter_name="new")
    assert _state(model) == before
    assert not (tmp_path / "other").exists()


def test_multi_adapters_of_peft_over_a_bitsandbytes_nf4_model(tmp_path):
    from test_quantize import _peft_model

    # Training: bitsandbytes has other kernels, of other roundings, where no gradient is wanted.
    theirs, x = _peft_model("nf4"), torch.randn(3, 2, 128, requires_grad=True)
    expected = theirs(x)
    base = theirs.base_model.model.up.base_layer(x)
    theirs.save_pretrained(tmp_path)
    model = theirs.unload()
    load_adapter(model, tmp_path, adapter_name="one")
    add_adapter(model, "two", 3, 6, ["up"])
    assert model.up.weight.layout.format == "nf4"
    with route(model, adapter_names=["one", "__base__", "two"]):
        y = model(x)
        y.square().sum().backward()
    torch.testing.assert_close(y[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y[1:], base[1:], rtol=1e-4, atol=1e-4)  # a new one adds nothing
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert grads == {f"up.lora_{AB}.{name}" for AB in "AB" for name in ("one", "two")}


def test_multi_report_counts_the_new_adapter_and_names_what_matches_nothing():
    model = llama()
    add_adapter(model, "one", 8, 8, "all-linear")
    report = add_adapter(
        model, "two", 2, 4, ["q_proj", "nothing"], rank_pattern={"nowhere": 3, "q_proj": 2}
    )
    q = model.model.layers[0].self_attn.q_proj
    new = [*q.lora_A["two"].shape, *q.lora_B["two"].shape]
    assert report.trainable == 2 * (new[0] * new[1] + new[2] * new[3])
    assert report.skipped == {
        "nothing": "matches no module",
        "nowhere of rank_pattern": "matches no layer that gets an adapter",
    }
    assert report.quantization_error is None
    plain = llama()
    report = add_adapter(plain, "one", 2, 4, ["q_proj"], quantize="nf4")
    assert 0.05 < report.quantization_error < 0.12  # of normally distributed weights
    assert "differ from the original ones" in str(report)


def test_multi_weights_stay_in_the_codes_that_their_adapters_have():
    model = llama()
    add_adapter(model, "one", 2, 4, ["q_proj"])
    with pytest.raises(ValueError, match=r"q_proj is in torch.float32, for adapters"):
        add_adapter(model, "two", 2, 4, ["q_proj", "v_proj"], quantize="nf4")
    assert type(model.model.layers[0].self_attn.v_proj) is nn.Linear
    model = llama()
    add_adapter(model, "one", 2, 4, ["q_proj"], quantize="nf4")
    with pytest.raises(ValueError, match=r"quantize: got 'int8', .* q_proj|q_proj is in nf4"):
        add_adapter(model, "two", 2, 4, ["q_proj"], quantize="int8")
    add_adapter(model, "two", 2, 4, ["q_proj"], quantize="nf4")


def test_multi_adapters_from_disk_over_codes(saved):
    folder, _ = saved
    model, expected = llama(), llama()
    report = load_adapter(model, folder / "legal", adapter_name="legal", quantize="nf4")
    assert report.quantization_error > 0
    load_adapter(expected, folder / "legal", quantize="nf4")
    assert model.model.layers[0].mlp.down_proj.weight.layout.format == "nf4"
    with torch.no_grad(), route(model, adapter_names="legal"):
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits)


def test_multi_models_say_what_they_are_where_one_adapter_is_wanted(saved, tmp_path):
    folder, _ = saved
    model = loaded(folder, "german", "french")
    before = _state(model)
    with pytest.raises(ValueError, match=r"has adapters \['german', 'french'\]; wanted an "):
        load_adapter(model, folder / "legal")
    with pytest.raises(ValueError, match=r"adapter_name: got None, wanted one of \['german', "):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"has adapters .*; save one with save_adapter"):
        merge_and_unload(model)
    with pytest.raises(ValueError, match="model: has adapters already, at model.layers.0"):
        inject(model, 2, 4, "all-linear")
    assert _state(model) == before
    injected = llama()
    load_adapter(injected, folder / "legal")
    before = _state(injected)
    with pytest.raises(ValueError, match="has adapters already, at"):
        load_adapter(injected, folder / "german", adapter_name="german")
    with pytest.raises(ValueError, match="quantize: got 'nf4', but the model has adapters already"):
        load_adapter(injected, folder / "legal", quantize="nf4")
    with pytest.raises(ValueError, match="adapter_name: got 'german', wanted None"):
        save_adapter(injected, tmp_path, adapter_name="german")
    assert _state(injected) == before


def test_an_adapter_starts_as_a_layer_of_its_own_does():
    """From the same seed, whatever the dtypes."""
    multi = FusedMultiLoRALinear(8, 6, dtype=torch.bfloat16)
    torch.manual_seed(3)
    multi.add_adapter("a", r=4)
    base = nn.Linear(8, 6, dtype=torch.bfloat16)
    torch.manual_seed(3)
    alone = FusedLoRALinear.from_linear(base, r=4)
    assert torch.equal(multi.lora_A["a"], alone.lora_A)
    assert multi.lora_A["a"].dtype == torch.float32


def test_segments_under_a_dispatch_mode_are_pairs():
    x, weight = torch.randn(4, 6), torch.randn(5, 6)
    adapter = ([torch.randn(2, 6)] * 3, [torch.randn(5, 2)] * 3)
    for mode in (nullcontext(), FlopCounterMode(display=False)):
        with mode, pytest.raises(TypeError, match=r"segments\[0\]: got"):
            lora_linear_multi(x, weight, *adapter, scalings=1.0, segments=[(0, 2, 1, 2)])
