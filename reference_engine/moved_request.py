# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A request on its way from one engine to another, with the keys and values of its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_paged
from pallas_paged.checks import describe, require
from reference_engine.config import EngineConfig, ModelConfig, num_pages_for
from reference_engine.request import Request
from reference_engine.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True, eq=False)
class MovedRequest:
    """All that another engine needs to go on with a request.

    Attributes:
      prompt_ids: the token ids of the prompt.
      params: how its tokens are chosen.
      output_ids: the tokens generated so far.
      stop_ids: the ids that end it.
      seed: the seed of its random numbers, so that it draws the same tokens as if it had stayed.
      num_computed: the number of its first tokens whose keys and values are in `pages`.
      pages: [L, n, page_size, R, C], of each of L layers the pages with these tokens, in order. n
        may be larger; what is behind them means nothing. It may be an array of jax on any device,
        or of numpy: `jax.device_get(moved.pages)` brings it to the host.
    """

    prompt_ids: tuple[int, ...]
    params: SamplingParams
    output_ids: tuple[int, ...]
    stop_ids: frozenset[int]
    seed: int
    num_computed: int
    pages: Any

    @classmethod
    def of(cls, request: Request, kv_pages: jax.Array, model: ModelConfig) -> MovedRequest:
        """A request without a pending token, and its pages in the pool of an engine."""
        pages = pallas_paged.gather_pages(kv_pages, _ids(request.page_ids, kv_pages, model))
        return cls(
            request.prompt_ids,
            request.params,
            tuple(request.output_ids),
            request.stop_ids,
            request.seed,
            request.num_computed,
            pages.reshape(model.num_layers, -1, *pages.shape[1:]),
        )

    def check(self, kv_pages: jax.Array, model: ModelConfig, config: EngineConfig) -> None:
        """Refuses a request that the engine with this pool cannot go on with.

        Raises:
          ValueError: it is too long for the engine, or its pages have another form than the pool's.
        """
        op = "Engine.attach"
        num_tokens = len(self.prompt_ids) + len(self.output_ids)
        require(
            num_tokens < config.max_model_len and self.num_computed < num_tokens,
            op,
            "moved",
            got=f"{num_tokens} tokens, {self.num_computed} of them computed",
            wanted=f"fewer than max_model_len={config.max_model_len}, not all of them computed",
            hint="an engine of this max_model_len cannot go on with it",
        )
        least = num_pages_for(self.num_computed, config.page_size)
        form = model.num_layers, *kv_pages.shape[1:]
        require(
            getattr(self.pages, "ndim", 0) == 5
            and (self.pages.shape[0], *self.pages.shape[2:]) == form
            and self.pages.shape[1] >= least
            and self.pages.dtype == kv_pages.dtype,
            op,
            "moved.pages",
            got=describe(self.pages),
            wanted=f"{kv_pages.dtype}[{form[0]}, n >= {least}, {', '.join(map(str, form[1:]))}]",
            hint="both engines need the same model, dtype and page_size",
        )

    def put(self, kv_pages: jax.Array, page_ids: Sequence[int], model: ModelConfig) -> jax.Array:
        """The pool with the request's tokens in the first of these pages of each layer.

        The pool is donated.
        """
        num_pages = num_pages_for(self.num_computed, kv_pages.shape[1])
        ids = _ids(page_ids[:num_pages], kv_pages, model)
        size = ids.shape[0] // model.num_layers
        pages = jnp.asarray(self.pages)[:, :size]
        missing = size - pages.shape[1]
        if missing:
            pages = jnp.pad(pages, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
        return pallas_paged.scatter_pages(kv_pages, ids, pages.reshape(-1, *kv_pages.shape[1:]))


def _ids(page_ids: Sequence[int], kv_pages: jax.Array, model: ModelConfig) -> jax.Array:
    """The ids of a request's pages in all layers, i32[L * n], then -1.

    n is a power of two, so that a few programs move requests of all lengths.
    """
    size = 1 << max(len(page_ids) - 1, 0).bit_length()
    ids = np.full(size, -1, np.int64)
    ids[: len(page_ids)] = page_ids
    first = np.arange(model.num_layers)[:, None] * (len(kv_pages) // model.num_layers)
    return jnp.asarray(np.where(ids >= 0, ids + first, -1).reshape(-1), jnp.int32)
