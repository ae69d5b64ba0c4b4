"""The benchmark suite: correct providers, rows that say where they come from, a report of them."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import OUT_OF_TIME, experts, groups, kinds, measure, rows, run, sanitize, shapes
from benchmarks.multi import MULTI
from benchmarks.providers import CPU_PROVIDERS, EAGER, PROVIDERS
from benchmarks.quantized import QUANTIZED
from benchmarks.shapes import FORMATS, SELECTIONS, Case, select
from fused_lora import device_time

ROOT = Path(__file__).parents[1]
TINY = Case("tiny", 5, 48, 32, 4, 0.1, "fp32", "fp32")
QUANTISED = Case("tiny", 5, 48, 64, 4, 0.0, "fp32", "fp32", "nf4")
MANY = Case("tiny", 12, 48, 64, 4, 0.0, "fp32", "fp32", adapters=3)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products on several threads wait for each other for most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selections_have_each_shape_once(selection):
    cases = select(selection)
    assert cases
    assert len({replace(case, layer="") for case in cases}) == len(cases)


def test_quick_has_what_the_gpu_plan_asks_for():
    cases = set(select("quick"))
    llama = [(14336, 4096), (4096, 14336), (1024, 4096)]
    for N, K in [(side, side) for side in (4096, 5120, 8192)] + llama:
        for M in (2048, 8192):
            for r in (16, 64):
                for dropout in (0.0, 0.1):
                    assert any(
                        (c.M, c.N, c.K, c.r, c.dropout, c.dtype) == (M, N, K, r, dropout, "bf16")
                        for c in cases
                    )
    formats = {c.format for c in cases if c.kind == "quantised"}
    assert formats == {"nf4", "fp8", "fp8 activations"}
    for format in ("none", "nf4"):
        assert any(c.kind == "multi" and c.ragged and c.format == format for c in cases)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("adapter_dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "compile"])
def test_providers_are_correct(device, name, adapter_dtype, dropout):
    M = 60 if name == "peft_fused" else 70
    case = replace(TINY, M=M, dtype=adapter_dtype, adapter_dtype="fp32", dropout=dropout)
    provider, p = PROVIDERS[name], kinds.make_problem(case, device)
    if name == "one_pass" and dropout:
        assert "dropout" in provider.obstacle(p)
    else:
        assert provider.obstacle(p) is None
        measure.assert_correct(provider, p)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", QUANTIZED)
def test_providers_of_quantised_weights_are_correct(device, name, format):
    case = replace(QUANTISED, M=20, K=128, format=format)
    provider, p = QUANTIZED[name], kinds.make_problem(case, device)
    if why := provider.obstacle(p):
        assert name == "peft_bnb"
        pytest.skip(why)
    measure.assert_correct(provider, p)
    held = provider.weight_bytes(p)
    assert held == (p.weight.nbytes if name in ("unquantised", "linear") else p.codes.nbytes)


@pytest.mark.parametrize("format", ["none", "nf4"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("name", MULTI)
def test_providers_of_many_adapters_are_correct(device, name, ragged, format):
    case = replace(MANY, ragged=ragged, format=format)
    assert case.rows == ([2, 4, 6] if ragged else [4, 4, 4])
    provider, p = MULTI[name], kinds.make_problem(case, device)
    if why := provider.obstacle(p):
        assert name == "peft"
        pytest.skip(why)
    measure.assert_correct(provider, p)


@pytest.mark.parametrize("case", [TINY, QUANTISED, MANY], ids=lambda case: case.kind)
def test_a_check_of_many_providers_finds_the_wrong_one(device, case):
    """Also with what the others were compared with."""
    p, known = kinds.make_problem(replace(case, dropout=0.0), device), {}
    right = kinds.providers_of(case)[0]["fused"]
    measure.assert_correct(right, p, known)
    wrong = replace(right, build=lambda p: lambda x: right.build(p)(x) * 1.01)
    with pytest.raises(AssertionError, match="y: error"):
        measure.assert_correct(wrong, p, known)


@pytest.mark.slow
def test_compiled_expression_is_correct(device):
    torch._dynamo.reset()
    measure.assert_correct(PROVIDERS["compile"], kinds.make_problem(TINY, device))


def test_a_wrong_provider_is_left_out_and_the_file_says_why(device):
    def wrong(p):
        right = PROVIDERS[EAGER].build(p)
        return lambda x: right(x) * 1.01

    providers = [replace(PROVIDERS[EAGER], build=wrong), PROVIDERS["addmm"]]
    found, left_out = run.measure_case(TINY, providers, device, 0.0)
    assert {row["provider"] for row in found} == {"addmm"}
    assert [row["provider"] for row in left_out] == [EAGER]
    assert "AssertionError" in left_out[0]["why"]


@pytest.mark.parametrize("case", [QUANTISED, MANY], ids=lambda case: case.kind)
def test_a_commit_without_such_layers_leaves_them_out(monkeypatch, device, case):
    for module in ("multi", "quantized"):
        monkeypatch.setitem(sys.modules, f"benchmarks.{module}", None)
    found, left_out = run.measure_case(case, kinds.choose(case, None, device), device, 0.0)
    assert not found
    assert [row["why"] for row in left_out] == ["there is no provider of this kind"]


def test_a_measurement_takes_turns_and_has_quantiles(device):
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    times = measure.side_by_side(calls, torch.device("cpu"), 0.0)
    assert len(times["a"]) == len(times["b"]) >= 5
    assert set(called) == {"a", "b"}
    assert measure.quantiles([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == {
        "median": 3.5,
        "q20": 2.0,
        "q80": 5.0,
    }


@pytest.mark.parametrize(
    ("spreads", "taken", "attempts"),
    [((1.1, 2.0, 2.0), 1.1, 1), ((2.0, 1.1, 3.0), 1.1, 2), ((2.0, 1.5, 3.0), 1.5, 3)],
)
def test_what_was_disturbed_is_measured_again(monkeypatch, spreads, taken, attempts):
    todo = list(spreads)

    def fake(*_, **__):
        slow = todo.pop(0)
        return {"a": [1.0] * 10, "b": [1.0] * 5 + [slow] * 5}

    monkeypatch.setattr(measure, "side_by_side", fake)
    times = measure.undisturbed({}, torch.device("cpu"), 0.0)
    assert max(times["b"]) == taken
    assert len(todo) == 3 - attempts


def test_cpu_memory_counts_temporaries_and_not_what_was_there_before():
    x = torch.ones(1000)

    def call():
        y = x + 1  # 4000 bytes
        y = y * 2  # 4000 more, at once with the first
        return y.sum()

    assert 8000 <= measure.peak_memory(call, torch.device("cpu")) < 9000


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with the rows of a real run of some cases of every kind."""
    folder = tmp_path_factory.mktemp("results")
    cases = [TINY, replace(TINY, dropout=0.0), next(iter(select("tiny")))]
    cases += [QUANTISED, replace(QUANTISED, format="int8"), MANY, replace(MANY, adapters=12)]
    device = torch.device("cpu")
    environment = rows.environment(device, "perf_counter", "a test")
    path = folder / rows.file_name(environment)
    names = [*CPU_PROVIDERS, "dequantise", "unquantised", "loop", "bmm"]
    options = {"seconds_a_mode": 0.0, "deadline": float("inf"), "resumed": []}
    assert run.measure_all(cases, names, path, environment, device, **options) == 0
    return path


