# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Reads the numbers that a caller passes: those of Python, numpy and jax alike.

A bool is not a number here, and neither is a string or a list. checks.py raises the errors.
"""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_array(x: Any) -> bool:
    """Whether x is an array of jax or numpy: no tensor of another library, no wrapper of an array.

    A ShapeDtypeStruct counts as one, because its form can be checked; jax itself says clearly that
    it cannot compute with it.
    """
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def read_int(x: Any) -> int | None:
    """The int of a concrete integer of Python, numpy or jax of shape []; None for all else."""
    if isinstance(x, bool | jax.core.Tracer):
        return None
    try:
        return operator.index(x)
    except TypeError:
        return None


def read_bool(x: Any) -> bool | None:
    """The bool of a concrete bool of Python, numpy or jax of shape []; None for all else.

    It waits for a jax array.
    """
    if isinstance(x, bool):
        return x
    is_traced = isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)
    is_bool = is_array(x) and x.dtype == jnp.bool_ and x.shape == ()
    return bool(x) if is_bool and not is_traced else None


def read_real(x: Any) -> float | None:
    """The float of a concrete number of Python, numpy or jax of shape [] or [1]; else None.

    It waits for a jax array.
    """
    if not is_real(x) or isinstance(x, jax.core.Tracer) or shape_of(x) not in ((), (1,)):
        return None
    values = np.asarray(x) if isinstance(x, jax.Array) else host_values(x)
    return None if values is None else float(values.reshape(()))


def is_real(x: Any) -> bool:
    """Whether x is a real number or an array of them, concrete or traced."""
    if is_array(x):
        return is_integer(x) or jnp.issubdtype(x.dtype, jnp.floating)
    return isinstance(x, int | float) and not isinstance(x, bool)


def is_integer(x: Any) -> bool:
    """Whether x is an integer or an array of them, concrete or traced."""
    if is_array(x):
        # numpy counts durations among the integers.
        return jnp.issubdtype(x.dtype, jnp.integer) and x.dtype.kind != "m"
    return isinstance(x, int) and not isinstance(x, bool)


def shape_of(x: Any) -> tuple[int, ...]:
    """The shape of a number or an array."""
    return tuple(x.shape) if is_array(x) else ()


def host_values(x: Any) -> np.ndarray | None:
    """The values of a number or an array of them, if they can be read without a wait; else None.

    They cannot if the array is traced or lies on an accelerator. A Python int that is too large for
    a float is taken as infinite.
    """
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return None
    if isinstance(x, jax.Array):
        return np.asarray(x) if _lies_on_host(x) else None
    if is_array(x):
        return np.asarray(x)
    try:
        return np.asarray(float(x))
    except OverflowError:
        return np.asarray(np.inf if x > 0 else -np.inf)


def _lies_on_host(x: jax.Array) -> bool:
    return x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())


def to_float32(values: np.ndarray) -> np.ndarray:
    """The values as float32: infinite where they are too large for it, 0 where too small."""
    with np.errstate(over="ignore", under="ignore"):
        return values.astype(np.float32)


def as_float32(x: Any) -> Any:
    """A real number or an array of them as float32.

    A jax array remains one and stays where it is; a numpy array remains one; a number becomes a
    np.float32, not an array of shape [].
    """
    if isinstance(x, jax.Array):
        return x if x.dtype == jnp.float32 else x.astype(jnp.float32)
    values = host_values(x)
    return x if values is None else to_float32(values)[()]


def as_int32(x: Any) -> Any:
    """An integer or an array of them as int32: saturated where out of range, not wrapped."""
    least, most = -(2**31), 2**31 - 1
    if not is_array(x):
        return np.int32(min(max(x, least), most))
    if x.dtype == jnp.int32:
        return x
    xp = jnp if isinstance(x, jax.Array) else np
    info = jnp.iinfo(x.dtype)
    if info.max > most:
        x = xp.minimum(x, xp.asarray(most, x.dtype))
    if info.min < least:
        x = xp.maximum(x, xp.asarray(least, x.dtype))
    return x.astype(jnp.int32)


def as_scalar(x: Any) -> Any:
    """An array of shape [] or [1] as one of shape []."""
    if x.shape == ():
        return x
    return x.reshape(()) if isinstance(x, jax.Array) else x.reshape(())[()]


def show(x: Any) -> str:
    """What came, for an error: the dtype[shape] of an array, else the value, in one short line.

    >>> show(jnp.zeros((2, 3))), show([1, "a"])
    ('float32[2,3]', "[1, 'a']")
    """
    if is_array(x):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    try:
        text = " ".join(repr(x).split())
    except ValueError:  # an int of more digits than Python prints
        text = "a very large number"
    return text if len(text) <= 120 else text[:117] + "..."
