"""Tuning with a fake timer, and the tables that it writes."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle import check, fused, problem, run
from pretending import pretend

from benchmarks import tune as benchmark
from fused_lora import dispatch, explain, tables
from fused_lora import tune as module
from fused_lora.calls import Call, checked_call, transposed
from fused_lora.dispatch import Plan, forget_plans, plan
from fused_lora.kernels.configs import ship
from fused_lora.kernels.device import INTERPRETED, SHARED_MEMORY, DeviceInfo
from fused_lora.kernels.tile_config import TileConfig
from fused_lora.tables import Choice, key, save, table, user_path
from fused_lora.tune import candidates, tune

ROOT = Path(__file__).parents[1]
GPU = INTERPRETED.name
TILE = TileConfig(128, 128, 64, 8, 4, GROUP_M=8, SUBTILES=2)
CALL = Call(5, 16, 24, 8, torch.float16, torch.device("cpu"), False, plain_tensors=True)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A user cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for forget in (table.cache_clear, forget_plans):
        forget()
    yield
    for forget in (table.cache_clear, forget_plans):
        forget()


@pytest.fixture
def one_tile_each(monkeypatch):
    """The interpreter is slow; one tile of every strategy is enough here."""
    for place in (module, dispatch):
        monkeypatch.setattr(place, "tunable", lambda *arguments: ship(*arguments[:5])[:1])


def _fake_timer(fastest):
    """Pretends that one strategy is faster than the others."""

    def timer(calls):
        for call in calls:
            call()
        return [1e-6 if call.args[0] == fastest else 2e-6 for call in calls]

    return timer


@pytest.mark.usefixtures("one_tile_each")
@pytest.mark.parametrize("strategy", ["tma_split", "one_launch", "skinny", "library"])
def test_what_measured_best_is_taken_from_then_on(launches, strategy):
    """In both directions; a new number of rows in the same power of two is the same problem."""
    best = tune(
        [(5, 16, 24)],
        ranks=[8],
        dtypes=[torch.float16],
        device="cpu",
        timer=_fake_timer(strategy),
    )
    made = {name: choice.strategy for name, choice in best.items() if choice.strategy}
    assert {*made.values()} == {strategy}
    assert len(made) == 2
    launches.clear()
    p = problem(7, 16, 24, 8, dtype=torch.float16)
    check(run(fused("triton"), p), p)
    wanted = {
        "tma_split": "persistent_add_lora",
        "one_launch": "persistent_produced",
        "skinny": "skinny",
        "library": "gemm_scaled",
    }[strategy]
    assert launches.count(wanted) == 2
    other = plan(replace(CALL, M=9), "triton")
    assert other.strategy != strategy


def test_progress_hears_of_every_candidate_and_of_failures():
    heard = []

    def timer(calls):
        if calls[0].args[0] == "one_launch":
            raise RuntimeError("out of resources")
        return [1.0] * len(calls)

    tune(
        [(5, 16, 24)],
        ranks=[8],
        dtypes=[torch.float16],
        products=["forward"],
        device="cpu",
        timer=timer,
        progress=lambda done, total, m: heard.append((done, total, m)),
    )
    assert [(done, total) for done, total, _ in heard] == [(0, 1)] * len(heard)
    assert len(heard) == len(list(candidates(CALL, "forward")))
    failed = [m for _, _, m in heard if m.seconds is None]
    assert {m.strategy for m in failed} == {"one_launch"}
    assert all("out of resources" in m.problem for m in failed)


def test_those_that_were_fastest_take_turns_which_decides():
    """One after another, the first have a colder GPU."""
    raced = []

    def timer(calls):
        if len(calls) == 1:
            return [1.0 + every.index(calls[0].args)]
        raced.append([call.args for call in calls])
        return [3.0, 4.0, 2.0, 5.0]

    every = [*candidates(CALL, "forward")]
    best = tune(
        [(5, 16, 24)],
        ranks=[8],
        dtypes=[torch.float16],
        products=["forward"],
        device="cpu",
        timer=timer,
    )
    assert raced == [every[:4]]
    assert [*best.values()] == [Choice(*every[2], 2.0)]


@pytest.mark.parametrize("dropout", [False, True])
def test_tiles_of_h_and_of_the_gradients(launches, monkeypatch, dropout):
    """Measured and taken as what makes y is; h's before that, which is measured with it."""
    from fused_lora import triton_backend

    heard, used = [], []
    found = {
        "h": TileConfig(32, 16, 64, num_warps=4, num_stages=8),
        "grads": TileConfig(64, 16, 32, num_warps=4, num_stages=6, maxnreg=168),
    }
    tune(
        [(40, 16, 24)],
        ranks=[8],
        dtypes=[torch.float16],
        dropouts=[dropout],
        products=["grads", "h"],
        device="cpu",
        timer=lambda calls: [1.0 if call.args[1] in found.values() else 2.0 for call in calls],
        progress=lambda done, total, m: heard.append(m),
    )
    assert {m.problem for m in heard} == {""}
    of_K, of_N, of_both = (
        key("h", 40, 8, 24, 8, "float16", dropout),
        key("h", 40, 8, 16, 8, "float16", False),
        key("grads", 40, 16, 24, 8, "float16", dropout),
    )
    assert {name: choice.config for name, choice in table(GPU).items()} == {
        of_K: found["h"],
        of_N: found["h"],
        of_both: found["grads"],
    }
    for name in ("gemm_scaled", "lora_grads"):
        real = getattr(triton_backend, name)
        monkeypatch.setattr(
            triton_backend, name, lambda c, *a, real=real, **k: used.append(c) or real(c, *a, **k)
        )
    p = problem(
        40, 16, 24, 8, dtype=torch.float16, adapter_dtype=torch.float16, dropout_p=0.1 * dropout
    )
    check(run(fused(Plan("triton", "split", "split")), p), p)
    assert used == [found["h"], found["h"], found["grads"]]


