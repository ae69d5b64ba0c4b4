"""Modules' paths, and what names and patterns of PEFT's match them."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Of torch.compile, checkpoint_wrapper and FSDP1: parts of a path that the model itself has not.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


def own_path(path: str) -> str:
    """A module's path, or that of what is in it, in the model without wrappers."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def in_any_layer(path: str) -> str:
    """A path without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", path)


def place_of(path: str, places: Iterable[str]) -> str | None:
    """The one of ``places`` that a path is, or is in; None if there is none."""
    return next((p for p in places if path == p or path.startswith(f"{p}.")), None)


def compiled(name: str, pattern: str, form: str | None = None) -> re.Pattern[str]:
    """``pattern``, or ``form``, which has it in it; ValueError that names the argument."""
    try:
        return re.compile(pattern if form is None else form)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None


def _matching(pattern: re.Pattern[str], paths: list[str]) -> list[str]:
    return [p for p in paths if pattern.fullmatch(own_path(p)) or pattern.fullmatch(p)]


def match_key(name: str, key: str, paths: list[str]) -> list[str]:
    """The paths that, or whose ends after a dot, a key of rank_pattern matches."""
    return _matching(compiled(name, key, rf"(.*\.)?({key})"), paths)


def match_paths(name: str, patterns: object, paths: list[str]) -> list[str]:
    """The paths that PEFT would match: a regular expression in full, or a list of suffixes."""
    if isinstance(patterns, str):
        return _matching(compiled(name, patterns), paths)
    if not isinstance(patterns, (list, tuple, set, frozenset)) or not all(
        isinstance(suffix, str) for suffix in patterns
    ):
        raise TypeError(f"{name}: got {patterns!r}, wanted a string or a list of strings")
    ends = tuple("." + suffix for suffix in patterns if suffix)
    return [p for p in paths if any(f".{path}".endswith(ends) for path in (own_path(p), p))]
