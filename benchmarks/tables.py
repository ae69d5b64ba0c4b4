"""The report's Markdown: summaries and tables of every device."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from .measured import LABELS, Measured, batch, order
from .shapes import FORMATS, OVERHEAD, Case


def _number(value: float | None, form: str = ",.1f", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


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
        swapped = list(measured.ratios(measured.eager, mode, "peft_fused").values())
        if swapped:
            yield f"- {mode}, few rows, {eager}'s layers after `fuse`: {_spread(swapped)} its speed"
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

    for case in sorted(measured.cases, key=order):
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
    for case in sorted(measured.cases, key=order):
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
    for case in sorted(measured.cases, key=order):
        for mode in ("forward", "forward+backward"):
            if mode not in case.modes:
                continue
            times = [measured.cases[case].get((name, mode)) for name in providers]
            others = [us for us in times[1:4] if us is not None]
            cells = [batch(case), case.M, case.N, case.K, case.r, case.dtype, mode]
            cells += [_number(us) for us in times]
            cells += [
                _number(_quotient(us, times[0]), ".2f", "x") for us in (times[1], min(others))
            ]
            yield "| " + " | ".join(map(str, cells)) + " |"


def _together_table(found: list[dict[str, str]]) -> Iterator[str]:
    """Times in us; memory, of forward+backward, in MB of 10^6 bytes."""
    names = {"group": "together", "apart": "one by one", "by_peft": "PEFT's formula"}
    columns = [*names.values(), "frozen layers", "over one by one", "over PEFT's formula"]
    yield "| layers | M | K | dropout | mode | " + " | ".join(columns) + " |"
    yield "|---|---:|---:|---:|---|" + "---:|" * len(columns)
    for row in found:
        unit = 1e6 if row["mode"] == "memory" else 1.0
        values = [float(row[name]) / unit for name in (*names, "linear")]
        cells = [row[name] for name in ("layers", "M", "K", "dropout_p", "mode")]
        cells += [_number(value) for value in values]
        cells += [_number(_quotient(other, values[0]), ".2f", "x") for other in values[1:3]]
        yield "| " + " | ".join(cells) + " |"


def _mixtures_table(found: list[dict[str, str]]) -> Iterator[str]:
    """A row a case; PEFT's formula by hand where PEFT was not there."""
    yield "Both with the router's gradient. grouped_mm: by hand, A and B in products of their own."
    over_codes = "nf4" in found[0]
    if over_codes:
        yield "nf4: ours over codes, which the others have the values of."
    yield ""
    peft, name = ("by_peft", "PEFT") if "by_peft" in found[0] else ("merged", "PEFT's formula")
    providers = ["fused", peft, "split", "linear", *["nf4"] * over_codes]
    names = [name, "grouped_mm", "frozen", *["nf4"] * over_codes]
    columns = ["forward, us", *names, "both, us", *names, "both, over frozen"]
    columns += [f"over {name}", "over grouped_mm", f"memory of {name}'s", "of grouped_mm's"]
    columns += ["nf4's memory, of ours"] * over_codes
    yield "| experts | tokens | " + " | ".join(columns) + " |"
    yield "|---|" + "---:|" * (1 + len(columns))
    cases: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in found:
        medians = [float(row[provider]) for provider in providers]
        cases.setdefault((row["experts"], row["M"]), {})[row["mode"]] = medians
    for case, modes in cases.items():
        unknown = [None] * len(providers)  # of a run that a limit ended
        forward, both, memory = (
            modes.get(mode, unknown) for mode in ("forward", "forward+backward", "memory")
        )
        cells = [*case, *map(_number, (*forward, *both))]
        ratios = [(both[0], both[3]), (both[1], both[0]), (both[2], both[0])]
        ratios += [(memory[0], memory[1]), (memory[0], memory[2])]
        ratios += [(memory[-1], memory[0])] * over_codes
        cells += [_number(_quotient(*ratio), ".2f", "x") for ratio in ratios]
        yield "| " + " | ".join(cells) + " |"


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
        if measured.together:
            commit = measured.together[0]["commit"]
            lines += ["", f"### Layers together, and gated MLPs (commit {commit})", ""]
            lines += _together_table(measured.together)
        if measured.mixtures:
            commit = measured.mixtures[0]["commit"]
            lines += ["", f"### Mixtures of experts (commit {commit})", ""]
            lines += _mixtures_table(measured.mixtures)
    return "\n".join(lines) + "\n"
