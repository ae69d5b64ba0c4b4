"""Rows as the report takes them: every device's cases, each with the medians of one run."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import rows
from .rows import Row
from .shapes import FORMATS, PLAIN, Case, Kind

LABELS = {
    "fused": "fused-lora",
    "one_pass": "fused-lora, one pass",
    "split": "fused-lora, split",
    "addmm": "F.linear + addmm_",
    "compile": "torch.compile",
    "peft": "PEFT",
    "peft_fused": "PEFT, fused",
    "peft_formula": "PEFT's formula",
    "dequantise": "dequantise, F.linear",
    "peft_bnb": "PEFT over bitsandbytes",
    "unquantised": "fused-lora, unquantised",
    "loop": "loop over adapters",
    "bmm": "padded bmm",
    "linear": "base layer",
}
Medians = dict[tuple[str, str], float]  # (provider, mode) -> us or bytes


@dataclass
class Measured:
    """A device's cases, each with the medians of one run."""

    device: str
    heading: str  # the device and the versions
    remark: str  # the clock, and what the runner had to say
    cases: dict[Case, Medians]
    # As their files have them: of `benchmarks.groups`, layers that are computed together; and of
    # `benchmarks.experts`.
    together: list[dict[str, str]] = field(default_factory=list)
    mixtures: list[dict[str, str]] = field(default_factory=list)

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
    together, mixtures = (_newest(folder, kind) for kind in ("groups", "experts"))
    for name, measured in devices.items():  # which have a heading
        measured.together, measured.mixtures = together.get(name, []), mixtures.get(name, [])
    return list(devices.values())


def _newest(folder: Path, kind: str) -> dict[str, list[dict[str, str]]]:
    """The rows of each device's newest file of that kind."""
    runs = []
    for path in folder.glob(f"*-{kind}.csv"):
        with path.open(newline="") as file:
            runs.append([*csv.DictReader(file)])
    runs = sorted(filter(None, runs), key=lambda found: found[0]["date"])
    return {found[0]["device"]: found for found in runs}


def _heading(row: Row) -> str:
    parts = [row["device"]]
    if row["driver"]:
        parts.append(f"driver {row['driver']}, triton {row['triton']}")
    if row["threads"]:
        parts.append(f"{row['threads']} thread{'s' * (row['threads'] > 1)}")
    parts.append(f"torch {row['torch']}, commit {row['commit']}{' + changes' * bool(row['dirty'])}")
    if row["bitsandbytes"]:
        parts.append(f"bitsandbytes {row['bitsandbytes']}")
    return ", ".join([*parts, row["date"][:10]])


def label(case: Case) -> str:
    """A case in a plot."""
    if case.kind == "multi":
        return f"{batch(case)}   M {case.M}   K = N {case.N}   r {case.r}   {case.dtype}"
    dtypes = case.dtype
    if case.adapter_dtype != case.dtype:
        dtypes += f", A and B {case.adapter_dtype}"
    format = "" if case.format == PLAIN else f"{case.format}   "
    return f"{case.layer}   {format}M {case.M}   r {case.r}   {dtypes}"


def batch(case: Case) -> str:
    """Many adapters in one batch, without its sizes."""
    over = "" if case.format == PLAIN else f" over {case.format}"
    return f"{case.layer}, {case.adapters} adapters{over}" + ", ragged" * case.ragged


def order(case: Case) -> tuple[object, ...]:
    """How cases are sorted."""
    format = (PLAIN, *FORMATS).index(case.format)
    group = (case.r, case.dtype, case.adapter_dtype, case.M)
    return *group, case.layer, format, case.adapters, case.ragged, case.N
