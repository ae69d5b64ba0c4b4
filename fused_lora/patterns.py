"""What layers have of their own, by patterns of their paths: rank_pattern and its like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from . import checks
from .codes import Format
from .paths import match_key
from .quantize import Quantize, Quantizer, check_format

Value = TypeVar("Value")


def ranks_of(pattern: Mapping[str, int] | None, r: int, paths: list[str]) -> dict[str, int]:
    """r of each path, by PEFT's rule for rank_pattern; TypeError or ValueError names the key."""
    ranks = _checked_pattern("rank_pattern", pattern)
    for name, rank in ranks.items():
        checks.check_rank(rank, f"rank_pattern[{name!r}]")
    return _per_layer("rank_pattern", ranks, r, paths)


def alphas_of(
    pattern: Mapping[str, float] | None, lora_alpha: float, paths: list[str]
) -> dict[str, float]:
    """lora_alpha of each path, as `ranks_of`."""
    alphas = _checked_pattern("alpha_pattern", pattern)
    for name, alpha in alphas.items():
        checks.check_number(f"alpha_pattern[{name!r}]", alpha)
    return _per_layer("alpha_pattern", alphas, lora_alpha, paths)


def formats_of(quantize: Quantize, paths: list[str]) -> dict[str, Format | Quantizer | None]:
    """What makes each path's codes, or None; a mapping goes by the rule of `ranks_of`.

    TypeError or ValueError unless it is what `inject` takes.
    """
    if not isinstance(quantize, Mapping):
        if quantize is not None:
            check_format(quantize)
        return dict.fromkeys(paths, quantize)
    for key, format in _checked_pattern("quantize", quantize, "formats").items():
        if format is not None:
            check_format(format, f"quantize[{key!r}]")
    return _per_layer("quantize", quantize, None, paths)


def _checked_pattern(
    name: str, pattern: Mapping[str, Value] | None, values: str = "numbers"
) -> Mapping[str, Value]:
    """The pattern; TypeError unless it is a mapping from strings, or None."""
    if pattern is None:
        return {}
    if not isinstance(pattern, Mapping) or not all(isinstance(key, str) for key in pattern):
        raise TypeError(f"{name}: got {pattern!r}, wanted a mapping from layers' names to {values}")
    return pattern


def _per_layer(
    name: str, pattern: Mapping[str, Value], default: Value, paths: list[str]
) -> dict[str, Value]:
    values = dict.fromkeys(paths, default)
    for key, value in reversed(list(pattern.items())):  # the first match counts, so it comes last
        for path in match_key(name, key, paths):
            values[path] = value
    return values


def unmatched(paths: list[str], **patterns: object) -> dict[str, str]:
    """The keys of mappings such as rank_pattern that decide for none of the paths, for a report."""
    found = {}
    for name, pattern in patterns.items():
        left = set(paths)  # for which no key before has decided
        for key in pattern if isinstance(pattern, Mapping) else ():
            matched = match_key(name, key, paths)
            if not matched:
                found[f"{key} of {name}"] = "matches no layer that gets an adapter"
            elif left.isdisjoint(matched):
                found[f"{key} of {name}"] = "matches only layers that keys before it match"
            left.difference_update(matched)
    return found
