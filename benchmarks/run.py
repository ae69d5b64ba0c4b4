"""Measures a selection of cases and writes the rows.

    python -m benchmarks.run [--selection quick,...] [--out DIR] [--seconds 180] [--base REV]

Without --selection: quick on a GPU; cpu, cpu-quantized and cpu-multi without one. Every case is
checked against the fp64 oracle before it is timed; a provider that is wrong or fails is left out
and the file says why. The file is written after every case, so that a run may be cut short and
resumed: on the same device and commit, with the same driver, torch and triton.

Exit status: 0 if everything was measured, 1 if a provider was wrong or failed, else 3 if time ran
out.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from . import OUT_OF_TIME, kinds, measure, rows
from .providers import Provider
from .rows import Row
from .shapes import SELECTIONS, Case, select

FAILED = 1  # exit status: a provider was wrong or raised


def measure_case(
    case: Case, providers: Iterable[Provider], device: torch.device, seconds: float
) -> tuple[list[Row], list[Row]]:
    """The rows of one case, and why providers have none, ``failed`` or not made for it."""
    by_name = {provider.name: provider for provider in providers}
    if not by_name:
        return [], [_left_out("all", case, "there is no provider of this kind")]
    p = kinds.make_problem(case, device)
    known: dict[bool, measure.Expected] = {}
    todo: dict[str, dict[str, measure.Call]] = {}
    found: list[Row] = []
    left_out: list[Row] = []
    for provider in by_name.values():
        try:
            why = provider.obstacle(p)
            if why is None:
                measure.assert_correct(provider, p, known)
                todo[provider.name] = measure.calls(provider, p)
            else:
                left_out.append(_left_out(provider.name, case, why))
        # Whatever a provider raises, the others are still to be measured.
        except Exception as error:
            why = f"{type(error).__name__}: {error}"[:500]
            left_out.append(_left_out(provider.name, case, why, failed=True))
    known.clear()

    def row(name: str, mode: str, unit: str, samples: list[float]) -> Row:
        return {
            "provider": name,
            **asdict(case),
            "mode": mode,
            "unit": unit,
            **{key: round(value, 2) for key, value in measure.quantiles(samples).items()},
            "samples": len(samples),
            "choice": by_name[name].choice(p),
        }

    for mode in case.modes if todo else ():
        if mode in ("memory", "weight"):
            for name, calls in todo.items():
                if mode == "memory":
                    size = measure.peak_memory(calls["forward+backward"], device)
                else:
                    size = by_name[name].weight_bytes(p)
                found.append(row(name, mode, "bytes", [float(size)] * 2))
            continue
        overhead = mode == "overhead"
        timed = {name: calls["forward" if overhead else mode] for name, calls in todo.items()}
        times = measure.undisturbed(timed, device, seconds, overhead=overhead)
        found += [row(name, mode, "us", samples) for name, samples in times.items()]
    return found, left_out


def _left_out(provider: str, case: Case, why: str, *, failed: bool = False) -> Row:
    return {"provider": provider, **asdict(case), "why": why, "failed": failed}


def _summary(found: list[Row]) -> str:
    """One line: every provider's time of the widest mode."""
    modes = [row["mode"] for row in found if row["unit"] == "us"]
    mode = "forward+backward" if "forward+backward" in modes else modes[0]
    times = {row["provider"]: row["median"] for row in found if row["mode"] == mode}
    return f"{mode}: " + "  ".join(f"{name} {us:,.1f} us" for name, us in times.items())


def _key(row: Row) -> tuple[object, ...]:
    return tuple(row[name] for name in Case.__dataclass_fields__)


def measure_all(
    cases: list[Case],
    names: list[str] | None,
    path: Path,
    environment: Row,
    device: torch.device,
    *,
    seconds_a_mode: float,
    deadline: float,
    resumed: list[Row],
) -> int:
    """Measures what is not in ``resumed`` until the deadline; the exit status, as of `main`.

    ``names``: the providers; None takes each kind's own.
    """
    done = {_key(row) for row in resumed}
    found = [{k: v for k, v in row.items() if k not in rows.ENVIRONMENT} for row in resumed]
    left_out: list[Row] = []
    cases = [case for case in cases if _key(asdict(case)) not in done]
    for number, case in enumerate(cases, 1):
        if time.monotonic() > deadline:
            late = cases[number - 1 :]
            left_out += [_left_out("all", late_case, "out of time") for late_case in late]
            rows.save(path, environment, found, left_out)
            print(f"out of time: {len(late)} cases left; go on with --resume {path}", flush=True)
            return FAILED if _any_failed(left_out) else OUT_OF_TIME
        providers = kinds.choose(case, names, device)
        new, failed = measure_case(case, providers, device, seconds_a_mode)
        measure.release()
        found += new
        left_out += failed
        rows.save(path, environment, found, left_out)
        print(f"[{number}/{len(cases)}] {case}\n    {_summary(new) if new else 'nothing'}")
        for row in failed:
            print(f"    {row['provider']}: left out: {row['why']}")
        sys.stdout.flush()
    return FAILED if _any_failed(left_out) else 0


