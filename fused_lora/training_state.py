"""What `fused-lora finetune --resume` goes on from: a safetensors file beside the adapter.

It holds the trained parameters, AdamW's moments and step of each, and in its metadata, as JSON, the
run's settings, its losses and a hash of its data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import write_atomically
from .settings import NAMES, Settings

STATE_NAME = "training_state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


@dataclass(frozen=True)
class TrainingState:
    """What is saved of a run beside tensors."""

    settings: Settings
    data: str  # the hash of its tokens
    losses: list[float]  # of each step
    held_out_before: float


def read_state(out: Path) -> TrainingState:
    """That of the run which was saved in ``out``. Raises FileNotFoundError or ValueError."""
    path = out / STATE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, so no run to resume")
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads(file.metadata()["state"])
        losses, before = saved["losses"], saved["held_out_before"]
        if not all(isinstance(loss, float) for loss in (*losses, before)):
            raise TypeError("losses are no numbers")
        if not isinstance(saved["data"], str):
            raise TypeError("data is no hash")
        given = dict(saved["settings"])
        # Some are not in a run from before there were any.
        settings = Settings(**given | {name: tuple(given.get(name, ())) for name in NAMES})
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no saved run, or a damaged one: {error}") from None
    return TrainingState(settings, saved["data"], losses, before)


def save_state(
    out: Path,
    state: TrainingState,
    trained: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes it and the parameters, with what AdamW keeps of each: the file whole, or none."""
    tensors: dict[str, Tensor] = {}
    for name, p in trained.items():
        tensors[f"parameter.{name}"] = p.detach().cpu()
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = value.detach().cpu()
    metadata = {"state": json.dumps(asdict(state))}
    write_atomically(out / STATE_NAME, lambda to: save_file(tensors, to, metadata))


def load_tensors(
    out: Path, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Reads what `save_state` wrote of parameters. ValueError, before any is changed, if others."""
    path = out / STATE_NAME
    wanted: dict[str, list[int]] = {}
    for name, p in trained.items():
        wanted |= {f"{key}.{name}": list(p.shape) for key in ("parameter", *_MOMENTS)}
        wanted[f"step.{name}"] = []
    with safe_open(path, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        if shapes != wanted:
            raise ValueError(f"{path}: its tensors do not fit the model's adapters")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(file.get_tensor(f"parameter.{name}"))
                moments = {key: file.get_tensor(f"{key}.{name}").to(p) for key in _MOMENTS}
                optimizer.state[p] = {"step": file.get_tensor(f"step.{name}"), **moments}
