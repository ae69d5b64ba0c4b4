"""PEFT's layers_to_transform and layers_pattern: of which blocks of a model a name is meant."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from .paths import compiled, own_path

_ANY = re.compile(r".*?\.[^.]*\.(?P<number>\d+)\.")


class LayerNumbers(NamedTuple):
    """The blocks: by the first number in a path, or the first after one of the patterns."""

    numbers: frozenset[int]  # empty: all blocks
    ways: tuple[re.Pattern[str], ...] = (_ANY,)  # to the number in a path

    @classmethod
    def of(
        cls, target_modules: object, layers_to_transform: object, layers_pattern: object
    ) -> LayerNumbers:
        """TypeError or ValueError for what says nothing of the sort."""
        numbers, patterns = _listed(layers_to_transform), _listed(layers_pattern or None)
        got = f"layers_to_transform: got {layers_to_transform!r}"
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
            raise TypeError(f"{got}, wanted the number of a layer, or a list of numbers")
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"layers_pattern: got {layers_pattern!r}, wanted a string or a list")
        ways = [
            compiled("layers_pattern", p, rf"(?:^|.*?\.){p}\.(?P<number>\d+)\.") for p in patterns
        ]
        if patterns and not numbers:
            raise ValueError("layers_pattern: wanted layers_to_transform too")
        if numbers and not target_modules:
            raise ValueError(f"{got}, wanted target_modules too: of experts all layers are meant")
        if numbers and isinstance(target_modules, str) and target_modules.lower() != "all-linear":
            raise ValueError(
                f"{got} and a regular expression for target_modules, which says it all; wanted a "
                "list of names"
            )
        return cls(frozenset(numbers), tuple(ways) or (_ANY,))

    def number_of(self, path: str) -> int | None:
        """Of the block that a path is in."""
        matches = (way.match(own_path(path)) for way in self.ways)
        found = next((match for match in matches if match is not None), None)
        number = None if found is None else found["number"]
        return None if number is None else int(number)

    def has(self, path: str) -> bool:
        """Whether a path is in one of the blocks."""
        return not self.numbers or self.number_of(path) in self.numbers

    def without_layers(self, paths: list[str]) -> dict[str, str]:
        """The numbers that are of none of the paths, for a report."""
        found = {self.number_of(path) for path in paths}
        return {
            f"{number} of layers_to_transform": "matches no layer that gets an adapter"
            for number in sorted(self.numbers - found)
        }


ALL_LAYERS = LayerNumbers(frozenset())


def _listed(value: object) -> list[Any]:
    """The values of one, of several or of none."""
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return list(value)
    return [] if value is None else [value]
