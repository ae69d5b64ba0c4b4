"""Fewer cases than a full product of parameters has, where each takes the interpreter a second."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import torch


def pairs(**parameters: Any) -> Iterator[tuple[Any, ...]]:
    """Cases in which any two values of two parameters meet: new ones in each run, by its SEED.

    With a GPU the full product, which takes it little. The last one printed is the one that failed.
    """
    cases = list(product(*(range(len(values)) for values in parameters.values())))
    chosen = cases if torch.cuda.is_available() else _covering(cases)
    for case in chosen:
        named = zip(parameters.items(), case, strict=True)
        found = {name: values[i] for (name, values), i in named}
        print(", ".join(f"{name} = {value}" for name, value in found.items()))
        yield tuple(found.values())


def _covering(cases: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Of the cases in a random order always the one with the most pairs that are still missing."""
    cases = [cases[i] for i in torch.randperm(len(cases)).tolist()]
    of = {case: {*combinations(enumerate(case), 2)} for case in cases}
    missing = set().union(*of.values())
    chosen = []
    while missing:
        chosen.append(max(cases, key=lambda case: len(of[case] & missing)))
        missing -= of[chosen[-1]]
    return chosen
