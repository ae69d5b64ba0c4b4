"""Adapters on disk: PEFT's format in both directions, and what damaged or hostile files get."""

import json
import os
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn

safetensors_torch = pytest.importorskip("safetensors.torch")

from fused_lora import FusedLoRALinear, add_adapter, inject, route  # noqa: E402
from fused_lora.adapter_layers import adapted_layers  # noqa: E402
from fused_lora.adapters import load_adapter, save_adapter  # noqa: E402


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(8, 6), nn.Linear(6, 8, bias=False)

    def forward(self, x):
        return self.o_proj(torch.relu(self.q_proj(x)))


def _base(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(Block(), nn.Linear(8, 8), Block()).double()


def _adapted(**options):
    model = _base()
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]} | options
    inject(model, **options)
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            nn.init.normal_(module.lora_B)
            if module.use_dora:
                nn.init.uniform_(module.lora_magnitude_vector)
    return model.eval()


X = torch.randn(5, 8, dtype=torch.float64)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_what_wraps_a_model_is_not_in_its_adapters_names(tmp_path, wrap):
    model = _adapted()
    save_adapter(wrap(model), tmp_path)
    load_adapter(other := _base(), tmp_path)
    assert torch.equal(other.eval()(X), model(X))


def test_a_compiled_part_is_not_in_the_names_either(tmp_path):
    model, other = _adapted(target_modules=["2.q_proj", "2.o_proj"]), _base()
    expected = model(X)
    model[2] = torch.compile(model[2], backend="eager")
    save_adapter(model, tmp_path)
    load_adapter(other, tmp_path)
    assert torch.equal(other.eval()(X), expected)
    load_adapter(model, tmp_path)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("targets", [["q_proj"], ["0.q_proj"], r"0\.[qo]_proj"], ids=str)
def test_into_a_model_with_wrapped_blocks(tmp_path, targets, named):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrapped():
        model = _base()
        model[0] = checkpoint_wrapper(model[0])
        return model

    model = _adapted(target_modules=targets, rank_pattern={"0.q_proj": 2})
    save_adapter(model, tmp_path)
    for other in (wrapped(), _base()):
        load_adapter(other, tmp_path, **({"adapter_name": "a"} if named else {}))
        other.eval()
        with route(other, adapter_names="a") if named else nullcontext():
            torch.testing.assert_close(other(X), model(X))
        save_adapter(other, tmp_path / "again", **({"adapter_name": "a"} if named else {}))
        load_adapter(again := _base(), tmp_path / "again")
        assert torch.equal(again.eval()(X), model(X))


@pytest.mark.filterwarnings("error")
def test_adapters_that_share_a_matrix_and_alphas_of_numpy(tmp_path):
    numpy = pytest.importorskip("numpy")
    model = _adapted(lora_alpha=numpy.float32(6), target_modules=["0.q_proj", "2.q_proj"])
    model[2].q_proj.lora_A = model[0].q_proj.lora_A
    save_adapter(model, tmp_path)
    load_adapter(other := _base(), tmp_path)
    assert torch.equal(other.eval()(X), model(X))


OPTIONS = {
    "names": {},
    "one path": {"target_modules": ["0.q_proj"]},
    "rslora and dropout": {"use_rslora": True, "lora_dropout": 0.25},
    "dora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"2\.o_proj": 1.5}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_round_trip(tmp_path, options):
    model = _adapted(**options)
    save_adapter(model, tmp_path)
    for other in (_base(), _adapted(**options)):  # without adapters, and with
        adapted = any(isinstance(m, FusedLoRALinear) for m in other.modules())
        report = load_adapter(other, tmp_path)
        assert torch.equal(other.eval()(X), model(X))
        assert report is None if adapted else report.layers == tuple(adapted_layers(model))
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_peft_loads_what_we_save(tmp_path, options):
    peft = pytest.importorskip("peft")
    model = _adapted(**options)
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(_base(), tmp_path).eval()
    torch.testing.assert_close(theirs(X), model(X))
    adapted = [n for n, m in theirs.named_modules() if hasattr(m, "lora_A")]
    ours = [n for n, m in model.named_modules() if isinstance(m, FusedLoRALinear)]
    assert adapted == [f"base_model.model.{path}" for path in ours]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_we_load_what_peft_saves(tmp_path, options):
    peft = pytest.importorskip("peft")
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]} | options
    theirs = peft.get_peft_model(_base(), peft.LoraConfig(**options)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
        elif "magnitude" in name:
            nn.init.uniform_(parameter)
    theirs.save_pretrained(tmp_path)
    model = _base()
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model.eval()(X), theirs(X))


