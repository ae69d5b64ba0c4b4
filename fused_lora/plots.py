"""The picture of a fine-tuning run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write_atomically

if TYPE_CHECKING:
    from .finetune import History

_SMOOTHING = 0.8  # of an exponential mean over the steps


def plot_losses(history: History, path: Path) -> None:
    """Training loss of each step with its running mean, and the held-out loss before and after."""
    from matplotlib.figure import Figure  # no pyplot: nothing global, and no display

    steps = range(1, history.step + 1)
    smooth, mean = [], math.nan
    for loss in history.losses:
        mean = loss if math.isnan(mean) else _SMOOTHING * mean + (1 - _SMOOTHING) * loss
        smooth.append(mean)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, history.losses, color="0.75", linewidth=1, label="training, each step")
    axes.plot(steps, smooth, color="tab:blue", linewidth=2, label="training, running mean")
    measured = [(0, history.held_out_before), (history.step, history.held_out_after)]
    measured = [(step, loss) for step, loss in measured if not math.isnan(loss)]
    axes.plot(*zip(*measured, strict=True), "o--", color="tab:orange", label="held out")
    for step, loss in measured:
        axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(6, 6))
    axes.set_xlabel("step")
    axes.set_ylabel("loss per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_atomically(path, lambda to: figure.savefig(to, format="png", dpi=150))