def _any_failed(left_out: list[Row]) -> bool:
    return any(row["failed"] for row in left_out)


def run_base(rev: str, arguments: list[str]) -> list[Row]:
    """The rows that another commit's library gives under this checkout's suite."""
    with tempfile.TemporaryDirectory() as folder:
        tree, out = Path(folder, "tree"), Path(folder, "out")
        git = ["git", "-C", str(rows.ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), rev], check=True, capture_output=True)
        try:
            suite = shutil.ignore_patterns("results", "__pycache__")
            shutil.copytree(
                rows.ROOT / "benchmarks", tree / "benchmarks", ignore=suite, dirs_exist_ok=True
            )
            (tree / "tests").mkdir(exist_ok=True)
            for parts in (("tests", "oracle.py"), ("fused_lora", "device_time.py")):
                shutil.copy(rows.ROOT.joinpath(*parts), tree.joinpath(*parts))
            command = [sys.executable, "-m", "benchmarks.run", "--out", str(out), *arguments]
            print(f"--base: measuring {rev}", flush=True)
            done = subprocess.run(command, cwd=tree)
            if done.returncode != FAILED:  # what its providers failed in is not compared
                done.check_returncode()
            (path,) = out.glob("*.json")
            return rows.load(path)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def compare(ours: list[Row], base: list[Row]) -> Iterator[str]:
    """Lines: how much faster we are than the base, each over `linear` in its own process."""

    def relative(found: list[Row]) -> dict[tuple[object, ...], float]:
        by_provider: dict[str, dict[tuple[object, ...], float]] = {"fused": {}, "linear": {}}
        for row in found:
            if row["provider"] in by_provider and row["unit"] == "us":
                key = (*_key(row), row["mode"])
                by_provider[row["provider"]][key] = row["median"]
        return {
            key: us / by_provider["linear"][key]
            for key, us in by_provider["fused"].items()
            if key in by_provider["linear"]
        }

    mine, theirs = relative(ours), relative(base)
    ratios = {key: theirs[key] / mine[key] for key in mine if key in theirs}
    for key, ratio in ratios.items():
        case, mode = Case(*key[:-1]), key[-1]  # type: ignore[arg-type]
        yield f"{ratio:6.3f}x  {case} {mode}"
    if ratios:
        mean = statistics.geometric_mean(ratios.values())
        yield f"{mean:6.3f}x  geometric mean of {len(ratios)}; above 1: faster than the base"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: FAILED, OUT_OF_TIME or 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--selection", help=f"comma-separated, of {','.join(SELECTIONS)}")
    parser.add_argument("--providers", help="comma-separated; default: all of a case's kind")
    parser.add_argument("--out", type=Path, default=rows.RESULTS, help="folder for the rows")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--seconds-a-mode", type=float, help="sampling time of one mode of a case")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="measure what it lacks")
    parser.add_argument("--base", metavar="REV", help="compare with another commit")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch")
    parser.add_argument("--note", default="", help="kept in the file, e.g. who else was busy")
    args = parser.parse_args(argv)

    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    selection = args.selection or ("quick" if cuda else "cpu,cpu-quantized,cpu-multi")
    names = args.providers.split(",") if args.providers else None
    unknown = sorted(set(selection.split(",")) - set(SELECTIONS))
    if unknown:
        parser.error(f"--selection: got {unknown}, wanted some of {sorted(SELECTIONS)}")
    cases = select(*selection.split(","))
    there_are = {name for case in cases for name in kinds.providers_of(case)[0]}
    unknown = sorted(set(names or ()) - there_are)
    if unknown:
        parser.error(f"--providers: got {unknown}, wanted some of {sorted(there_are)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    clock = "CUDA events" if cuda else measure.clock().__name__
    environment = rows.environment(device, clock, args.note)
    path = args.out / rows.file_name(environment)
    try:
        resumed = rows.resumed(args.resume, environment) if args.resume else []
    except ValueError as error:
        parser.error(f"--resume: {error}")
    kind = "a GPU" if cuda else "a CPU (no GPU here: these rows say nothing about one)"
    print(f"{selection} on {environment['device']}, {kind}, torch {torch.__version__} -> {path}")
    seconds_a_mode = args.seconds_a_mode or (0.15 if cuda else 0.6)
    status = measure_all(
        cases,
        names,
        path,
        environment,
        device,
        seconds_a_mode=seconds_a_mode,
        deadline=start + args.seconds,
        resumed=resumed,
    )
    if args.base:
        options = ["--selection", selection, "--providers", "fused,linear"]
        options += ["--seconds-a-mode", str(seconds_a_mode)]
        options += ["--threads", str(args.threads)] if args.threads else []
        print("\n".join(compare(rows.load(path), run_base(args.base, options))))
    return status


if __name__ == "__main__":
    sys.exit(main())