@pytest.mark.usefixtures("one_tile_each")
def test_a_wrong_candidate_is_never_chosen(monkeypatch):
    from fused_lora import triton_backend

    monkeypatch.setattr(
        triton_backend, "skinny", lambda *a, **k: (torch.full((5, 16), float("nan")), None)
    )
    best = tune(
        [(5, 16, 24)],
        ranks=[8],
        dtypes=[torch.float16],
        products=["forward"],
        device="cpu",
        timer=_fake_timer("skinny"),
    )
    assert [choice.strategy for choice in best.values()] != ["skinny"]


def test_dropout_candidates_are_those_that_can_take_it():
    dropped = replace(CALL, dropout=True)
    forward = {strategy for strategy, _ in candidates(dropped, "forward")}
    dx = {strategy for strategy, _ in candidates(replace(dropped, direction="dx"), "dx")}
    assert forward == dx == {"split", "library", "tma_split", "one_launch", "skinny"}


def test_tuning_where_no_kernel_runs():
    with pytest.raises(RuntimeError, match="cannot tune for M, N, K = 5, 16, 24: x: got dtype"):
        tune([(5, 16, 24)], dtypes=[torch.bfloat16], device="cpu")


NAME = key("forward", 5, 16, 24, 8, "float16", False)


def test_saving_adds_to_what_is_there():
    save(GPU, {NAME: Choice("tma_split", TILE, 1e-6), "other": Choice("skinny", None, 1e-6)})
    save(GPU, {"other": Choice("split", None, 5e-7)})
    assert table(GPU) == {
        NAME: Choice("tma_split", TILE, 1e-6),
        "other": Choice("split", None, 5e-7),
    }
    assert [p.suffix for p in sorted(user_path(GPU).parent.iterdir())] == [".json", ".lock"]