def test_models_of_peft_are_told_what_to_call(tmp_path):
    peft = pytest.importorskip("peft")
    save_adapter(_adapted(), tmp_path)
    model = peft.PeftModel.from_pretrained(_base(), tmp_path)
    with pytest.raises(ValueError, match=r"has PEFT's adapters; .* call its own load_adapter"):
        load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="has PEFT's adapters; call its own save_pretrained"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_adapter_goes_onto_quantised_layers_of_others(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 8))
    inject(model, 2, 4, ["0"])
    nn.init.normal_(model[0].lora_B)
    save_adapter(model, tmp_path)
    other = nn.Sequential(bnb.nn.Linear4bit(64, 8, quant_type="nf4")).to("cpu")
    load_adapter(other, tmp_path)
    assert other[0].weight.layout.format == "nf4"
    assert torch.equal(other[0].lora_B, model[0].lora_B)


def test_layers_with_the_end_of_anothers_path_are_told_apart(tmp_path):
    peft = pytest.importorskip("peft")

    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Linear(4, 4)}), "b": nn.Linear(4, 4)})

    model = base()
    inject(model, 2, 4, r"b")  # as a list it would match a.b too
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path)
    assert [n for n, m in theirs.named_modules() if hasattr(m, "lora_A")] == ["base_model.model.b"]


