"""One process or several under torchrun, on PyTorch's own engine."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """Rank, count and device of this process; joins the group that torchrun set up, if it did.

    ``device``: "auto" (a GPU of its own where there is one), or a torch device.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device != "auto":
            self.device = torch.device(device)
        elif torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        else:
            self.device = torch.device("cpu")
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device: got {device}, but PyTorch sees no CUDA GPU here")
        if self.device.type == "cuda":
            if self.device.index is None:  # "cuda": `set_device` wants a number
                self.device = torch.device("cuda", torch.cuda.current_device())
            torch.cuda.set_device(self.device)
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints and saves."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the processes."""
        return DistributedDataParallel(model) if self.count > 1 else model

    def mean(self, value: Tensor) -> float:
        """A number's mean over the processes."""
        if self.count > 1:
            dist.all_reduce(value)
            value /= self.count
        return value.item()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of them."""
        if self.count == 1:
            return flag
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags)
        return bool(flags.item())

    def close(self) -> None:
        """Leaves the group."""
        if self.count > 1:
            dist.destroy_process_group()
