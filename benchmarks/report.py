"""From the committed rows: a Markdown table and plots for every device.

    python -m benchmarks.report [--results DIR] [--out DIR]

Writes report.md, and for each device, as far as there are rows, <device>-speedup.png, -base.png and
-memory.png; -quantized.png and -quantized-memory.png of quantised weights; -multi.png of many
adapters; and -roofline.png for a GPU. Where several runs measured a case, the newest counts, whole:
numbers of two runs are never compared.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from . import rows
from .rows import Row
from .shapes import FORMATS, OVERHEAD, PLAIN, Case, Kind

# Measured on these cards: TFLOP/s of a bf16 product at 8192^3, TB/s of a copy.
CEILINGS = {"H100": (798.0, 3.0), "H200": (788.0, 4.3)}
COLORS = {
    "fused": "#c0392b",
    "one_pass": "#e59866",
    "split": "#b7950b",
    "addmm": "#2e86c1",
    "compile": "#117a65",
    "peft": "#7f8c8d",
    "peft_formula": "#7f8c8d",
    "dequantise": "#2e86c1",
    "peft_bnb": "#7f8c8d",
    "unquantised": "#117a65",
    "loop": "#2e86c1",
    "bmm": "#117a65",
    "linear": "#2c3e50",
}
LABELS = {
    "fused": "fused-lora",
    "one_pass": "fused-lora, one pass",
    "split": "fused-lora, split",
    "addmm": "F.linear + addmm_",
    "compile": "torch.compile",
    "peft": "PEFT",
    "peft_formula": "PEFT's formula",
    "dequantise": "dequantise, F.linear",
    "peft_bnb": "PEFT over bitsandbytes",
    "unquantised": "fused-lora, unquantised",
    "loop": "loop over adapters",
    "bmm": "padded bmm",
    "linear": "base layer",
}
_TICKS = (0.125, 0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)
_FINE_TICKS = (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2)
Medians = dict[tuple[str, str], float]  # (provider, mode) -> us or bytes


@dataclass
class Measured:
    """A device's cases, each with the medians of one run."""

    device: str
    heading: str  # the device and the versions
    remark: str  # the clock, and what the runner had to say
    cases: dict[Case, Medians]

    def ratios(self, above: str, mode: str, below: str) -> dict[Case, float]:
        """The number of provider ``above`` over that of ``below``, where both were measured."""
        return {
            case: medians[above, mode] / medians[below, mode]
            for case, medians in self.cases.items()
            if (above, mode) in medians and (below, mode) in medians
        }

    def only(self, kind: Kind) -> Measured:
        """Its cases of one kind."""
        cases = {case: medians for case, medians in self.cases.items() if case.kind == kind}
        return replace(self, cases=cases)

    def held(self) -> Measured:
        """With the weight and the peak beside it for the mode "memory"."""
        cases = {
            case: {
                (name, mode): size + (medians[name, "weight"] if mode == "memory" else 0)
                for (name, mode), size in medians.items()
            }
            for case, medians in self.cases.items()
        }
        return replace(self, cases=cases)

    @property
    def eager(self) -> str:
        """The name that PEFT goes by in the rows of plain layers."""
        names = {provider for medians in self.cases.values() for provider, _ in medians}
        return "peft" if "peft" in names else "peft_formula"


def read(folder: Path) -> list[Measured]:
    """All devices of the files in the folder."""
    runs = [found for path in sorted(folder.glob("*.json")) if (found := rows.load(path))]
    runs.sort(key=lambda run: run[0]["date"])
    devices: dict[str, Measured] = {}
    for run in runs:
        first = run[0]
        measured = devices.setdefault(first["device"], Measured(first["device"], "", "", {}))
        measured.heading = _heading(first)
        measured.remark = f"Clock: {first['clock']}. {first['note']}".rstrip()
        by_case: dict[Case, Medians] = {}
        for row in run:
            case = Case(**{name: row[name] for name in Case.__dataclass_fields__})
            by_case.setdefault(case, {})[row["provider"], row["mode"]] = row["median"]
        measured.cases |= by_case
    return list(devices.values())


