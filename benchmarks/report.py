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
from pathlib import Path

import matplotlib.pyplot as plt

from . import rows
from .measured import Measured, read
from .plots import PLOTS
from .tables import markdown


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
