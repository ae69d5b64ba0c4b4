"""The report's plots, of one device each."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from fused_lora.cost_model import CEILINGS

from .measured import LABELS, Measured, label, order
from .shapes import Case

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
_TICKS = (0.02, 0.03, 0.06, 0.125, 0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
_FINE_TICKS = (0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2)


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
    cases = sorted({case for ratios in series.values() for case in ratios}, key=order)
    if not cases:
        return None
    dropouts = sorted({case.dropout for case in cases})
    labels = list(dict.fromkeys(label(case) for case in cases))
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
    group_of = dict(zip(map(label, cases), groups, strict=True))
    for axes, dropout in zip(panels[0], dropouts, strict=True):
        axes.axvline(1, color="#2c3e50", linewidth=1)
        for at in range(1, len(labels)):
            if group_of[labels[at]] != group_of[labels[at - 1]]:
                axes.axhline(at - 0.5, color="#d5d8dc", linewidth=0.8)
        for provider in reversed(providers):  # ours last, above the others
            ours = provider == "fused"
            points = [
                (ratio, labels.index(label(case)))
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
    teraflops, terabytes = (rate / 1e12 for rate in ceiling)
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