def test_values_are_cast_to_the_parameters_dtype(tmp_path):
    save_adapter(_adapted(), tmp_path)
    model = _adapted(adapter_dtype=torch.bfloat16)
    load_adapter(model, tmp_path)
    assert model[0].q_proj.lora_A.dtype == torch.bfloat16


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):

    model = _adapted()
    save_adapter(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors_torch, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(_adapted(r=5), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_models_that_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match="model: got list"):
        save_adapter([], tmp_path)
    with pytest.raises(ValueError, match="has no FusedLoRALinear"):
        save_adapter(_base(), tmp_path)
    with pytest.raises(ValueError, match="a FusedLoRALinear itself"):
        save_adapter(FusedLoRALinear(4, 4), tmp_path)
    model = _adapted()
    model[0].q_proj.merge()
    with pytest.raises(ValueError, match="0.q_proj is merged"):
        save_adapter(model, tmp_path)
    mixed = _adapted()
    mixed[0].q_proj.lora_dropout = 0.5
    with pytest.raises(ValueError, match="differ in lora_dropout"):
        save_adapter(mixed, tmp_path)
    assert list(tmp_path.iterdir()) == []


def _edit(**fields):
    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def _config_text(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def _weights(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        tensors = safetensors_torch.load_file(path)
        change(tensors)
        safetensors_torch.save_file(tensors, path)

    return edit


def _bytes(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return edit


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def _only_a_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


KEY = "base_model.model.0.q_proj.lora_A.weight"
HOSTILE = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "there is no such file"),
    "config is a folder": (
        lambda f: ((f / "adapter_config.json").unlink(), (f / "adapter_config.json").mkdir()),
        "there is no such file",
    ),
    "config not JSON": (_config_text("{"), "is not JSON"),
    "config deep": (_config_text("[" * 100_000), "is not JSON"),
    "config huge": (_config_text(" " * (1 << 21)), "is no adapter config"),
    "config a list": (_config_text("[]"), "got a JSON list, wanted an object"),
    "other method": (_edit(peft_type="IA3"), "peft_type: got 'IA3', wanted 'LORA'"),
    "dora without magnitudes": (_edit(use_dora=True), "4 tensors are missing"),
    "dora a string": (_edit(use_dora="yes"), "use_dora: got 'yes'"),
    "bias": (_edit(bias="all"), "bias: got 'all'"),
    "pissa": (_edit(init_lora_weights="pissa"), "init_lora_weights: got 'pissa'"),
    "modules_to_save": (_edit(modules_to_save="x"), "modules_to_save: got 'x'"),
    "lora_bias": (_edit(lora_bias=True), "lora_bias: got True"),
    "fan_in_fan_out": (_edit(fan_in_fan_out=True), "fan_in_fan_out: got True"),
    "unknown field": (_edit(use_warp=3), "use_warp: got 3"),
    "r missing": (_edit(r=None), "r: is missing"),
    "r a bool": (_edit(r=True), "r: got True"),
    "r a float": (_edit(r=3.0), "r: got 3.0"),
    "r zero": (_edit(r=0), "r: got 0"),
    "r huge": (_edit(r=10**30), "wanted [1000"),
    "r in a pattern": (_edit(rank_pattern={"q_proj": "3"}), "rank_pattern['q_proj']: got '3'"),
    "alpha NaN": (_edit(lora_alpha=float("nan")), "lora_alpha: got nan"),
    "alpha huge": (_edit(lora_alpha=10**400), "lora_alpha: got 1000"),
    "dropout": (_edit(lora_dropout=1.5), "lora_dropout: got 1.5"),
    "rslora a string": (_edit(use_rslora="yes"), "use_rslora: got 'yes'"),
    "targets a number": (_edit(target_modules=3), "target_modules: got 3"),
    "targets no module": (
        _edit(target_modules=["k_proj"]),
        "target_modules: ['k_proj'] matches no nn.Linear of the model, which has [",
    ),
    "targets a slow pattern": (_edit(target_modules="(a+)+b"), "none of a group"),
    "a slow pattern with spaces": (_edit(target_modules="(?x)(.+) +!"), "none of a group"),
    "targets of too many ways": (
        _edit(target_modules="(.|.)" * 30 + "!"),
        "at most 16384 combinations of alternatives",
    ),
    "pattern a list": (_edit(alpha_pattern=[1]), "alpha_pattern: got [1]"),
    "pickle": (_only_a_pickle, "is a pickle, which is never loaded"),
    "pickle in disguise": (_bytes(lambda b: pickle.dumps(Bomb())), "is no safetensors file"),
    "truncated": (_bytes(lambda b: b[:-7]), "is no safetensors file"),
    "empty": (_bytes(lambda b: b""), "is no safetensors file"),
    "huge header": (_bytes(lambda b: b"\xff" * 8 + b[8:]), "is no safetensors file"),
    "missing tensor": (_weights(lambda t: t.pop(KEY)), "1 tensors are missing"),
    "path trick": (
        _weights(lambda t: t.update({"base_model.model.../../x.lora_A.weight": torch.ones(1)})),
        "1 unexpected",
    ),
    "wrong shape": (
        _weights(lambda t: t.update({KEY: torch.ones(8, 3)})),
        "got shape [8, 3], wanted [3, 8]",
    ),
    "integers": (
        _weights(lambda t: t.update({KEY: torch.ones(3, 8, dtype=torch.int32)})),
        "got torch.int32",
    ),
    "NaN": (_weights(lambda t: t[KEY].fill_(float("nan"))), "values that are not finite"),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize(("damage", "message"), HOSTILE.values(), ids=HOSTILE)
def test_refused_and_unchanged(tmp_path, damage, message, adapted):
    save_adapter(_adapted(), tmp_path)
    damage(tmp_path)
    model = _adapted() if adapted else _base()
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, list(model.modules())
    if adapted and ("matches no nn.Linear" in message or message == "wanted [1000"):
        pytest.skip("the layers are the model's own")
    with pytest.raises((ValueError, FileNotFoundError, TypeError)) as info:
        load_adapter(model, tmp_path)
    assert message in str(info.value)
    assert list(model.modules()) == modules
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_model_with_other_layers_ranks_or_scaling_is_refused(tmp_path):
    save_adapter(_adapted(), tmp_path)
    for options, message in [
        ({"target_modules": ["q_proj"]}, "4 unexpected"),
        ({"r": 2}, "got shape"),
        ({"lora_alpha": 5}, "a scaling of 2.0, the model's is"),
        ({"use_dora": True}, "use_dora: got False, and 0.q_proj of the model has True"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_adapter(_adapted(**options), tmp_path)
    merged = _adapted()
    merged[0].q_proj.merge()
    with pytest.raises(ValueError, match="is merged"):
        load_adapter(merged, tmp_path)


def test_patterns_match_no_other_path(tmp_path):
    """Without an anchor, in PEFT's rule "q_proj" is the end of "0.q_proj" too."""

    def base():
        return nn.ModuleDict({"q_proj": nn.Linear(8, 8), "0": Block(), "k": nn.Linear(8, 8)})

    model = base()
    patterns = {"rank_pattern": {"^q_proj": 2}, "alpha_pattern": {"^q_proj": 32}}
    inject(model, 3, 6, ["k", "q_proj"], **patterns)
    save_adapter(model, tmp_path)
    other = base()
    load_adapter(other, tmp_path)
    scalings = {p: m.scaling for p, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    assert scalings == {"q_proj": 16.0, "0.q_proj": 2.0, "k": 2.0}
    assert scalings == {
        p: m.scaling for p, m in other.named_modules() if isinstance(m, FusedLoRALinear)
    }


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("adapted_before", [False, True])
def test_a_module_at_two_paths_is_refused(tmp_path, named, adapted_before):
    save_adapter(_adapted(), tmp_path)
    model = _base()
    model[2] = model[0]
    name = "one" if named else None
    if adapted_before:
        targets = ["q_proj", "o_proj"]
        add_adapter(model, "one", 3, 6, targets) if named else inject(model, 3, 6, targets)
        with pytest.raises(ValueError, match=r"0.q_proj and 2.q_proj are one module"):
            save_adapter(model, tmp_path / "other", adapter_name=name)
        assert not (tmp_path / "other").exists()
        return
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"0.q_proj and 2.q_proj are one module"):
        load_adapter(model, tmp_path, adapter_name=name)
    assert dict(model.named_modules()) == before


def test_what_is_saved_is_what_the_layers_compute(tmp_path):
    """Another scaling, or A and B of another rank, put in by hand."""
    model = _adapted(use_rslora=True)
    model[0].q_proj.scaling = 5.0
    model[2].o_proj.lora_A = nn.Parameter(torch.randn(7, 6, dtype=torch.float64))
    model[2].o_proj.lora_B = nn.Parameter(torch.randn(8, 7, dtype=torch.float64))
    save_adapter(model, tmp_path)
    other = _base()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other.eval()(X), model(X))


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_the_codes_of_a_residual_are_not_in_the_files(tmp_path, start):
    model = _base().float()
    inject(model, 2, 4, ["q_proj"], init_lora_weights=start, quantize="int8")
    with pytest.warns(UserWarning, match="trained over the codes of a residual"):
        save_adapter(model, tmp_path)


def test_a_folder_that_is_not_there_or_is_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_adapter(_base(), "somebody/an-adapter")
    save_adapter(_adapted(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    with pytest.raises(FileNotFoundError, match="is a file, wanted the adapter's folder"):
        load_adapter(_base(), file)


def test_transformers_saves_a_model_with_codes_and_peft_finds_its_class(tmp_path):
    """Codebooks share no memory, which `save_pretrained` refuses."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    inject(model, 2, 4, ["q_proj", "v_proj"])
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            nn.init.normal_(module.lora_B)
    save_adapter(model, tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    ids = torch.arange(8)[None]
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits)

    class OursForCausalLM(nn.Module):  # without `generate`, which PEFT's class for it wants
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

    ours = OursForCausalLM()
    inject(ours, 2, 4, ["q_proj"])
    save_adapter(ours, tmp_path / "ours")
    peft.PeftModel.from_pretrained(OursForCausalLM(), tmp_path / "ours")

    quantised = transformers.LlamaForCausalLM(config)
    inject(quantised, 2, 4, "all-linear", quantize="nf4")
    quantised.save_pretrained(tmp_path / "codes")


def test_values_that_the_layers_dtype_has_not_are_refused(tmp_path):
    model = _adapted()
    with torch.no_grad():
        model[0].q_proj.lora_A.mul_(1e6)
    save_adapter(model, tmp_path)
    half = _adapted(adapter_dtype=torch.float16)
    before = half[0].q_proj.lora_A.clone()
    with pytest.raises(ValueError, match=r"q_proj.lora_A.*not finite in the layer's torch.float16"):
        load_adapter(half, tmp_path)
    assert torch.equal(half[0].q_proj.lora_A, before)


@pytest.mark.parametrize("name", [None, "a"])
def test_values_that_a_new_layers_dtype_has_not_are_refused(tmp_path, name):
    from safetensors.torch import load_file, save_file

    model = _base().float()
    inject(model, 2, 4, ["q_proj"])
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: tensor.double() for key, tensor in load_file(file).items()}
    next(iter(tensors.values())).fill_(1e300)
    save_file(tensors, file)
    plain = _base().float()
    before = str(plain)
    with pytest.raises(ValueError, match=r"not finite in the layer's torch\.float32"):
        load_adapter(plain, tmp_path, adapter_name=name)
    assert str(plain) == before


def test_scalings_that_an_alpha_only_nearly_gives(tmp_path):
    """As many as there are: r 7 and a scaling of 1.3 give 1.3000000000000003 back."""
    for r in (3, 5, 6, 7, 11, 13):
        for scaling in (0.1, 0.7, 1.3):
            model = nn.Sequential(nn.Linear(16, 16))
            inject(model, r, 16, ["0"])
            model[0].scaling = scaling
            save_adapter(model, tmp_path)
            load_adapter(model, tmp_path)
            assert model[0].scaling == scaling


def test_groups_without_a_number_are_no_repetitions(tmp_path):
    model = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
    inject(model, 2, 4, ["q_proj"])
    save_adapter(model, tmp_path)
    _edit(target_modules=r"(?:self_attn|mlp)\.(?:q_proj|k_proj)(?:|a)(?:|b)(?:|c)")(tmp_path)
    plain = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})
    load_adapter(plain, tmp_path)
    loaded, saved = plain["self_attn"]["q_proj"], model["self_attn"]["q_proj"]
    assert torch.equal(loaded.lora_A, saved.lora_A)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_mode_that_others_have(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_adapter(_adapted(), tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}