def test_rows_say_what_and_where(results):
    found = rows.load(results)
    assert {row["mode"] for row in found} == {*TINY.modes, "weight", "overhead"}
    by_kind = {}
    for row in found:
        assert set(row) == {*rows.ENVIRONMENT, *rows.MEASURED}
        assert row["q20"] <= row["median"] <= row["q80"]
        assert row["unit"] == ("bytes" if row["mode"] in ("memory", "weight") else "us")
        assert row["torch"] == torch.__version__
        kind = Case(**{name: row[name] for name in vars(TINY)}).kind
        by_kind.setdefault(kind, set()).add(row["provider"])
    assert by_kind["plain"] == set(CPU_PROVIDERS)
    assert by_kind["quantised"] == {"fused", "dequantise", "unquantised", "linear"}
    assert by_kind["multi"] - {"peft"} == {"fused", "loop", "bmm", "linear"}
    (chosen,) = {row["choice"] for row in found if row["provider"] == "fused"}
    assert chosen == "torch library/library"


def test_rows_of_before_quantised_weights_and_many_adapters(results, tmp_path):
    run = json.loads(results.read_text())
    del run["environment"]["bitsandbytes"]
    run["rows"] = [row for row in run["rows"] if row["layer"] == "tiny" and row["dropout"]]
    for row in run["rows"]:
        for name in ("format", "adapters", "ragged"):
            del row[name]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(run))
    old = rows.load(path)
    assert old
    assert {(row["format"], row["adapters"], row["ragged"]) for row in old} == {("none", 1, False)}


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    for text in ("[", "{}", '{"environment": {}, "rows": [{"provider": "fused"}]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"other\.json"):
            rows.load(path)


def test_a_run_out_of_time_is_resumed(results, tmp_path, capsys):
    resumed = rows.load(results)
    environment = rows.environment(torch.device("cpu"), "perf_counter")
    cases = [*dict.fromkeys(Case(**{k: row[k] for k in vars(TINY)}) for row in resumed)]
    late = replace(TINY, M=1)
    path = tmp_path / "rows.json"
    options = {"seconds_a_mode": 0.0, "deadline": 0.0, "resumed": resumed}
    status = run.measure_all([*cases, late], [], path, environment, torch.device("cpu"), **options)
    assert status == OUT_OF_TIME
    assert "1 cases left" in capsys.readouterr().out
    assert len(rows.load(path)) == len(resumed)


@pytest.mark.parametrize("fails", [False, True])
def test_a_failed_provider_is_a_failed_run(monkeypatch, tmp_path, device, fails):
    """Also where time ran out after it; what is not made for a case is no failure."""

    def build(p):
        raise RuntimeError("out of memory")

    chosen = [replace(PROVIDERS["addmm"], obstacle=lambda p: "never")]
    chosen += [replace(PROVIDERS[EAGER], build=build)] * fails
    monkeypatch.setattr(kinds, "choose", lambda *_: chosen)
    now = iter([0.0, 2.0])
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(now)))
    path, environment = tmp_path / "rows.json", rows.environment(device, "perf_counter")
    options = {"seconds_a_mode": 0.0, "deadline": 1.0, "resumed": []}
    cases = [TINY, replace(TINY, M=1)]
    status = run.measure_all(cases, None, path, environment, device, **options)
    assert status == (run.FAILED if fails else OUT_OF_TIME)
    left_out = json.loads(path.read_text())["not_measured"]
    failed = {row["provider"]: row["failed"] for row in left_out}
    assert failed == {"addmm": False, "all": False} | ({EAGER: True} if fails else {})