def _heading(row: Row) -> str:
    parts = [row["device"]]
    if row["driver"]:
        parts.append(f"driver {row['driver']}, triton {row['triton']}")
    if row["threads"]:
        parts.append(f"{row['threads']} thread{'s' * (row['threads'] > 1)}")
    parts.append(f"torch {row['torch']}, commit {row['commit']}{' + changes' * bool(row['dirty'])}")
    if row["bitsandbytes"]:
        parts.append(f"bitsandbytes {row['bitsandbytes']}")
    return ", ".join([*parts, row["date"]])


def _label(case: Case) -> str:
    if case.kind == "multi":
        return f"{_batch(case)}   M {case.M}   K = N {case.N}   r {case.r}   {case.dtype}"
    dtypes = case.dtype
    if case.adapter_dtype != case.dtype:
        dtypes += f", A and B {case.adapter_dtype}"
    format = "" if case.format == PLAIN else f"{case.format}   "
    return f"{case.layer}   {format}M {case.M}   r {case.r}   {dtypes}"


def _batch(case: Case) -> str:
    return f"{case.layer}, {case.adapters} adapters" + ", ragged" * case.ragged


def _order(case: Case) -> tuple[object, ...]:
    format = (PLAIN, *FORMATS).index(case.format)
    group = (case.r, case.dtype, case.adapter_dtype, case.M)
    return *group, case.layer, format, case.adapters, case.ragged, case.N


