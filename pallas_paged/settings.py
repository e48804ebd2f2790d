# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Makes the ops independent of jax's global settings: they are traced under jax's defaults."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_INT32 = jnp.iinfo(jnp.int32)

# (context manager, the name that jax.config has its flag under, the value that the ops want).
_DEFAULTS = (
    (jax.enable_x64, "jax_enable_x64", False),
    (jax.default_matmul_precision, "jax_default_matmul_precision", None),
    (jax.numpy_rank_promotion, "jax_numpy_rank_promotion", "allow"),
    (jax.numpy_dtype_promotion, "jax_numpy_dtype_promotion", "standard"),
    (jax.disable_jit, "jax_disable_jit", False),
    # jax's own GPU kernels leave tracers in their jaxprs.
    (jax.check_tracer_leaks, "jax_check_tracer_leaks", False),
)
_NO_DEBUG_INFS = (jax.debug_infs, "jax_debug_infs", False)
_NO_DEBUG_NANS = (jax.debug_nans, "jax_debug_nans", False)


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    """A context in which jax traces by its own defaults, whatever the process or a caller has set.

    In it a Python int becomes an int32 and not an int64, a product has the precision that it names,
    and arrays broadcast. The settings no longer matter when the result is lowered, outside of the
    context: a jaxpr has its dtypes.
    """
    with contextlib.ExitStack() as stack:
        _reset(stack, _DEFAULTS)
        yield


def _reset(stack: contextlib.ExitStack, wanted: tuple[tuple[Any, str, Any], ...]) -> None:
    """Enters the settings that are not as wanted: all of them would take 20 to 40 us per call."""
    for context, name, value in wanted:
        found = getattr(jax.config, name)
        if getattr(found, "value", found) != value:  # some are enums
            stack.enter_context(context(value))


def independent(*, checks_nans: bool = False) -> Callable[[Any], Any]:
    """Decorates a jitted function so that jax's settings change nothing about it.

    Args:
      checks_nans: whether `jax_debug_nans` still looks at the results. It must not where the pool
        is one of them, because unused rows may hold anything. `jax_debug_infs` never looks at them,
        because the log-sum-exp of a row without work is -inf.
    """

    wanted = (*_DEFAULTS, _NO_DEBUG_INFS, *(() if checks_nans else (_NO_DEBUG_NANS,)))

    def decorate(jitted: Any) -> Any:
        @functools.wraps(jitted)
        def call(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as stack:
                args, kwargs = jax.tree.map(_narrow, (args, kwargs))
                _reset(stack, wanted)
                # Numbers are sent to the device even under a guard, which is meant for arrays.
                if not any(isinstance(x, np.ndarray) for x in jax.tree.leaves((args, kwargs))):
                    stack.enter_context(jax.transfer_guard_host_to_device("allow"))
                return jitted(*args, **kwargs)

        return call

    return decorate


def _narrow(x: Any) -> Any:
    """A 64-bit array, which `jax_enable_x64` makes, as 32 bits; integers saturate."""
    dtype = getattr(x, "dtype", None)
    if dtype == jnp.float64:
        return x.astype(jnp.float32)
    if dtype == jnp.int64:
        return x.clip(_INT32.min, _INT32.max).astype(jnp.int32)
    return x