def test_saving_from_many_processes_loses_nothing():
    program = """
import sys
from fused_lora.tables import Choice, save
for i in range(5):
    save("a GPU", {f"{sys.argv[1]} {i}": Choice("split", None, 1.0)})
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(n)], env=os.environ) for n in range(4)
    ]
    assert [p.wait(120) for p in processes] == [0] * 4
    assert len(table("a GPU")) == 20


def _break(path, how):
    content = json.loads(path.read_text())
    entry = content["entries"][NAME]
    if how == "not JSON":
        return path.write_text("{")
    if how == "another triton":
        content["triton"] = "1.0"
    elif how == "other kernels":
        content["kernels"] = "0" * 16
    elif how == "another GPU":
        content["gpu"] = "another"
    elif how == "unknown field":
        entry["config"] = {"BLOCK_Q": 1}
    elif how == "no strategy":
        del entry["strategy"]
    elif how == "a list":
        content = [content]
    return path.write_text(json.dumps(content))


BROKEN = [
    "not JSON",
    "another triton",
    "other kernels",
    "another GPU",
    "unknown field",
    "no strategy",
    "a list",
]


@pytest.mark.parametrize("how", BROKEN)
def test_a_stale_or_broken_table_is_ignored_with_one_warning(how):
    save(GPU, {NAME: Choice("skinny", None, 1e-6)})
    _break(user_path(GPU), how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = plan(CALL, "triton")
        plan(replace(CALL, M=6), "triton")
    assert chosen.strategy in ("one_pass", "split")
    (warning,) = caught
    assert "is ignored: it" in str(warning.message)


@pytest.mark.filterwarnings("ignore:tuned table")
def test_a_broken_table_can_be_written_anew():
    save(GPU, {NAME: Choice("skinny", None, 1e-6)})
    user_path(GPU).write_text("{")
    save(GPU, {"new": Choice("split", None, 1e-6)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(table(GPU)) == {"new"}


def test_the_users_table_goes_before_the_shipped(monkeypatch, tmp_path):
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(tables, "SHIPPED", shipped)
    save(GPU, {NAME: Choice("split", None, 1.0), "other": Choice("split", None, 1.0)})
    shipped.mkdir()
    user_path(GPU).rename(shipped / user_path(GPU).name)
    save(GPU, {NAME: Choice("skinny", None, 1.0)})
    assert table(GPU)[NAME].strategy == "skinny"
    assert table(GPU)["other"].strategy == "split"


def test_a_choice_that_cannot_take_the_call_is_passed_over():
    """Written by hand, or measured before a kernel lost a form."""
    dropped = replace(CALL, dropout=True)
    save(GPU, {dispatch.table_key(dropped, "forward"): Choice("one_pass", None, 1e-6)})
    assert plan(dropped, "triton").strategy == dispatch._by_model(dropped)


@pytest.mark.parametrize(("r", "runs"), [(8, "one_launch"), (4, "library")])
def test_explain_names_what_dx_becomes(launches, r, runs):
    """Rows of B of 8 bytes have no descriptor."""
    p = problem(40, 16, 24, r, dtype=torch.float16)
    call = checked_call(p.x, p.weight, p.lora_A, p.lora_B, None, False)
    name = dispatch.table_key(transposed(call), "dx")
    save(GPU, {name: Choice("one_launch", None, 1e-6)})
    found = explain(p.x, p.weight, p.lora_A, p.lora_B, backend="triton")
    assert found.strategy_dx == runs
    run(fused("triton"), p)
    assert launches.count("persistent_produced") == (runs == "one_launch")


@pytest.mark.parametrize(("M", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (1024, 1024)])
def test_rows_count_for_their_power_of_two(M, expected):
    assert tables.bucket(M) == expected


@pytest.mark.usefixtures("one_tile_each")
def test_workers_compile_first(monkeypatch, device):
    """In processes of their own; what is measured afterwards is the same."""
    # What is scheduled by hand is compiled, and measured, by itself and last.
    pretend(monkeypatch.setattr, specialized_obstacle=lambda *_: "not here")
    compiled = []
    real = module._compile_all
    monkeypatch.setattr(module, "_compile_all", lambda *a: compiled.append(len(a[1])) or real(*a))
    problem = {"ranks": [8], "dtypes": [torch.float16], "products": ["forward"]}
    tune([(5, 16, 24)], **problem, device=device, timer=_fake_timer("skinny"), workers=1)
    assert compiled == [1]


BATCHES = [
    benchmark.Batch(5, 8, (False, True), ((16, 24),)),
    benchmark.Batch(9, 8, (False,), ((16, 24),)),
]
KEYS = {
    "h M8 N8 K24 r8 float16",
    "h M8 N8 K16 r8 float16",
    "h M8 N8 K24 r8 float16 dropout",
    "grads M8 N16 K24 r8 float16",
    "grads M8 N16 K24 r8 float16 dropout",
    "forward M8 N16 K24 r8 float16",
    "forward M8 N16 K24 r8 float16 dropout",
    "dx M8 N24 K16 r8 float16",
    "dx M8 N24 K16 r8 float16 dropout",
    "h M16 N8 K24 r8 float16",
    "h M16 N8 K16 r8 float16",
    "grads M16 N16 K24 r8 float16",
    "forward M16 N16 K24 r8 float16",
    "dx M16 N24 K16 r8 float16",
}


def _tune_all(path, timer, deadline=float("inf"), workers=0):
    options = {"dtype": torch.float16, "deadline": deadline, "workers": workers, "timer": timer}
    return benchmark.tune_all(BATCHES, path, torch.device("cpu"), **options)


@pytest.mark.usefixtures("one_tile_each")
def test_all_batches_in_one_program(monkeypatch, tmp_path, capsys):
    """One table of all, there after each problem; a warning would say that it is no table."""
    path = tmp_path / "tuned_GPU.json"
    written, write = [], tables.write
    monkeypatch.setattr(tables, "write", lambda *a: written.append(a[0]) or write(*a))
    assert _tune_all(path, _fake_timer("split"))
    assert written.count(path) == len(KEYS)
    with warnings.catch_warnings(action="error"):
        assert set(tables._read(path, GPU)) == KEYS
    assert "forward M8 N16 K24 r8 float16" in capsys.readouterr().out


@pytest.mark.usefixtures("one_tile_each")
def test_all_batches_share_their_processes(monkeypatch, tmp_path):
    """Starting one costs seconds: it imports torch and makes a CUDA context."""
    pools, compiled = [], []

    def processes(workers):
        pools.append(workers)
        return contextlib.nullcontext(
            SimpleNamespace(map=lambda _, jobs: compiled.extend(jobs) or ())
        )

    monkeypatch.setattr(benchmark, "processes", processes)
    assert _tune_all(tmp_path / "tuned_GPU.json", _fake_timer("split"), workers=3)
    assert pools == [3]
    assert {call.M for call, *_ in compiled} == {5, 9}


@pytest.mark.usefixtures("one_tile_each")
def test_at_its_limit_a_table_has_what_was_measured_to_the_end(monkeypatch, tmp_path, capsys):
    """The best of the others is no choice where what is scheduled by hand is left."""
    path = tmp_path / "tuned_GPU.json"
    assert not _tune_all(path, _fake_timer("split"), deadline=0.0)
    assert len(tables._read(path, GPU)) == 1
    assert f"out of time: {len(KEYS) - 1} problems left" in capsys.readouterr().out
    pretend(monkeypatch.setattr, specialized_obstacle=lambda *_: None)
    now = iter([0.0] * 8 + [2.0])  # five of h and the gradients, four of y and dx
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert not _tune_all(path, _fake_timer("split"), deadline=1.0)
    dropped = "dx M8 N24 K16 r8 float16 dropout"  # none of its candidates is scheduled by hand
    first = {key for key in KEYS if key.startswith(("h M8", "grads M8"))}
    assert set(tables._read(path, GPU)) == first | {dropped}
    assert f"out of time: {len(KEYS) - 6} problems left" in capsys.readouterr().out


def test_the_benchmark_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "needs a GPU" in capsys.readouterr().err


def test_the_benchmark_needs_torch_and_triton_only():
    program = """
