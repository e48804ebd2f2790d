# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Loads and stores of one row of many tokens, in refs whose tokens lie an odd pitch apart."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_paged import layout


@dataclasses.dataclass(frozen=True)
class TokenRows:
    """A ref [tokens, pitch, 1, 128] of which one row of 128 lanes per token is read or written.

    The pitch is odd, so that a stride from token to token meets all memory banks.

    Attributes:
      ref: the ref.
      is_interpreted: whether the kernel runs in the interpreter, which cannot reshape a ref.
    """

    ref: Any
    is_interpreted: bool

    def load(self, first: Any, num_tokens: int, row: int, step: int = 1) -> jax.Array:
        """[num_tokens, 128]: the row of every `step`-th token from `first` on."""
        if self.is_interpreted:
            num_rows = (num_tokens - 1) * step + 1
            return self.ref[pl.ds(first, num_rows), row, 0, :][::step]
        return self._flat[self._strided(first, num_tokens, row, step), :]

    def store(self, first: Any, row: int, x: jax.Array) -> None:
        """Stores x [num_tokens, 128] as the row of the tokens from `first` on."""
        if self.is_interpreted:
            self.ref[pl.ds(first, x.shape[0]), row, 0, :] = x
        else:
            self._flat[self._strided(first, x.shape[0], row, 1), :] = x

    def copy_token(self, target: Any, source: Any, num_rows: int) -> None:
        """Copies the first rows of the token `source` to the token `target`."""
        if self.is_interpreted:
            self.ref[target, :num_rows, 0, :] = self.ref[source, :num_rows, 0, :]
            return
        target, source = (pl.ds(at * self.ref.shape[1], num_rows) for at in (target, source))
        self._flat[target, :] = self._flat[source, :]

    def clear_token(self, target: Any, num_rows: int) -> None:
        """Fills the first rows of a token with zeros."""
        if self.is_interpreted:
            self.ref[target, :num_rows, 0, :] = jnp.zeros((num_rows, layout.LANES), self.ref.dtype)
            return
        rows = pl.ds(target * self.ref.shape[1], num_rows)
        self._flat[rows, :] = jnp.zeros((num_rows, layout.LANES), self.ref.dtype)

    @property
    def _flat(self) -> Any:
        return self.ref.reshape(-1, layout.LANES)

    def _strided(self, first: Any, num_tokens: int, row: int, step: int) -> Any:
        pitch = self.ref.shape[1]
        return pl.ds(first * pitch + row, num_tokens, stride=step * pitch)
