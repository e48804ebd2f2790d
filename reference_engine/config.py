# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The shape of a model, and the limits and choices of an engine. Both check themselves."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable

import numpy as np

from pallas_paged import dispatch
from pallas_paged.checks import require
from pallas_paged.scalars import read_int, read_real
from reference_engine.rope import RopeScaling

KV_WRITES = ("tokens", "slices", "pages", "fused")
BACKENDS = ("auto", *dispatch.BACKENDS)
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a dense decoder of the Llama family.

    Attributes:
      vocab_size: the number of token ids; an id is in [0, vocab_size).
      hidden_size: the width of the residual stream.
      intermediate_size: the width of the gated MLP.
      num_layers: the number of decoder layers.
      num_heads: the number of query heads, a multiple of `num_kv_heads`.
      num_kv_heads: the number of key and value heads.
      head_dim: the width of one head, even because RoPE rotates its two halves.
      rope_theta: the base of the rotary frequencies.
      rope_scaling: how the frequencies are scaled for longer contexts.
      rms_norm_eps: what every norm adds to the mean square.
      qkv_bias, o_bias, mlp_bias: whether these projections have biases.
      qk_norm: whether each head of queries and keys is normalised before it is rotated.
      tie_embeddings: whether the output projection is the embedding.
      max_position: the longest context that the model can serve; None for no bound.
      dtype: the name of the dtype of parameters, activations and pool.

    Raises:
      ValueError: a size is below 1, num_heads is no multiple of num_kv_heads, head_dim is odd, or
        the dtype is not served.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    max_position: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        ):
            object.__setattr__(self, name, _whole("ModelConfig", name, getattr(self, name), low=1))
        require(
            self.num_heads % self.num_kv_heads == 0,
            "ModelConfig",
            "num_heads",
            got=f"{self.num_heads}",
            wanted=f"a multiple of num_kv_heads={self.num_kv_heads}",
            hint="give every KV head the same number of query heads",
        )
        require(
            self.head_dim % 2 == 0,
            "ModelConfig",
            "head_dim",
            got=f"{self.head_dim}",
            wanted="an even number",
            hint="RoPE rotates the two halves of a head",
        )
        require(
            self.dtype in DTYPES,
            "ModelConfig",
            "dtype",
            got=f"{self.dtype!r}",
            wanted=f"one of {DTYPES}",
            hint="weights of another dtype are cast as they are read",
        )


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The limits and choices of one engine.

    Attributes:
      page_size: the number of tokens in a page.
      num_pages: the number of pages in the pool, per layer. None for as many as the memory has
        room for, see `reference_engine.defaults.resolve`; LLM does that.
      gpu_memory_utilization: the share of the memory that jax may use on the device which
        parameters, pool and steps take if num_pages is None.
      max_model_len: the most tokens of one request, prompt and output together.
      max_num_batched_tokens: the budget, how many new tokens steps have at most on average. What
        page alignment leaves of one step's budget, less than a page, is added to the next step's,
        so that a single step has fewer than `page_size` tokens more; see `max_step_tokens`. With
        `page_aligned_scheduling=False`, it is the most tokens of every step.
      max_num_seqs: the most requests that run at a time.
      page_aligned_scheduling: whether every chunk of a prefill but the last ends on a page
        boundary. Steps have as many tokens on average as without it, but not equally many, and
        they are padded to one of the shapes; BUILD_NOTES.md has what that costs.
      long_prefill_token_threshold: the most new tokens that one request gets in a step while
        another request competes with it; 0 for no such limit.
      max_deferrals: the most steps in a row that alignment may make a request wait. After that, the
        request gets a chunk that ends inside a page, and its next chunk ends on a boundary again.
      enable_prefix_caching: whether requests share the full pages of a common prefix.
      kv_write: how new keys and values are written to the pool. "tokens": one index per token;
        "slices": one slice per page that has new tokens; "pages": whole pages by their page ids,
        and slices for the rest; "fused": the attention's own call writes them, as the page table
        says (`pallas_paged.write_and_attend`).
      write_backend: the backend of the writes, see `pallas_paged.dispatch`. On a CPU, "mosaic_tpu"
        needs jax's TPU interpret mode around the engine.
      attention_backend: the backend of the attention; with "fused", of the writes too. The values
        are those of write_backend.
      token_buckets: the padded lengths that the packed batch may have. No step is longer than the
        last of them, so that (max_num_batched_tokens,) makes the budget the most of every step.
      seq_buckets: the padded numbers of sequences. If both are None, the shapes are those of
        `batch.batch_shapes`; if one is, its sizes are powers of two. With one token bucket and one
        sequence bucket, a request's logits do not depend on how it is chunked.
      compile_in_background: whether threads compile all shapes from the start on, while the engine
        serves. A step takes the smallest shape that is ready then, so that which bits a row gets
        may depend on time. If False, a step compiles its shape unless `Engine.warm_up` has.
      return_logits: whether to return, with every token, the logits that it was chosen from.
      async_scheduling: whether a step is scheduled, packed and dispatched while the device computes
        the step before, so that the device does not wait for the host; `Engine.step` then returns
        the tokens of the step before. False computes one step after the other.

    Raises:
      ValueError: a value cannot work; the message says why.
    """

    page_size: int = 16
    num_pages: int | None = 1024
    gpu_memory_utilization: float = 0.9
    max_model_len: int = 1024
    max_num_batched_tokens: int = 256
    max_num_seqs: int = 16
    page_aligned_scheduling: bool = True
    long_prefill_token_threshold: int = 0
    max_deferrals: int = 8
    enable_prefix_caching: bool = True
    kv_write: str = "pages"
    write_backend: str = "auto"
    attention_backend: str = "auto"
    token_buckets: tuple[int, ...] | None = None
    seq_buckets: tuple[int, ...] | None = None
    compile_in_background: bool = False
    return_logits: bool = False
    async_scheduling: bool = True

    def __post_init__(self) -> None:
        for name in (
            "page_size",
            "num_pages",
            "max_model_len",
            "max_num_batched_tokens",
            "max_num_seqs",
        ):
            if name != "num_pages" or self.num_pages is not None:
                self._set(name, _whole("EngineConfig", name, getattr(self, name), low=1))
        self._check_memory()
        for name in ("long_prefill_token_threshold", "max_deferrals"):
            self._set(name, _whole("EngineConfig", name, getattr(self, name), low=0))
        for name in (
            "page_aligned_scheduling",
            "enable_prefix_caching",
            "compile_in_background",
            "return_logits",
            "async_scheduling",
        ):
            value = getattr(self, name)
            require(
                isinstance(value, bool | np.bool_),
                "EngineConfig",
                name,
                got=f"{value!r}",
                wanted="True or False",
                hint="numbers and strings are not accepted",
            )
            self._set(name, bool(value))
        require(
            self.kv_write in KV_WRITES,
            "EngineConfig",
            "kv_write",
            got=f"{self.kv_write!r}",
            wanted=f"one of {KV_WRITES}",
            hint="pages is the page-granular form",
        )
        self._check_backends()
        self._check_buckets("token_buckets", self.max_num_batched_tokens)
        self._check_buckets("seq_buckets", self.max_num_seqs)
        if self.page_aligned_scheduling:
            self._check_alignment()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_memory(self) -> None:
        share = read_real(self.gpu_memory_utilization)
        require(
            share is not None and 0 < share <= 1,
            "EngineConfig",
            "gpu_memory_utilization",
            got=f"{self.gpu_memory_utilization!r}",
            wanted="a number above 0 and at most 1",
            hint="0.9 leaves a tenth of the memory to others",
        )
        self._set("gpu_memory_utilization", share)

    def _check_backends(self) -> None:
        for name in ("write_backend", "attention_backend"):
            value = getattr(self, name)
            require(
                value in BACKENDS,
                "EngineConfig",
                name,
                got=f"{value!r}",
                wanted=f"one of {BACKENDS}",
                hint="auto takes the fastest that runs here",
            )
        require(
            self.kv_write != "fused" or self.write_backend in ("auto", self.attention_backend),
            "EngineConfig",
            "write_backend",
            got=f"{self.write_backend!r}",
            wanted=f"'auto' or attention_backend={self.attention_backend!r},"
            " because kv_write is 'fused'",
            hint="one call writes and attends: name its backend in attention_backend",
        )

    def _check_buckets(self, name: str, largest: int) -> None:
        given = getattr(self, name)
        if given is None:
            return
        buckets = tuple(map(read_int, given)) if isinstance(given, Iterable) else ()
        rising = sorted({bucket for bucket in buckets if bucket is not None and bucket >= 1})
        require(
            bool(rising) and tuple(rising) == buckets and rising[-1] >= largest,
            "EngineConfig",
            name,
            got=f"{given!r}",
            wanted=f"a rising tuple of positive sizes, the last of them at least {largest}",
            hint=f"({largest},) is the smallest such tuple",
        )
        self._set(name, buckets)

    def _check_alignment(self) -> None:
        budget, page_size = self.max_num_batched_tokens, self.page_size
        threshold = self.long_prefill_token_threshold
        require(
            budget >= page_size,
            "EngineConfig",
            "max_num_batched_tokens",
            got=f"{budget}",
            wanted=f"at least page_size={page_size}",
            hint="no step could ever fill a page: raise it, or turn page_aligned_scheduling off",
        )
        require(
            threshold == 0 or threshold >= page_size,
            "EngineConfig",
            "long_prefill_token_threshold",
            got=f"{threshold}",
            wanted=f"0 or at least page_size={page_size}",
            hint="a chunk below a page can never end on its boundary",
        )
        if budget < self.max_num_seqs + page_size:
            warnings.warn(
                f"EngineConfig: max_num_batched_tokens={budget} is below max_num_seqs + page_size ="
                f" {self.max_num_seqs} + {page_size}: while all sequences decode, less than a page"
                " of each step is left for a prefill, which then waits up to"
                f" max_deferrals={self.max_deferrals} steps for the next page boundary; if that is"
                " still out of reach, it gets a chunk that ends inside a page",
                stacklevel=3,
            )

    @property
    def pool_pages(self) -> int:
        """`num_pages`, where the number is known.

        Raises:
          ValueError: it is None.
        """
        if self.num_pages is None:
            raise ValueError(
                "EngineConfig: argument `num_pages` is None; wanted a number of pages here: LLM"
                " chooses one, and so does reference_engine.defaults.resolve"
            )
        return self.num_pages

    @property
    def max_step_tokens(self) -> int:
        """More new tokens than this no step has; memory and shapes are made for them.

        >>> EngineConfig(max_num_batched_tokens=256, page_size=16).max_step_tokens
        272
        >>> EngineConfig(max_num_batched_tokens=256, token_buckets=(256,)).max_step_tokens
        256
        """
        if not self.page_aligned_scheduling or self.page_size == 1:
            return self.max_num_batched_tokens
        most = self.max_num_batched_tokens + self.page_size
        return min(most, self.token_buckets[-1]) if self.token_buckets else most

    @property
    def max_pages_per_seq(self) -> int:
        """The width of the page table."""
        return num_pages_for(self.max_model_len, self.page_size)


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """The number of pages that hold `num_tokens` tokens.

    >>> [num_pages_for(n, 16) for n in (0, 1, 16, 17)]
    [0, 1, 1, 2]
    """
    return -(-num_tokens // page_size)


def _whole(where: str, name: str, given: object, *, low: int) -> int:
    """The int of a whole number of Python, numpy or jax, if it is at least `low`."""
    value = read_int(given)
    require(
        value is not None and value >= low,
        where,
        name,
        got=f"{given!r}",
        wanted=f"an int >= {low}",
        hint="pass a positive whole number" if low else "pass 0 to turn it off",
    )
    assert value is not None
    return value
