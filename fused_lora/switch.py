"""`Switchable`: what `disable_adapter` switches off."""

from __future__ import annotations

from typing import Any

from torch import nn


class Switchable(nn.Module):
    """A module that has a frozen one in it, which computes alone while it is disabled."""

    disabled: int = 0  # how many `disable_adapter` blocks it is in

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is outside of any of them."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.disabled = 0
