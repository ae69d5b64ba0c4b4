"""`merge_and_unload`, and the commands `fused-lora merge` and `fused-lora info`."""

import copy
import os
from importlib.metadata import version

import pytest
import torch
from torch import nn

from fused_lora import FusedLoRALinear, QuantizedWeight, inject, merge_and_unload


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.last = nn.Linear(6, 4, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.again(torch.tanh(self.first(x)))))


def _adapted(model):
    inject(model, 2, 4, ["first", "again", "last"])
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            nn.init.normal_(module.lora_B)
    return model.double().eval()


def test_merge_and_unload_gives_plain_layers_that_compute_the_same():
    model, x = _adapted(Tied()), torch.randn(3, 6).double()
    expected = model(x)
    weight = model.first.weight.clone()
    assert merge_and_unload(model) is model
    assert type(model.first) is nn.Linear
    assert model.again is model.first
    assert not torch.equal(model.first.weight, weight)
    torch.testing.assert_close(model(x), expected)
    assert not [p for p in model.parameters() if p.requires_grad]


def test_a_weight_that_is_another_modules_too_stays():
    """Tied after `inject`: the very same Parameter."""
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    inject(model, 2, 4, ["head"])
    head = model["head"]
    nn.init.normal_(head.lora_B)
    head.weight = model["embedding"].weight
    before = head.weight.detach().clone()
    for change in (head.merge, head.unmerge, head.merge):
        change()
        assert torch.equal(model["embedding"].weight, before)
    assert not torch.equal(head.weight, before)
    assert head.weight.requires_grad == model["embedding"].weight.requires_grad


def test_hooks_are_not_dropped():
    model = _adapted(Tied())
    handle = model.last.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model: last: has hooks"):
        merge_and_unload(model)
    assert not model.first.merged
    handle.remove()
    merge_and_unload(model)


def test_fp32_adapters_do_not_round_a_double_weight():
    layer = FusedLoRALinear.from_linear(
        nn.Linear(64, 64, dtype=torch.float64), r=4, lora_alpha=4, adapter_dtype=torch.float32
    )
    weight = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, weight)  # B is 0
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_nothing_to_merge():
    with pytest.raises(ValueError, match="has no FusedLoRALinear"):
        merge_and_unload(Tied())
    with pytest.raises(ValueError, match="call its merge"):
        merge_and_unload(FusedLoRALinear(4, 4))