import sys
for name in ("typer", "rich", "matplotlib", "peft", "transformers", "safetensors", "pytest"):
    sys.modules[name] = None
import benchmarks.tune
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def _command(*arguments):
    pytest.importorskip("typer")
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    pytest.importorskip("safetensors")
    from typer.testing import CliRunner

    from fused_lora.cli import app

    return CliRunner().invoke(app, ["tune", *arguments])


@pytest.mark.usefixtures("one_tile_each")
def test_command(monkeypatch):
    timed = functools.partial(tune, timer=_fake_timer("skinny"))
    monkeypatch.setattr(module, "tune", timed)
    result = _command("--shapes", "5,16,24", "--r", "8", "--dtype", "float16", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "skinny" in result.output
    assert str(user_path(GPU)) in result.output.replace("\n", "")
    assert set(table(GPU)) == {
        key("forward", 5, 16, 24, 8, "float16", False),
        key("dx", 5, 24, 16, 8, "float16", False),
        key("h", 5, 8, 24, 8, "float16", False),
        key("h", 5, 8, 16, 8, "float16", False),
        key("grads", 5, 16, 24, 8, "float16", False),
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "shapes: got none"),
        (["--shapes", "1,2"], "shapes: got '1,2', wanted M,N,K"),
        (["--shapes", "0,2,3"], "wanted sizes of at least 1"),
        (["--shapes", "1,2,3", "--dtype", "int8"], "dtype: got 'int8'"),
        (["--shapes", "1,2,3", "--device", "cpu", "--dtype", "bfloat16"], "bfloat16 under"),
    ],
)
def test_command_with_bad_input(arguments, message):
    result = _command(*arguments)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