@pytest.mark.parametrize("name", ["device", "driver", "torch", "triton", "commit"])
def test_rows_of_another_environment_are_not_gone_on_with(results, name):
    written = rows.load(results)
    environment = {key: written[0][key] for key in rows.ENVIRONMENT}
    assert rows.resumed(results, environment | {"date": "later", "note": "other"}) == written
    with pytest.raises(
        ValueError, match=f"its rows are of another run than this: {name} .*, not X"
    ):
        rows.resumed(results, environment | {name: "X"})


def test_the_command_says_which_rows_it_does_not_go_on_with(results, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COMMIT", "other")
    with pytest.raises(SystemExit) as ended:
        run.main(["--selection", "tiny", "--resume", str(results), "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert re.search(r"--resume: .*: commit \w+, not other", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_comparison_with_another_commit_is_relative_to_the_base_layer(results):
    ours = rows.load(results)
    # Twice as slow a machine, on which the library took another two times as long.
    theirs = [
        {**row, "median": row["median"] * (4 if row["provider"] == "fused" else 2)} for row in ours
    ]
    lines = list(run.compare(ours, theirs))
    assert len(lines) > 2
    assert all(line.startswith(" 2.000x") for line in lines)


def test_report(results, tmp_path):
    report = pytest.importorskip("benchmarks.report", exc_type=ImportError)
    devices = report.read(results.parent)
    written = report.write(devices, tmp_path)
    assert [path.name.rsplit("-")[-1] for path in written] == [
        "report.md",
        "speedup.png",
        "base.png",
        "memory.png",
        "quantized.png",
        "memory.png",  # quantized-memory
        "multi.png",
    ]
    text = written[0].read_text()
    assert f"## {devices[0].device}" in text
    assert "| tiny | 5 | 48 | 32 | 4 | fp32 | 0.1 |" in text
    assert "| tiny | 5 | 48 | 64 | 4 | nf4 | fp32 |" in text
    assert "| tiny, 3 adapters | 12 | 48 | 64 | 4 | fp32 | forward+backward |" in text
    assert all(path.stat().st_size > 1000 for path in written[1:])


def test_report_has_layers_together(results, tmp_path):
    """Of the newest run of each device."""
    report = pytest.importorskip("benchmarks.report", exc_type=ImportError)
    shutil.copy(results, tmp_path)
    device = rows.load(results)[0]["device"]
    row = {"layers": "mlp", "M": 70, "K": 48, "dropout_p": 0.1, "mode": "memory"}
    row |= {"by_peft": 4e6, "apart": 3e6, "linear": 1e6, "device": device, "commit": "abc"}
    for name, date, size in (("b", "2026-01-01", 5e6), ("a", "2026-01-02", 2e6)):
        with (tmp_path / f"{name}-groups.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, [*row, "group", "date"])
            table.writeheader()
            table.writerow(row | {"group": size, "date": date})
    (measured,) = report.read(tmp_path)
    text = report.markdown([measured])
    assert "gated MLPs (commit abc)" in text
    assert "| mlp | 70 | 48 | 0.1 | memory | 2.0 | 3.0 | 4.0 | 1.0 | 1.50x | 2.00x |" in text


@pytest.mark.parametrize("peft", ["by_peft", "merged"])
def test_report_has_mixtures_of_experts(results, tmp_path, peft):
    """Of a run that a limit ended too."""
    report = pytest.importorskip("benchmarks.report", exc_type=ImportError)
    shutil.copy(results, tmp_path)
    row = {"experts": "tiny", "device": rows.load(results)[0]["device"], "commit": "abc"}
    row |= {"date": "2026-01-01", "fused": 2e3, "merged": 9e3, peft: 6e3, "split": 3e3, "nf4": 4e3}
    modes = [("70", "forward", 1e3), ("70", "forward+backward", 1e3), ("70", "memory", 1.0)]
    with (tmp_path / "a-experts.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [*row, "M", "mode", "linear"])
        table.writeheader()
        for M, mode, linear in [*modes, ("7", "forward", 1e3)]:
            table.writerow(row | {"M": M, "mode": mode, "linear": linear})
    (measured,) = report.read(tmp_path)
    text = report.markdown([measured])
    assert "### Mixtures of experts (commit abc)" in text
    assert "| over PEFT |" in text if peft == "by_peft" else "| over PEFT's formula |" in text
    times = "2,000.0 | 6,000.0 | 3,000.0 | 1,000.0 | 4,000.0"
    assert (
        f"| tiny | 70 | {times} | {times} | 2.00x | 3.00x | 1.50x | 0.33x | 0.67x | 2.00x |" in text
    )
    assert f"| tiny | 7 | {times} |" + "  |" * 11 in text


def test_report_has_a_roofline_for_a_gpu(results):
    report = pytest.importorskip("benchmarks.report", exc_type=ImportError)
    (measured,) = report.read(results.parent)
    cases = {replace(case, dtype="bf16"): medians for case, medians in measured.cases.items()}
    gpu = replace(measured, device="NVIDIA H100 80GB HBM3", cases=cases)
    assert report.PLOTS["roofline"](gpu) is not None
    assert report.PLOTS["roofline"](measured) is None


def test_gpu_samples_start_after_enough_flushes_to_enqueue_the_call(monkeypatch):
    """The logic of CUDA timing on a clock of its own: a flush takes 1 ms, a call 5."""
    now, flushes = [0.0], []

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            self.time = now[0]

        def elapsed_time(self, end):
            return (end.time - self.time) * 1e3

    class Buffer:
        def zero_(self):
            flushes.append(now[0])
            now[0] += 1e-3

    def call():
        now[0] += 5e-3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(device_time, "_flush_buffer", lambda _: Buffer())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device_time.time, "perf_counter", lambda: now[0])
    sample = device_time.sampler(call)
    flushes.clear()
    assert sample() == pytest.approx(5000)
    assert len(flushes) >= 10
    assert device_time.median_seconds([call, call]) == pytest.approx([5e-3] * 2)


def test_samples_in_turns(monkeypatch):
    """Every round has each once, and not always in the same order."""
    monkeypatch.setattr(device_time.time, "perf_counter", lambda: 0.0)
    taken = []
    samplers = [lambda i=i: taken.append(i) or i for i in range(3)]
    found = device_time.in_turns(samplers, -1.0, at_least=20)
    assert found == [[i] * 20 for i in range(3)]
    rounds = [tuple(taken[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(turns) == [0, 1, 2] for turns in rounds)
    assert len(set(rounds)) > 1


def on_gpu(*arguments, **environment):
    """Runs the GPU plan with stand-ins for what it calls."""
    command = ["bash", ROOT / "benchmarks" / "on_gpu.sh", *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def tools(tmp_path):
    """Makes a PATH with a python that only says how it was called.

    It ends with the status given for the module that it was to run.
    """
    folder = tmp_path / "tools"

    def make(**statuses):
        folder.mkdir()
        cases = [f"*{module}*) exit {status} ;;" for module, status in statuses.items()]
        script = ["#!/bin/sh", 'echo "$(basename "$0") $*"', 'case "$2" in', *cases, "esac"]
        for name in ("python", "compute-sanitizer"):
            (folder / name).write_text("\n".join(script) + "\n")
            (folder / name).chmod(0o755)
        return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHON": "python"}

    return make


def test_the_gpu_plan_refuses_without_a_gpu(tmp_path):
    out = tmp_path / "out"
    done = on_gpu(OUT=str(out), PYTHON="false")
    assert done.returncode == 2
    assert "no CUDA GPU" in done.stderr
    assert not out.exists()


def test_the_gpu_plan_goes_on_after_a_failed_step(tmp_path, tools):
    out = tmp_path / "out"
    done = on_gpu(OUT=str(out), RESUME="earlier.json", **tools(pytest=1))
    assert done.returncode == 1
    files = {file.name for file in out.iterdir()}
    assert files == {"summary.txt", "tests.log", "benchmark.log", "sanitizer.log"}  # and rows
    summary = (out / "summary.txt").read_text()
    assert "tests: failed with 1" in summary
    assert "by_hand: failed with 1" in summary
    for step in ("one_by_hand", "base_product", "benchmark", "experts", "groups", "memcheck"):
        assert f"{step}: passed" in summary
    assert "not every step passed" in summary
    assert "--resume earlier.json" in (out / "benchmark.log").read_text()
    tests = (out / "tests.log").read_text()
    call = next(line for line in tests.splitlines() if "pytest tests/test_lora_linear.py" in line)
    assert "-m gpu and not slow and not by_hand" in call
    for file in (ROOT / "tests").glob("test_*.py"):
        assert call.count(f"tests/{file.name} ") == (file.name != "test_specialized.py")
    apart = next(line for line in tests.splitlines() if "pytest tests/test_specialized.py" in line)
    assert "tests/test_cuda.py -m gpu and not slow and by_hand" in apart
    assert tests.index(call) < tests.index("--parts one_by_hand") < tests.index(apart)
    assert "--parts experts by_hand groups copies" in (out / "sanitizer.log").read_text()


def test_a_benchmark_out_of_time_has_not_failed(tmp_path, tools):
    out = tmp_path / "out"
    done = on_gpu(OUT=str(out), **tools(**{"benchmarks.run": OUT_OF_TIME}))
    assert done.returncode == 0
    summary = (out / "summary.txt").read_text()
    assert "benchmark: out of time, " in summary
    assert "no step failed" in summary


def test_an_error_of_pytests_own_is_a_failure(tmp_path, tools):
    out = tmp_path / "out"
    assert on_gpu(OUT=str(out), **tools(pytest=3)).returncode == 1
    assert "tests: failed with 1" in (out / "summary.txt").read_text()


def test_groups_are_not_measured_if_their_kernel_hangs(tmp_path, tools):
    out = tmp_path / "out"
    assert on_gpu(OUT=str(out), **tools(**{"benchmarks.sanitize": 124})).returncode == 1
    summary = (out / "summary.txt").read_text()
    assert "one_by_hand: stopped at its limit of 20 s" in summary
    assert "groups: not run, as the kernel of their dx hangs" in summary
    assert "base_product: passed" in summary


def test_the_gpu_plans_limits_fit_into_eight_minutes():
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text()
    plan = script[script.index("step tests ") :]
    limits = re.findall(r"^ *(?:step|sanitizer) (\w+) (\d+)", plan, flags=re.MULTILINE)
    limits = {name: int(limit) for name, limit in limits}
    assert len(limits) == 9
    assert sum(limits.values()) <= int(re.search(r"^BUDGET=(\d+)", script, re.MULTILINE)[1]) < 480
    assert limits["benchmark"] == 75
    inner = re.findall(r"^step (\w+) \d+ .* 'tests (\d+) ", plan, flags=re.MULTILINE)
    assert [name for name, _ in inner] == ["tests", "by_hand"]
    for name, limit in inner:  # pytest has 8 seconds to say what failed until then
        assert int(limit) + 8 < limits[name]


def test_sanitizers_run_alone(tmp_path, tools):
    done = on_gpu("sanitize", OUT=str(tmp_path / "out"), **tools())
    assert done.returncode == 0, done.stdout
    log = (tmp_path / "out" / "sanitizer.log").read_text()
    for tool in ("memcheck", "racecheck", "initcheck"):
        assert f"compute-sanitizer --tool {tool} " in log
    assert "--parts" not in log  # all


@pytest.mark.parametrize(("status", "verdict"), [(0, "passed"), (3, "out of time"), (1, "failed")])
def test_tuning_is_one_program_with_a_limit(tmp_path, tools, status, verdict):
    out = tmp_path / "out"
    done = on_gpu("tune", OUT=str(out), **tools(**{"benchmarks.tune": status}))
    assert done.returncode == (status == 1)
    assert {file.name for file in out.iterdir()} == {"summary.txt", "tune.log"}  # and the table
    assert f"tune: {verdict}" in (out / "summary.txt").read_text()
    (call,) = re.findall("^python .*", (out / "tune.log").read_text(), flags=re.MULTILINE)
    limit = int(re.search(r"--seconds (\d+)", call)[1])
    script = (ROOT / "benchmarks" / "on_gpu.sh").read_text()
    assert limit < int(re.search(r"step tune (\d+) ", script)[1]) < 540


def test_model_projections_are_those_of_the_configs():
    layers = {name: (N, K) for name, N, K in shapes.projections("llama-3.1-8b")}
    assert layers["llama-3.1-8b down"] == (4096, 14336)
    assert layers["llama-3.1-8b k,v"] == (1024, 4096)


def test_base_product_measures_what_is_right(monkeypatch):
    """Each tile of each kernel against the library's product; another result gets no time."""
    from benchmarks import base_product

    together = []

    def timer(calls):
        together.append(len(calls))
        return [2.0 if len(calls) == 1 else 3.0, *[1.0] * (len(calls) - 1)]

    def measure():
        shapes = [(70, 72, 80)]
        return list(base_product.measure(shapes, torch.float16, torch.device("cpu"), timer))

    found = measure()
    assert {m.kernel for m in found} == {"gemm", "persistent"}  # the interpreter runs no Gluon
    first = [m for m in found if not m.in_turns]
    assert all((m.seconds, m.of_cublas, m.problem) == (2.0, 1.0, "") for m in first)
    last = [m for m in found if m.in_turns]
    assert all((m.seconds, m.of_cublas) == (1.0, 3.0) for m in last)
    assert [m.kernel for m in last] == ["gemm"] * 4 + ["persistent"] * 4
    assert [n for n in together if n > 1] == [5, 5]  # and cuBLAS
    monkeypatch.setattr(
        base_product.persistent, "persistent_plain", lambda config, x, w: (x @ w) * 1.1
    )
    wrong = [m for m in measure() if m.kernel == "persistent"]
    assert all(m.seconds is None and "is wrong by 1.0e-01" in m.problem for m in wrong)


def test_base_product_needs_a_gpu(capsys):
    from benchmarks import base_product

    for arguments, why in {(): "needs a GPU", ("--shapes", "1,2"): "invalid shape value"}.items():
        with pytest.raises(SystemExit):
            base_product.main([*arguments])
        assert why in capsys.readouterr().err


@pytest.fixture
def few_rounds(monkeypatch):
    """The times do not matter, and CPU time alone takes 400 calls a round."""
    monkeypatch.setattr(measure, "_MIN_ROUNDS", 2)


@pytest.mark.usefixtures("own_nodes")
@pytest.mark.usefixtures("few_rounds")
def test_groups_are_measured_against_their_layers(monkeypatch, tmp_path, capsys):
    # Tiny layers: a CPU without bf16 instructions takes three minutes for SmolLM2's.
    monkeypatch.setitem(groups.MODELS, "tiny", (48, 32, 64))
    arguments = ["--rows", "70", "--seconds-a-mode", "0.01", "--out", str(tmp_path)]
    assert groups.main([*arguments, "--model", "tiny"]) == 0
    (path,) = tmp_path.glob("*-groups.csv")
    with path.open() as file:
        found = list(csv.DictReader(file))
    assert {row["layers"] for row in found} == {"q,k,v", "gate,up", "mlp"}
    modes = {"forward", "forward+backward", "overhead", "memory"}
    assert {row["mode"] for row in found} == modes
    assert all(float(row[name]) > 0 for row in found for name in groups.NAMES)
    assert "q,k,v M 70 K 48 dropout 0 forward" in capsys.readouterr().out


def test_groups_that_are_wrong_are_not_measured(monkeypatch, tmp_path, capsys):
    right = groups.lora_linear_group

    def wrong(*arguments, **options):
        first, *others = right(*arguments, **options)
        return first * 1.1, *others

    monkeypatch.setattr(groups, "lora_linear_group", wrong)
    assert groups.main(["--rows", "70", "--out", str(tmp_path), "--model", "smollm2-135m"]) == 1
    assert not list(tmp_path.glob("*.csv"))
    assert "wrong by" in capsys.readouterr().out


@pytest.mark.usefixtures("own_nodes")
@pytest.mark.usefixtures("few_rounds")
def test_groups_that_fail_do_not_end_the_others(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(groups.MODELS, "tiny", (48, 32, 64))
    right = groups.lora_linear_group

    def of_two(x, weights, *arguments, **options):
        if len(weights) == 3:
            raise RuntimeError("out of resources")
        return right(x, weights, *arguments, **options)

    monkeypatch.setattr(groups, "lora_linear_group", of_two)
    arguments = ["--rows", "70", "--seconds-a-mode", "0.01", "--out", str(tmp_path)]
    assert groups.main([*arguments, "--model", "tiny"]) == 1
    said = capsys.readouterr().out
    assert "q,k,v M 70 K 48 dropout 0: RuntimeError: out of resources" in said
    assert "gate,up M 70 K 48 dropout 0 forward" in said


def tiny_mixture(monkeypatch, tmp_path):
    """The status of measuring one, and its rows."""
    monkeypatch.setitem(experts.EXPERTS, "tiny", (32, 16, 5, 2))
    arguments = ["--models", "tiny", "--rows", "9", "--seconds-a-mode", "0.01"]
    status = experts.main([*arguments, "--out", str(tmp_path)])
    found = []
    for path in tmp_path.glob("*-experts.csv"):
        with path.open() as file:
            found += csv.DictReader(file)
    return status, found


def test_mixtures_of_experts_are_measured(monkeypatch, tmp_path, capsys):
    """PEFT's own too, where it is installed."""
    status, found = tiny_mixture(monkeypatch, tmp_path)
    assert status == 0
    assert [row["mode"] for row in found] == ["forward", "forward+backward", "memory"]
    assert all(float(row[name]) > 0 for row in found for name in experts.NAMES)
    assert all((row["M"], row["num_experts"], row["top_k"]) == ("9", "5", "2") for row in found)
    assert "tiny M 9 forward" in capsys.readouterr().out


@pytest.mark.parametrize("name", experts.OTHERS)
def test_mixtures_that_are_wrong_are_not_measured(monkeypatch, tmp_path, capsys, name):
    """By the adapters' gradients alone too."""
    right = experts.Mixture.gradient

    def gradient(self, of):
        *others, dB = right(self, of)
        return *others, dB * (1.1 if of == name else 1)

    monkeypatch.setattr(experts.Mixture, "gradient", gradient)
    assert tiny_mixture(monkeypatch, tmp_path) == (1, [])
    assert f"of the norm from {name}" in capsys.readouterr().out


def test_the_sanitizers_program_runs_the_parts_it_is_told(monkeypatch, capsys):
    """And goes on after a case that fails, which it counts."""

    def wrong():
        raise AssertionError("by 1")

    def fails():
        raise RuntimeError("out of resources")

    cases = {"right": lambda: None, "wrong": wrong, "fails": fails}
    parts = {name: lambda name=name: iter([(name, cases[name])]) for name in cases}
    monkeypatch.setattr(sanitize, "PARTS", parts)
    assert sanitize.main(["--parts", "right"]) == 0
    assert capsys.readouterr().out.startswith("right: right\n1 of 1 cases right on ")
    assert sanitize.main(["--parts", "fails", "right"]) == 1
    assert capsys.readouterr().out.startswith(
        "fails: failed, RuntimeError: out of resources\nright"
    )
    assert sanitize.main([]) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[1] == "wrong: wrong, by 1"
    assert "1 of 3 cases right on" in said


def test_the_sanitizers_program_ends_with_what_is_scheduled_by_hand(monkeypatch):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")
    assert [*sanitize.PARTS][-1] == "by_hand"
    assert [*sanitize._by_hand()] == [] or torch.cuda.is_available()
    monkeypatch.setattr(sanitize, "specialized_obstacle", lambda *_: None)
    names = [name for name, _ in sanitize._by_hand()]
    for of in ("a sum of 2", "a sum of 3", "group, dx ws_split, dropout 0.3"):
        assert any(of in name for name in names[:6])
    for layout in ("a forward", "dx"):
        assert any(name.startswith("dora") and f"W0 of {layout}" in name for name in names)


@pytest.mark.parametrize("part", ["copies", "groups"])
def test_what_the_sanitizers_see_is_right(monkeypatch, part):
    """On fewer shapes: the rest is a matter of minutes."""
    monkeypatch.setattr(sanitize, "SHAPES", sanitize.SHAPES[:3])
    assert sanitize.main(["--parts", part]) == 0
