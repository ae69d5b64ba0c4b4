"""PEFT's modules_to_save in `inject`: trained copies of whole modules, on disk beside adapters."""

import copy
import functools
import json
import pickle
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft
import transformers
from safetensors.torch import load_file, save_file
from small_models import SMALL, adapted, assert_same, base
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from fused_lora import (
    FusedLoRALinear,
    add_adapter,
    disable_adapter,
    inject,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from fused_lora.modules_to_save import ModuleToSave

# In fp32 one seed in 36 was 1.5e-5 away with another implementation of attention.
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=1e-3)
NUMBERS = {"r": 3, "lora_alpha": 6}
TARGETS = ["q_proj", "down_proj"]
IDS = torch.arange(12).view(2, 6)


def classifier():
    """With a head that is no part of what it is taken from."""
    config = transformers.LlamaConfig(**SMALL, num_labels=3)
    return transformers.LlamaForSequenceClassification(config).double().eval()


def vision():
    """A head with a BatchNorm: buffers, one of which counts."""
    head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    return nn.ModuleDict({"body": nn.Linear(8, 8), "head": head})


def _injected(model, modules_to_save, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fused_lora: modules_to_save")  # ties
        return inject(model, **NUMBERS, modules_to_save=modules_to_save, **options)


def _move(model):
    """As a step of training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)


def _logits(model, ids=IDS):
    return model(input_ids=ids).logits.detach()


def _grads(model, names):
    """Of the trained parameters, by their names in PEFT's files."""
    model.zero_grad()
    _loss(model).backward()
    return {
        name: p.grad.clone() for key, p in model.named_parameters()
        if p.grad is not None and (name := names(key))
    }  # fmt: skip


def _loss(model):
    if isinstance(model, peft.PeftModel) or hasattr(model, "score"):
        return model(input_ids=IDS).logits.square().sum()
    return model(input_ids=IDS, labels=IDS).loss


def test_a_classifier_is_pefts(tmp_path):
    """Loss, gradients, and files, both ways, of a head beside adapters."""
    plain = classifier()
    theirs = adapted(
        copy.deepcopy(plain), TARGETS, modules_to_save=["classifier", "score"], task_type="SEQ_CLS"
    ).eval()
    _move(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(plain)
    load_adapter(ours, tmp_path / "theirs")
    assert isinstance(ours.score, ModuleToSave)
    assert_close(_logits(ours), _logits(theirs))
    expected = _grads(
        theirs, lambda name: name.replace(".default", "").replace("base_model.model.", "")
    )
    got = _grads(ours, lambda name: name)
    rename = {"score.trained_module.weight": "score.modules_to_save.weight"}
    got = {rename.get(name, name + ".weight" * ("lora_" in name)): g for name, g in got.items()}
    assert_same(got, expected, rtol=1e-6, atol=1e-9)

    _move(ours)
    save_adapter(ours, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["score"]
    back = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "ours").eval()
    assert_close(_logits(back), _logits(ours))
    again = copy.deepcopy(plain)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(_logits(again), _logits(ours))
    load_adapter(ours, tmp_path / "theirs")  # into the layers and the copy that there are
    assert_close(_logits(ours), _logits(theirs))


@pytest.mark.parametrize("tied", [False, True])
def test_new_tokens(tied, tmp_path):
    """Embeddings and head of a language model, resized before; merged, saved and loaded again."""
    model = base(tie_word_embeddings=tied).eval()
    model.resize_token_embeddings(44)
    before = copy.deepcopy(model)
    names = ["embed_tokens", "lm_head"]
    if tied:
        with pytest.warns(UserWarning, match=r"embed_tokens\.weight is lm_head\.weight too"):
            report = inject(model, **NUMBERS, target_modules=TARGETS, modules_to_save=names)
    else:
        report = inject(model, **NUMBERS, target_modules="all-linear", modules_to_save=names)
    assert report.modules_to_save == ("model.embed_tokens", "lm_head")
    assert "trained in whole: model.embed_tokens\n" in str(report)
    trained = {
        name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name
    }
    assert trained == {"model.embed_tokens.trained_module.weight", "lm_head.trained_module.weight"}
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    _move(model)
    ids = torch.tensor([[1, 41, 43]])
    with disable_adapter(model):
        assert torch.equal(_logits(model, ids), _logits(before, ids))
        assert model.get_output_embeddings().weight is model.lm_head.original_module.weight
    expected = _logits(model, ids)
    assert model.get_input_embeddings().weight is model.model.embed_tokens.trained_module.weight
    with pytest.raises(AttributeError, match="nothing"):
        model.lm_head.nothing  # noqa: B018
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_logits(same, ids), expected)

    model.tie_weights()
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(_logits(model, ids), expected)
    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = copy.deepcopy(before)
        load_adapter(loaded, tmp_path / "adapter")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(before), tmp_path / "adapter").eval()
    assert torch.equal(_logits(loaded, ids), expected)
    assert_close(_logits(theirs, ids), expected)

    merged = merge_and_unload(model)
    assert not [m for m in merged.modules() if isinstance(m, (ModuleToSave, FusedLoRALinear))]
    assert not [p for p in merged.parameters() if p.requires_grad]
    assert_close(_logits(merged, ids), expected)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(_logits(again, ids), _logits(merged, ids))
    with pytest.raises(ValueError, match=r"weight: got shape \[44, 16\], wanted \[40"):
        load_adapter(base(), tmp_path / "adapter")