@pytest.fixture
def saved(tmp_path):
    """A tiny model and an adapter for it, both as folders, and the adapted model."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    from tokenizers import Tokenizer, models

    from fused_lora import save_adapter

    config = transformers.LlamaConfig(
        vocab_size=10, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    base = tmp_path / "base"
    model.save_pretrained(base)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    ).save_pretrained(base)
    model = transformers.LlamaForCausalLM.from_pretrained(base).eval()
    inject(model, 2, 4, ["q_proj", "down_proj"])
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            nn.init.normal_(module.lora_B, std=0.3)
    save_adapter(model, tmp_path / "adapter")
    return base, tmp_path / "adapter", model


def _run(*arguments):
    from typer.testing import CliRunner

    from fused_lora.cli import app

    return CliRunner().invoke(app, list(map(str, arguments)))


def test_merge_command(saved, tmp_path):
    from transformers import AutoTokenizer, LlamaForCausalLM

    _, adapter, model = saved
    result = _run("merge", adapter, tmp_path / "merged")
    assert result.exit_code == 0, result.output
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.dtype == torch.bfloat16
    tokens = torch.arange(10)[None]
    expected = merge_and_unload(copy.deepcopy(model))(tokens).logits
    assert torch.equal(merged(tokens).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size == 1
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base", "merged"]

    again = _run("merge", adapter, tmp_path / "merged")
    assert again.exit_code == 2
    assert "is there already" in again.output.replace("\n", "")


def test_merge_command_warns_of_an_adapter_trained_over_codes(saved, tmp_path):
    """Of one that `fused-lora finetune --quantize nf4` saved; not of others."""
    from fused_lora.finetune import Run
    from fused_lora.settings import Settings

    base, *_ = saved
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n' * 40)
    for quantize in ("nf4", "none"):
        settings = Settings(
            model=str(base), data=str(data), r=2, steps=1, seq_len=4, held_out=1,
            quantize=quantize, device="cpu",
        )  # fmt: skip
        run = Run(settings, tmp_path / quantize, say=lambda _: None)
        run.train(lambda history, rate: None)
        run.save()
        result = _run("merge", tmp_path / quantize, tmp_path / f"merged-{quantize}")
        assert result.exit_code == 0, result.output
        said = " ".join(result.output.split())
        assert ("was trained over W0 in nf4, a scale" in said) == (quantize == "nf4")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no such file"),
        ("[1", "is not JSON"),
        ("{}", "peft_type: got None"),
        ('{"peft_type": "LORA", "r": 2, "target_modules": ["a"]}', "names no base model; give one"),
    ],
)
def test_merge_command_with_a_bad_adapter(saved, tmp_path, config, message):
    adapter = tmp_path / "bad"
    adapter.mkdir()
    if config is not None:
        (adapter / "adapter_config.json").write_text(config)
    result = _run("merge", adapter, tmp_path / "merged")
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert not (tmp_path / "merged").exists()


def test_failed_merge_leaves_nothing(saved, tmp_path):
    base, adapter, _ = saved
    (adapter / "adapter_model.safetensors").write_bytes(b"no")
    assert _run("merge", adapter, tmp_path / "merged", "--model", base).exit_code == 2
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_info_command(saved):
    base, *_ = saved
    result = _run("info", "--model", base, "--r", 4, "--tokens", 8)
    assert result.exit_code == 0, result.output
    for part in (f"torch        {version('torch')}", "7 layers adapted", "x [8, 16], weight"):
        assert part in result.output
    assert _run("info").exit_code == 0
    bad = _run("info", "--model", "/nowhere")
    assert bad.exit_code == 2
    assert "error:" in bad.output


def test_info_of_a_mixture_of_experts(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("typer")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "moe_intermediate_size": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 10}
    sizes |= {"num_experts": 8, "architectures": ["Qwen3MoeForCausalLM"]}
    transformers.Qwen3MoeConfig(**sizes).save_pretrained(tmp_path)
    result = _run("info", "--model", tmp_path, "--r", 4, "--tokens", 8)
    assert result.exit_code == 0, result.output
    for part in ("6 layers adapted", "x [8, 64], weight [8, 64, 64]", "rows of some experts"):
        assert part in result.output


def test_what_is_merged_into_codes_is_no_plain_layer():
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64))
    inject(model, 2, 4, "all-linear", quantize="nf4")
    model[1].merge(requantize=True)
    assert "nf4" in model[1].explain(torch.randn(2, 4)).reasons["quantised W0"]
    with pytest.raises(ValueError, match="1 is merged into codes, which an nn.Linear cannot have"):
        merge_and_unload(model)
    assert not model[0].merged
    model[1].unmerge()
    assert type(merge_and_unload(model)[1]) is nn.Linear


def test_a_refused_merge_leaves_nothing_merged():
    """And W0 the very parameters that they were."""
    model, x = _adapted(Tied()), torch.randn(3, 6).double()
    expected, before = model(x), [model.first.weight, model.last.weight]
    with torch.no_grad():
        model.last.lora_B[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        merge_and_unload(model)
    assert [m.merged for m in (model.first, model.last)] == [False, False]
    assert model.first.weight is before[0]
    assert model.last.weight is before[1]
    with torch.no_grad():
        model.last.lora_B[0, 0] = 0.0
    assert model(x)[:, 1:].allclose(expected[:, 1:])


def test_codes_that_cannot_come_back_leave_the_layer_merged(monkeypatch):
    layer = FusedLoRALinear.from_linear(nn.Linear(64, 8), r=2, lora_alpha=4, quantize="nf4")
    nn.init.normal_(layer.lora_B)
    layer.eval().merge()
    x = torch.randn(3, 64)
    expected = layer(x)

    def full(self, *_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(QuantizedWeight, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            layer.unmerge()
    assert torch.equal(layer(x), expected)
    layer.unmerge()
    assert not layer.merged