@pytest.mark.parametrize("path", sorted(tables.SHIPPED.glob("*.json")), ids=lambda p: p.stem)
def test_what_ships_is_what_tuning_can_choose(monkeypatch, path):
    """Whatever has become of the kernels since: every entry is a candidate, and is taken."""
    content = json.loads(path.read_text())
    gpu = DeviceInfo(90, 132, SHARED_MEMORY[90], name=content["gpu"])
    monkeypatch.setattr(module, "device_info", lambda _: gpu)
    pretend(monkeypatch.setattr, device_info=lambda _: gpu)
    pretend(monkeypatch.setattr, specialized_obstacle=lambda *_: None)
    with warnings.catch_warnings(action="error"):
        chosen = table(content["gpu"])
    assert len(chosen) > 50
    for name, choice in chosen.items():
        direction, M, N, K, r, dtype, *dropout = name.split()
        sizes = [int(size.lstrip("MNKr")) for size in (M, N, K, r)]
        call = Call(*sizes, getattr(torch, dtype), torch.device("cuda", 0), bool(dropout), True)
        call = replace(call, direction="dx") if direction == "dx" else call
        assert (choice.strategy, choice.config) in candidates(call, direction), name
        if choice.strategy is None:
            of = call.M, call.N, call.K, call.r, call.dtype, call.dropout, gpu
            assert dispatch.part_config(direction, *of) == choice.config
            continue
        asked = call if direction == "forward" else transposed(call)
        taken = plan(asked, "auto")
        if direction == "forward":
            assert (taken.strategy, taken.config) == (choice.strategy, choice.config)
        else:
            assert (taken.strategy_dx, taken.config_dx) == (choice.strategy, choice.config)