def test_compiled(fresh_compiler):
    head = ModuleToSave(nn.Linear(8, 5))
    head.start_training()
    x = torch.randn(3, 8)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), head.trained_module(x))


def test_state_dicts():
    model = base().eval()
    inject(model, **NUMBERS, target_modules=TARGETS, modules_to_save=["lm_head"])
    _move(model)
    other = base().eval()
    inject(other, **NUMBERS, target_modules=TARGETS, modules_to_save=["lm_head"])
    other.load_state_dict(model.state_dict())
    assert torch.equal(_logits(other), _logits(model))


class _Reward(nn.Module):
    """What holds a language model and its config, and is none."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config


@pytest.mark.parametrize("names", [None, ["lm_head"], ["model"]])
def test_in_a_module_that_is_no_model(names, tmp_path):
    """In the last case it is saved whole, and its tie with it."""
    model = nn.ModuleDict({"value": nn.Linear(4, 4), "of": _Reward(base(tie_word_embeddings=True))})
    model.eval()
    whole = names == ["model"]
    names = ["of.model"] if whole else names
    with warnings.catch_warnings():
        warnings.simplefilter("error" if whole else "ignore")
        inject(model, **NUMBERS, target_modules=["value", *TARGETS], modules_to_save=names)
    _move(model)
    expected = _logits(model["of"].model)
    model["of"].model.tie_weights()
    merge_and_unload(model)
    inner = model["of"].model
    assert_close(_logits(inner), expected)
    inner.save_pretrained(tmp_path)
    assert inner.config.tie_word_embeddings == (names != ["lm_head"])


def test_what_peft_saves_of_a_vocabulary_that_grew(tmp_path):
    """Its wrappers of embeddings too, which say the same twice, and the originals."""
    plain, names = base().eval(), ["embed_tokens", "lm_head"]
    plain.resize_token_embeddings(44)
    theirs = adapted(copy.deepcopy(plain), TARGETS, torch.float32, modules_to_save=names).eval()
    _move(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    load_adapter(plain, tmp_path)
    assert_close(_logits(plain), _logits(theirs))


def test_ties_below_wrappers():
    model = base(tie_word_embeddings=True).eval()
    model.model = checkpoint_wrapper(model.model)
    _injected(model, ["embed_tokens"], target_modules=TARGETS)
    _move(model)
    expected = _logits(model)
    model.tie_weights()
    assert torch.equal(_logits(model), expected)


def test_other_ties_stay(tmp_path):
    """Of embeddings in three places, two that are still one are not lost on disk."""
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1) | {
        name: 16 for name in ("d_model", "encoder_ffn_dim", "decoder_ffn_dim")
    }
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    config = transformers.BartConfig(
        vocab_size=40, **sizes, **heads, max_position_embeddings=32, pad_token_id=0
    )
    model = transformers.BartForConditionalGeneration(config).eval()
    _injected(model, ["lm_head"], target_modules=TARGETS[:1])
    _move(model)
    expected = model(input_ids=IDS, decoder_input_ids=IDS).logits
    merge_and_unload(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    got = again(input_ids=IDS, decoder_input_ids=IDS).logits
    assert_close(got, expected)


def test_what_is_in_them_keeps_its_mode_and_wrappers(tmp_path):
    plain = vision()
    plain["head"][1].eval()
    inject(plain, **NUMBERS, target_modules=["body"], modules_to_save=["head"])
    head = plain["head"]
    assert [head.training, head.trained_module.training] == [True, True]
    assert not head.trained_module[1].training
    assert not head.original_module[1].training

    model = base().eval()
    model.model.norm = checkpoint_wrapper(model.model.norm)
    inject(model, **NUMBERS, target_modules=TARGETS, modules_to_save=["model.norm"])
    _move(model)
    save_adapter(model, tmp_path)
    assert "base_model.model.model.norm.weight" in load_file(tmp_path / "adapter_model.safetensors")
    again = copy.deepcopy(model)
    _move(again)
    load_adapter(again, tmp_path)
    assert torch.equal(_logits(again), _logits(model))


def test_a_module_at_another_path_later_and_one_with_names_of_ours():
    model = base().eval()
    model.lm_head.merged = True  # of its own
    inject(model, **NUMBERS, target_modules=TARGETS, modules_to_save=["lm_head"])
    with disable_adapter(model):
        assert model.lm_head.merged
    model.twin = model.lm_head
    merge_and_unload(model)
    assert type(model.twin) is nn.Linear
    assert model.twin is model.lm_head


@pytest.mark.parametrize("names", [None, ["model.norm"]])
@pytest.mark.parametrize("kind", ["SequenceClassification", "QuestionAnswering"])
def test_peft_takes_files_without_a_trained_head(kind, names, tmp_path):
    model = getattr(transformers, f"LlamaFor{kind}")(transformers.LlamaConfig(**SMALL)).eval()
    plain = copy.deepcopy(model)
    inject(model, **NUMBERS, target_modules=TARGETS, modules_to_save=names)
    _move(model)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    for ours, own in zip(model(input_ids=IDS)[:2], theirs(input_ids=IDS)[:2], strict=True):
        if isinstance(ours, torch.Tensor):
            assert_close(own, ours)


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
def test_pefts_auto_classes_find_the_model(kind, tmp_path):
    config = transformers.LlamaConfig(**SMALL, num_labels=3)
    getattr(transformers, f"LlamaFor{kind}")(config).save_pretrained(tmp_path / "base")
    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(tmp_path / "base").eval()
    inject(model, **NUMBERS, target_modules=TARGETS, modules_to_save=["score"])
    _move(model)
    save_adapter(model, tmp_path / "adapter")
    auto = getattr(peft, f"AutoPeftModelFor{kind}")
    theirs = auto.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert_close(_logits(theirs), _logits(model))


def test_buffers_and_counters(tmp_path):
    plain = vision()
    model = copy.deepcopy(plain)
    inject(model, **NUMBERS, target_modules=["body"], modules_to_save=["head"])
    model.train()
    model.head(torch.randn(5, 8))
    save_adapter(model, tmp_path)
    loaded = copy.deepcopy(plain)
    load_adapter(loaded, tmp_path)
    for name, tensor in model.head.trained_module.state_dict().items():
        assert torch.equal(loaded.head.trained_module.state_dict()[name], tensor)
    assert loaded.head.trained_module[1].num_batches_tracked == 1
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    counter = "base_model.model.head.1.num_batches_tracked"
    for key, value, message in (
        (counter, torch.tensor(1.0), "num_batches_tracked: got torch.float32, wanted torch.int64"),
        ("base_model.model.head.0.bias", torch.ones(6, dtype=torch.int8), "wanted floating point"),
        ("base_model.model.head.0.bias", torch.full((6,), torch.inf), "are not finite"),
        ("base_model.model.head.0.bias", torch.ones(5), r"got shape \[5\], wanted \[6\]"),
    ):
        save_file(tensors | {key: value}, file)
        with pytest.raises(ValueError, match=message):
            load_adapter(copy.deepcopy(plain), tmp_path)
    del tensors[counter]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="1 tensors are missing"):
        load_adapter(copy.deepcopy(plain), tmp_path)


def test_what_is_in_them_gets_no_adapter(tmp_path):
    plain = base("qwen3_moe").double().eval()
    model = copy.deepcopy(plain)
    names = ["layers.0.mlp", "lm_head"]
    report = inject(
        model, **NUMBERS, target_modules=r".*(gate|lm_head|q_proj)", modules_to_save=names,
        target_parameters=["mlp.experts.down_proj"],
    )  # fmt: skip
    why = "is trained in whole, by modules_to_save"
    assert report.skipped["lm_head"] == why
    assert report.skipped["model.layers.0.mlp.gate"] == why
    assert report.skipped["model.layers.0.mlp.experts.down_proj"] == why
    assert [path for path in report.layers if "layers.0.mlp" in path] == []
    assert "model.layers.1.mlp.experts.down_proj" in report.layers
    _move(model)
    save_adapter(model, tmp_path)
    again = copy.deepcopy(plain)
    load_adapter(again, tmp_path)
    assert torch.equal(_logits(again), _logits(model))
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    assert_close(_logits(theirs), _logits(model))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("lm_head", "modules_to_save: got 'lm_head', wanted a list of names"),
        ([""], "modules_to_save: got [''], wanted a list of names"),
        (["layers"], "modules_to_save: model.layers is a ModuleList, which no one calls"),
        (["mlp", "0.mlp.act_fn"], "model.layers.0.mlp.act_fn is in model.layers.0.mlp, which"),
        (["twin"], "modules_to_save: twin and other_twin are one module"),
        (["hooked"], "modules_to_save: hooked"),
        (["1.mlp.act_fn"], "model.layers.1.mlp.act_fn has no parameters to train"),
    ],
)
def test_what_cannot_be_saved(names, message):
    model = base()
    model.twin = model.other_twin = nn.Linear(2, 2)
    model.hooked = nn.Linear(2, 2)
    model.hooked.register_forward_hook(lambda *a: None)
    before = [(type(m), id(m)) for m in model.modules()]
    with pytest.raises((TypeError, ValueError)) as error:
        inject(model, **NUMBERS, target_modules=TARGETS, modules_to_save=names)
    assert message in str(error.value)
    assert [(type(m), id(m)) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_names_that_match_nothing_are_reported():
    report = inject(base(), **NUMBERS, target_modules=TARGETS, modules_to_save=["score"])
    assert report.skipped == {"score of modules_to_save": "matches no module"}
    assert report.modules_to_save == ()


def test_several_adapters_have_none(tmp_path):
    model = base()
    inject(model, **NUMBERS, target_modules=TARGETS, modules_to_save=["lm_head"])
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"modules_to_save: got \['lm_head'\], wanted none"):
        load_adapter(base(), tmp_path, adapter_name="a")
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapter(model, "a", **NUMBERS, target_modules=TARGETS)
    without = base()
    inject(without, **NUMBERS, target_modules=TARGETS)
    with pytest.raises(ValueError, match=r"1 unexpected \['base_model.model.lm_head.weight'\]"):
        load_adapter(without, tmp_path)
    save_adapter(without, tmp_path / "without")
    with pytest.raises(ValueError, match=r"missing \['base_model.model.lm_head.weight'\]"):
        load_adapter(model, tmp_path / "without")
