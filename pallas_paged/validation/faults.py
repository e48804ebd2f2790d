# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Faults in the values of an argument, and the error that names the first of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from pallas_paged import checks

OP = "validate"


class Fault(NamedTuple):
    """One way in which values can be wrong: at which indices, and the words for an index."""

    is_bad: np.ndarray
    got: Callable[[int], str]
    wanted: str
    hint: str


def refuse_first(argument: str, faults: Sequence[Fault]) -> None:
    """Raises the error of the first index at which any of the faults holds."""
    bad = np.flatnonzero(np.stack([fault.is_bad for fault in faults]).any(axis=0))
    if not bad.size:
        return
    index = int(bad[0])
    fault = next(f for f in faults if f.is_bad[index])
    checks.require(False, OP, argument, got=fault.got(index), wanted=fault.wanted, hint=fault.hint)


def value_at(array: np.ndarray) -> Callable[[int], str]:
    """The words for an index of an array that has the fault."""
    return lambda i: f"{array[i]} at index {i}"


def outside(ids: np.ndarray, size: int, what: str) -> Fault:
    """Ids that are neither -1 nor in [0, size)."""
    return Fault(
        (ids != -1) & ((ids < 0) | (ids >= size)),
        value_at(ids),
        f"-1 or a {what} in [0, {size})",
        "use -1 to skip an entry",
    )


def count_fault(count: np.ndarray, most: int, what: str) -> Fault:
    """A count of entries that is negative or more than there are."""
    return Fault(
        (count < 0) | (count > most),
        lambda i: f"{count[i]}",
        f"a count in [0, {most}]",
        f"there are {most} {what}",
    )