def _number(value: float | None, form: str = ",.1f", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


# --- Markdown ---------------------------------------------------------------------------------


def _spread(ratios: list[float]) -> str:
    mean = statistics.geometric_mean(ratios)
    return f"{mean:.2f}x ({min(ratios):.2f}x to {max(ratios):.2f}x, {len(ratios)} cases)"


def _summary(measured: Measured) -> Iterator[str]:
    eager = LABELS[measured.eager]
    yield "Geometric means, and the range:"
    yield ""
    for mode in ("forward", "forward+backward"):
        over_eager = measured.ratios(measured.eager, mode, "fused")
        over_base = measured.ratios("fused", mode, "linear")
        for dropout in sorted({case.dropout for case in over_eager}):
            speed = [ratio for case, ratio in over_eager.items() if case.dropout == dropout]
            times = [ratio for case, ratio in over_base.items() if case.dropout == dropout]
            line = f"- {mode}, dropout {dropout:g}: {_spread(speed)} {eager}'s speed"
            yield line + (f"; {_spread(times)} the base layer's time" if times else "")
    memory = list(measured.ratios("fused", "memory", measured.eager).values())
    if memory:
        yield f"- peak memory of forward+backward: {_spread(memory)} of {eager}'s"
    for case, medians in measured.cases.items():
        if case.layer == OVERHEAD:
            each = [f"{LABELS[name]} {us:.1f} us" for (name, _), us in medians.items()]
            yield f"- CPU time of a call at M 1, dropout {case.dropout:g}: {', '.join(each)}"


def _table(measured: Measured) -> Iterator[str]:
    yield (
        "| layer | M | N | K | r | dtype | dropout | forward, us | PEFT | base | both, us | PEFT "
        "| base | both, over PEFT | over base | memory of PEFT's |"
    )
    yield "|---|" + "---:|" * 4 + "---|" + "---:|" * 10

    for case in sorted(measured.cases, key=_order):
        if case.layer == OVERHEAD:
            continue
        get = measured.cases[case].get
        names = ("fused", measured.eager, "linear")
        forward = [get((name, "forward")) for name in names]
        both = [get((name, "forward+backward")) for name in names]
        memory = _quotient(get(("fused", "memory")), get((measured.eager, "memory")))
        dtypes = case.dtype
        if case.adapter_dtype != case.dtype:
            dtypes += f", {case.adapter_dtype} A, B"
        cells = [case.layer, case.M, case.N, case.K, case.r, dtypes, f"{case.dropout:g}"]
        cells += [_number(us) for us in (*forward, *both)]
        cells += [_number(_quotient(both[1], both[0]), ".2f", "x")]
        cells += [_number(_quotient(both[0], both[2]), ".2f", "x"), _number(memory, ".2f", "x")]
        yield "| " + " | ".join(map(str, cells)) + " |"


def _quantized_summary(measured: Measured) -> Iterator[str]:
    yield "Geometric means of forward+backward, and the range; memory is the weight and the peak:"
    yield ""
    mode, held = "forward+backward", measured.held()
    for format in FORMATS:

        def of(ratios: dict[Case, float], format: str = format) -> list[float]:
            return [ratio for case, ratio in ratios.items() if case.format == format]

        parts = [
            f"{_spread(speed)} the speed of {LABELS[other]}"
            for other in ("dequantise", "peft_bnb")
            if (speed := of(measured.ratios(other, mode, "fused")))
        ]
        if times := of(measured.ratios("fused", mode, "unquantised")):
            parts.append(f"{_spread(times)} the time of unquantised weights")
        parts += [
            f"{_spread(memory)} the memory of {LABELS[other]}"
            for other in ("peft_bnb", "unquantised")
            if (memory := of(held.ratios("fused", "memory", other)))
        ]
        if parts:
            yield f"- {format}: {'; '.join(parts)}"


def _quantized_table(measured: Measured) -> Iterator[str]:
    """Times in us; weight and peak in MB of 10^6 bytes."""
    providers = ("fused", "dequantise", "peft_bnb", "unquantised")
    names = [LABELS[name] for name in providers]
    columns = [f"both, us: {names[0]}", *names[1:], f"over {names[1]}", f"over {names[2]}"]
    columns += ["weight, MB", f"{names[3]}"]
    columns += [f"peak, MB: {names[0]}", *names[1:]]
    yield "| layer | M | N | K | r | format | dtype | " + " | ".join(columns) + " |"
    yield "|---|" + "---:|" * 4 + "---|---|" + "---:|" * len(columns)
    for case in sorted(measured.cases, key=_order):
        get = measured.cases[case].get
        both = [get((name, "forward+backward")) for name in providers]
        weights = [get((name, "weight")) for name in ("fused", "unquantised")]
        peaks = [get((name, "memory")) for name in providers]
        cells = [case.layer, case.M, case.N, case.K, case.r, case.format, case.dtype]
        cells += [_number(us) for us in both]
        cells += [_number(_quotient(other, both[0]), ".2f", "x") for other in both[1:3]]
        cells += [_number(_quotient(size, 1e6), ",.2f") for size in (*weights, *peaks)]
        yield "| " + " | ".join(map(str, cells)) + " |"


def _multi_table(measured: Measured) -> Iterator[str]:
    providers = ("fused", "loop", "peft", "bmm", "linear")
    columns = [f"{LABELS[name]}, us" for name in providers]
    yield (
        "| batch | M | N | K | r | dtype | mode | "
        + " | ".join([*columns, "over the loop", "over the best of the others"])
        + " |"
    )
    yield "|---|" + "---:|" * 4 + "---|---|" + "---:|" * (len(columns) + 2)
    for case in sorted(measured.cases, key=_order):
        for mode in ("forward", "forward+backward"):
            if mode not in case.modes:
                continue
            times = [measured.cases[case].get((name, mode)) for name in providers]
            others = [us for us in times[1:4] if us is not None]
            cells = [_batch(case), case.M, case.N, case.K, case.r, case.dtype, mode]
            cells += [_number(us) for us in times]
            cells += [
                _number(_quotient(us, times[0]), ".2f", "x") for us in (times[1], min(others))
            ]
            yield "| " + " | ".join(map(str, cells)) + " |"


def markdown(devices: list[Measured]) -> str:
    """The tables of all devices."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.report` from the rows beside it. Medians; both = "
        "forward+backward; base = the frozen layer alone. Providers were timed in turns in one "
        "process, after a check against the fp64 oracle.",
    ]
    for measured in devices:
        lines += ["", f"## {measured.heading}", "", measured.remark]
        if (plain := measured.only("plain")).cases:
            lines += ["", *_summary(plain), "", *_table(plain)]
        if (quantised := measured.only("quantised")).cases:
            lines += ["", "### Quantised weights", ""]
            lines += [*_quantized_summary(quantised), "", *_quantized_table(quantised)]
        if (multi := measured.only("multi")).cases:
            lines += ["", "### Many adapters in one batch", "", *_multi_table(multi)]
    return "\n".join(lines) + "\n"


# --- Plots ------------------------------------------------------------------------------------


def _dots(
    measured: Measured,
    providers: list[str],
    value: Callable[[str], dict[Case, float]],
    *,
    title: str,
    xlabel: str,
    bound: str,
) -> Figure | None:
    """A line a case, a panel a dropout, a dot a provider; ours with its number beside it."""
    series = {provider: value(provider) for provider in providers}
    cases = sorted({case for ratios in series.values() for case in ratios}, key=_order)
    if not cases:
        return None
    dropouts = sorted({case.dropout for case in cases})
    labels = list(dict.fromkeys(_label(case) for case in cases))
    figure, panels = plt.subplots(
        1,
        len(dropouts),
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(4.5 + 3.6 * len(dropouts), 1.9 + 0.235 * len(labels)),
        layout="constrained",
    )
    every = [1.0, *(ratio for ratios in series.values() for ratio in ratios.values())]
    ticks = _FINE_TICKS if max(every) / min(every) < 2.5 else _TICKS
    groups = [(case.r, case.dtype, case.adapter_dtype, case.M) for case in cases]
    group_of = dict(zip(map(_label, cases), groups, strict=True))
    for axes, dropout in zip(panels[0], dropouts, strict=True):
        axes.axvline(1, color="#2c3e50", linewidth=1)
        for at in range(1, len(labels)):
            if group_of[labels[at]] != group_of[labels[at - 1]]:
                axes.axhline(at - 0.5, color="#d5d8dc", linewidth=0.8)
        for provider in reversed(providers):  # ours last, above the others
            ours = provider == "fused"
            points = [
                (ratio, labels.index(_label(case)))
                for case, ratio in series[provider].items()
                if case.dropout == dropout
            ]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            axes.scatter(
                x,
                y,
                s=42 if ours else 20,
                color=COLORS[provider],
                alpha=1 if ours else 0.75,
                linewidth=0,
                label=LABELS[provider],
                zorder=3 if ours else 2,
            )
            for ratio, at in points if ours else ():
                axes.annotate(
                    f"{ratio:.2f}x",
                    (1, at),
                    xytext=(4, 0),
                    xycoords=axes.get_yaxis_transform(),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=COLORS[provider],
                )
            if ours:
                axes.hlines(y, 1, x, color=COLORS[provider], linewidth=1.6, alpha=0.4, zorder=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
        axes.set_title(f"dropout {dropout:g}", fontsize=10, loc="left")
        axes.set_xlabel(xlabel, fontsize=9)
        axes.grid(axis="x", color="#e5e7e9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    first = panels[0][0]
    first.set_yticks(range(len(labels)), labels)
    first.set_ylim(len(labels) - 0.4, -0.6)
    handles, names = first.get_legend_handles_labels()
    figure.legend(
        handles[::-1],
        names[::-1],
        loc="outside lower center",
        ncols=len(names),
        frameon=False,
        fontsize=9,
        title=f"line at 1: {bound}",
        title_fontsize=9,
    )
    figure.suptitle(f"{title}\n{measured.heading}", fontsize=11, x=0.01, ha="left")
    return figure


def _speedup(measured: Measured) -> Figure | None:
    measured = measured.only("plain")
    mode, eager = "forward+backward", measured.eager
    return _dots(
        measured,
        ["fused", "addmm", "compile"],
        lambda provider: measured.ratios(eager, mode, provider),
        title=f"Forward+backward of a LoRA layer: speed over {LABELS[eager]} (higher is better)",
        xlabel=f"{LABELS[eager]}'s time / time",
        bound=LABELS[eager],
    )


def _base(measured: Measured) -> Figure | None:
    measured = measured.only("plain")
    return _dots(
        measured,
        ["fused", "addmm", "compile", measured.eager],
        lambda provider: measured.ratios(provider, "forward+backward", "linear"),
        title="Forward+backward of a LoRA layer: time over the frozen layer's (lower is better)",
        xlabel="time / base layer's time",
        bound="the frozen layer alone, y and dx",
    )


def _memory(measured: Measured) -> Figure | None:
    measured = measured.only("plain")
    eager = LABELS[measured.eager]
    return _dots(
        measured,
        ["fused", "addmm", "compile", "linear"],
        lambda provider: measured.ratios(provider, "memory", measured.eager),
        title=f"Peak memory of forward+backward as a share of {eager}'s (lower is better)",
        xlabel=f"peak / {eager}'s peak",
        bound=eager,
    )


def _roofline(measured: Measured) -> Figure | None:
    ceiling = next((c for name, c in CEILINGS.items() if name in measured.device), None)
    if ceiling is None:
        return None
    measured = measured.only("plain")
    teraflops, terabytes = ceiling
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    reach = [0.5, teraflops / terabytes, 10_000]
    intensities = [reach[1]]
    axes.plot(reach, [min(teraflops, terabytes * x) for x in reach], color="#2c3e50")
    ceilings = {f"{terabytes:g} TB/s  ": "right", f"  {teraflops:g} TFLOP/s": "left"}
    for text, side in ceilings.items():
        axes.annotate(
            text, (reach[1], teraflops), (0, 5), textcoords="offset points", ha=side, fontsize=9
        )
    for provider in (measured.eager, "linear", "fused"):
        points = []
        for case, medians in measured.cases.items():
            us = medians.get((provider, "forward"))
            if us is None or case.dtype == "fp32":
                continue
            adapter = 0 if provider == "linear" else case.r
            flops = 2 * case.M * (case.N * case.K + adapter * (case.N + case.K))
            touched = case.M * (case.N + case.K) + case.N * case.K + adapter * (case.N + case.K)
            points.append((flops / (2 * touched), flops / us / 1e6))
        if points:
            intensities += [intensity for intensity, _ in points]
            axes.scatter(
                *zip(*points, strict=True),
                s=26,
                color=COLORS[provider],
                label=LABELS[provider],
                alpha=0.8,
                linewidth=0,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(intensities) / 2, max(intensities) * 2)
    axes.set_ylim(bottom=min(intensities) * terabytes / 4)
    axes.set_xlabel("arithmetic intensity, FLOP per byte of tensors read and written once")
    axes.set_ylabel("forward, TFLOP/s")
    axes.legend(frameon=False)
    axes.grid(color="#e5e7e9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Roofline of forward\n{measured.heading}", fontsize=11, x=0.01, ha="left")
    return figure


def _quantized(measured: Measured) -> Figure | None:
    measured = measured.only("quantised")
    return _dots(
        measured,
        ["fused", "peft_bnb", "unquantised"],
        lambda provider: measured.ratios("dequantise", "forward+backward", provider),
        title="Forward+backward over quantised weights: speed over dequantising all of W0 twice "
        "(higher is better)",
        xlabel="time of dequantise, F.linear / time",
        bound="the whole W0 dequantised in forward and again in backward, in PyTorch",
    )


def _quantized_memory(measured: Measured) -> Figure | None:
    measured = measured.only("quantised").held()
    return _dots(
        measured,
        ["fused", "dequantise", "peft_bnb"],
        lambda provider: measured.ratios(provider, "memory", "unquantised"),
        title="Weight and peak memory of forward+backward, as a share of unquantised weights' "
        "(lower is better)",
        xlabel="bytes / bytes over unquantised weights",
        bound="fused-lora over unquantised weights",
    )


def _multi(measured: Measured) -> Figure | None:
    measured = measured.only("multi")

    def speeds(provider: str) -> dict[Case, float]:
        found: dict[Case, float] = {}
        for mode in ("forward", "forward+backward"):  # the wider one counts
            found |= measured.ratios("loop", mode, provider)
        return found

    return _dots(
        measured,
        ["fused", "peft", "bmm"],
        speeds,
        title="Many adapters in one batch: speed over a loop (higher is better)\n"
        "joint training forward+backward, decoding forward",
        xlabel="the loop's time / time",
        bound="base product, then a loop over the adapters",
    )


PLOTS = {
    "speedup": _speedup,
    "base": _base,
    "memory": _memory,
    "quantized": _quantized,
    "quantized-memory": _quantized_memory,
    "multi": _multi,
    "roofline": _roofline,
}


def write(devices: list[Measured], out: Path) -> list[Path]:
    """report.md and the plots; returns what was written."""
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "report.md"]
    written[0].write_text(markdown(devices))
    for measured in devices:
        slug = re.sub(r"[^a-z0-9]+", "-", measured.device.lower()).strip("-")
        for name, plot in PLOTS.items():
            figure = plot(measured)
            if figure is not None:
                written.append(out / f"{slug}-{name}.png")
                figure.savefig(written[-1], dpi=130)
                plt.close(figure)
    return written


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=rows.RESULTS, help="folder of the rows")
    parser.add_argument("--out", type=Path, help="default: that folder")
    args = parser.parse_args()
    devices = read(args.results)
    if not devices:
        parser.error(f"--results: no rows in {args.results}; python -m benchmarks.run makes some")
    for path in write(devices, args.out or args.results):
        print(path)


if __name__ == "__main__":
    main()
