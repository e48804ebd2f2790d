# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Hostile cases of the ragged paged attention, their meaning as loops, and how to compare a result.

`make_case` draws a call's arrays; `by_loops` is what must come out, row by row in float64. A
`Setup` is what one compiled program of the kernel is made of; its batches are only other lengths.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_paged import layout
from pallas_paged.attention.api import ragged_paged_attention, write_and_attend
from pallas_paged.attention.tpu.launch import TpuAttentionConfig
from tests.kv_write.cases import (
    EXACT_COMPILE,
    FAST_COMPILE,
    INT_MAX,
    INT_MIN,
    difference,
    interpret,
)

NASTY_IDS = (2_147_480_000, -1, -(2**31), 10_000)


@dataclasses.dataclass
class Case:
    """One call's arrays, and what the loops need to know: k and v of every sequence."""

    q: np.ndarray
    kv_pages: jax.Array
    kv_lens: np.ndarray
    page_indices: np.ndarray
    cu_q_lens: np.ndarray
    num_seqs: np.ndarray
    keys: list[np.ndarray]  # [kv_len, K, H] of every sequence, as the pool holds them
    values: list[np.ndarray]
    num_kv_heads: int

    @property
    def arrays(self):
        return (
            jnp.asarray(self.q),
            self.kv_pages,
            jnp.asarray(self.kv_lens),
            jnp.asarray(self.page_indices),
            jnp.asarray(self.cu_q_lens),
            jnp.asarray(self.num_seqs),
        )


def make_case(
    lens: Sequence[tuple[int, int]],
    *,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    page_size=5,
    dtype="float32",
    pool_dtype="float32",
    seed=0,
    first_row=0,
    num_tokens=None,
    max_seqs=None,
    table_width=None,
    num_pages=None,
    num_rows=None,
) -> Case:
    """Hostile: pages permuted, every value fresh, NaN wherever nothing is, absurd unused ids.

    NaN is in unused pages and rows of pages, in the padding rows and lanes of used slots, and in
    the rows of q that no sequence has. (int8 has none, so 99 stands there.)

    Args:
      lens: (q_len, kv_len) of every sequence.
      first_row: `cu_q_lens[0]`.
      num_tokens, max_seqs, table_width, num_pages: T, S, M and P, so that several lists of lengths
        have arrays of the same shapes; None for a few more than are needed.
      num_rows: R of a caller's own pool; None takes what `make_kv_pages` gives.
    """
    rng = np.random.default_rng(seed)
    needed = [-(-kv // page_size) for _, kv in lens]
    total = first_row + sum(q_len for q_len, _ in lens)
    num_tokens = num_tokens or total + 3
    max_seqs = max_seqs or len(lens) + 2
    table_width = table_width or max(needed) + 2
    num_pages = num_pages or sum(needed) + 4
    shape = list(layout.pool_shape(num_pages, page_size, num_kv_heads, head_dim, pool_dtype))
    shape[2] = num_rows or shape[2]
    pool = np.full(shape, 99 if pool_dtype == "int8" else np.nan, np.float32)
    pages = rng.permutation(num_pages).astype(np.int32)
    table = rng.choice(NASTY_IDS, (max_seqs, table_width)).astype(np.int32)
    keys, values = [], []
    for row, (_, kv_len), count in zip(table, lens, needed, strict=False):
        row[:count], pages = pages[:count], pages[count:]
        k, v = (_stored(rng, (kv_len, num_kv_heads, head_dim), pool_dtype) for _ in "kv")
        position = np.arange(kv_len)
        _put(pool, row[position // page_size], position % page_size, k, v)
        keys.append(k)
        values.append(v)
    q = rng.standard_normal((num_tokens, num_heads, head_dim)).astype(np.float32)
    q[:first_row] = q[total:] = np.nan
    spare = max_seqs - len(lens)
    ends = np.cumsum([first_row, *(q_len for q_len, _ in lens)])
    return Case(
        q=q.astype(jnp.dtype(dtype)),
        kv_pages=jnp.asarray(pool.astype(jnp.dtype(pool_dtype))),
        kv_lens=np.array([kv for _, kv in lens] + [2**30] * spare, np.int32),
        page_indices=table,
        cu_q_lens=np.array([*ends, *([-7, 2**31 - 1] * spare)[:spare]], np.int32),
        num_seqs=np.array([len(lens)], np.int32),
        keys=keys,
        values=values,
        num_kv_heads=num_kv_heads,
    )


def _stored(rng, shape, pool_dtype):
    """Random values, float32, that a pool of `pool_dtype` holds exactly."""
    x = rng.standard_normal(shape) * (40.0 if pool_dtype == "int8" else 1.0)
    x = np.rint(x) if pool_dtype == "int8" else x
    return x.astype(np.float32).astype(jnp.dtype(pool_dtype)).astype(np.float32)


def _put(pool, pages, rows, k, v):
    """Sets the slots of k and v [L, K, H], and nothing else, not even their padding."""
    _, num_kv_heads, head_dim = k.shape
    for head in range(num_kv_heads):
        if head_dim <= 64:
            pool[pages, rows, head, :head_dim] = k[:, head]
            pool[pages, rows, head, 64 : 64 + head_dim] = v[:, head]
        else:
            pool[pages, rows, 2 * head, :head_dim] = k[:, head]
            pool[pages, rows, 2 * head + 1, :head_dim] = v[:, head]


def by_loops(
    case: Case,
    *,
    sm_scale=1.0,
    causal=True,
    sliding_window=None,
    soft_cap=None,
    mask_value=None,
    k_scale=1.0,
    v_scale=1.0,
    sinks=None,
):
    """Row by row, head by head, in float64."""
    num_tokens, num_heads, _ = case.q.shape
    out = np.zeros(case.q.shape)
    lse = np.full((num_tokens, num_heads), -np.inf)
    group = num_heads // case.num_kv_heads
    k_scale, v_scale = (np.broadcast_to(s, case.num_kv_heads) for s in (k_scale, v_scale))
    for seq in range(case.num_seqs[0]):
        start, end = case.cu_q_lens[seq : seq + 2]
        kv_len = case.kv_lens[seq]
        for token in range(start, end if kv_len else start):
            position = kv_len - (end - token)
            for head in range(num_heads):
                kv_head = head // group
                query = case.q[token, head].astype(np.float64)
                scores, values = [], []
                for j in range(kv_len):
                    hidden = (causal and j > position) or (
                        sliding_window is not None and j <= position - sliding_window
                    )
                    if hidden and mask_value is None:
                        continue
                    key = case.keys[seq][j, kv_head].astype(np.float64) * k_scale[kv_head]
                    score = query @ key * sm_scale
                    if soft_cap is not None:
                        score = soft_cap * np.tanh(score / soft_cap)
                    scores.append(score + (mask_value if hidden else 0.0))
                    values.append(case.values[seq][j, kv_head] * np.float64(v_scale[kv_head]))
                if sinks is not None:
                    scores.append(float(sinks[head]))
                    values.append(np.zeros_like(query))
                top = max(scores)
                weights = np.exp(np.array(scores) - top)
                out[token, head] = weights @ np.array(values) / weights.sum()
                lse[token, head] = top + np.log(weights.sum())
    return out, lse


# ---- What a kernel is held to

# Relative L2 error of one head over all rows, and of one row of one head, by q's dtype. The
# oracle gets q as float32, so that only the kernel rounds. In bfloat16 the output's rounding costs
# 1.7e-3 rms and the weights' rounding as much again; a row that is one key's weight and a sink's
# has up to 3.9e-3 of a single rounding. What the cases reach is 4e-7 and 1e-6; 3.3e-3 and 4e-3.
HEAD_TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 6e-4}
ROW_TOLERANCE = {"float32": 2e-5, "bfloat16": 7e-3, "float16": 1.5e-3}
LSE_TOLERANCE = 2e-5
# Relative L2 error of all that a call returns. In bfloat16 the output's rounding is 1.7e-3 of it.
# A prefill's rounding of its weights to bfloat16 is as much again (2.3e-3 in all) where every row
# weighs many keys, whose values are random and cancel; not where many rows see few keys, and not
# over a float32 pool, where weights stay float32. A decode's weights are not rounded.
WHOLE_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-3}
WHOLE_TOLERANCE_OF_ROUNDED_WEIGHTS = 2.5e-3


def head_errors(out: Any, wanted: Any) -> np.ndarray:
    """Relative L2 error of each head over all rows, f64[N], of [T, N, H]."""
    out, wanted = (np.asarray(x, np.float64) for x in (out, wanted))
    norm = np.sqrt(np.sum(wanted**2, axis=(0, 2)))
    return np.sqrt(np.sum((out - wanted) ** 2, axis=(0, 2))) / np.where(norm > 0, norm, 1.0)


def whole_error(out: Any, wanted: Any) -> float:
    """Relative L2 error over all rows and heads."""
    out, wanted = (np.asarray(x, np.float64) for x in (out, wanted))
    norm = np.linalg.norm(wanted)
    return float(np.linalg.norm(out - wanted) / (norm if norm > 0 else 1.0))


def row_errors(out: Any, wanted: Any) -> np.ndarray:
    """Relative L2 error of each row of each head, f64[T, N]; absolute where 0 is wanted."""
    out, wanted = (np.asarray(x, np.float64) for x in (out, wanted))
    norm = np.linalg.norm(wanted, axis=2)
    return np.linalg.norm(out - wanted, axis=2) / np.where(norm > 0, norm, 1.0)


def mismatch(out: Any, lse: Any, wanted: Any, wanted_lse: Any, *, slack: float = 1.0) -> str | None:
    """None where a result is as near the oracle's as it must be; else a sentence.

    Args:
      out: [T, N, H], of q's dtype.
      lse: f32[T, N], or None.
      wanted, wanted_lse: the oracle's, of q as float32.
      slack: factor on the tolerances, for scores so large that float32 is coarse.
    """
    dtype = str(out.dtype)
    wanted = np.asarray(wanted, np.float64)
    if not np.all(np.isfinite(np.asarray(out, np.float64))):
        where = np.argwhere(~np.isfinite(np.asarray(out, np.float64)))[0].tolist()
        return f"the output is not finite, first at {where}"
    is_zero = ~np.any(wanted, axis=(1, 2))
    if np.any(np.asarray(out, np.float64)[is_zero]):
        return "a row without work is not 0"
    by_head, by_row = head_errors(out, wanted), row_errors(out, wanted)
    if by_head.max() > slack * HEAD_TOLERANCE[dtype]:
        return f"head {by_head.argmax()} is off by {by_head.max():.2e}"
    if by_row.max() > slack * ROW_TOLERANCE[dtype]:
        where = np.unravel_index(by_row.argmax(), by_row.shape)
        return f"row, head {tuple(map(int, where))} is off by {by_row.max():.2e}"
    if lse is None:
        return None
    lse, wanted_lse = np.asarray(lse, np.float64), np.asarray(wanted_lse, np.float64)
    if not np.array_equal(np.isneginf(lse), np.isneginf(wanted_lse)):
        return "the log-sum-exp is -inf in other rows"
    there = ~np.isneginf(wanted_lse)
    off = np.max(np.abs(lse[there] - wanted_lse[there]), initial=0.0)
    return None if off <= slack * LSE_TOLERANCE else f"the log-sum-exp is off by {off:.2e}"


def interpret_all(call: Callable[[], Sequence[Any]], mode: str, **options) -> list[np.ndarray]:
    """All results of `call()` in TPU interpret mode; see `tests.kv_write.cases.interpret`."""
    results: list[np.ndarray] = []

    def run():
        results.extend(np.asarray(x) for x in call())
        return results[0]

    interpret(run, mode, **options)
    return results


def run_kernel(
    case: Case,
    options: dict[str, Any],
    mode: str,
    config: tuple[int, ...] = (128, 128, 2),
    *,
    detect_races: bool = True,
) -> list[np.ndarray]:
    """[out] or [out, log-sum-exp] of the interpreted kernel, through the public op.

    Looking for races takes time quadratic in what the kernel does: minutes for 150 decodes.
    """
    return interpret_all(
        lambda: call_kernel(ragged_paged_attention, case.arrays, options, config),
        mode,
        detect_races=detect_races,
    )


def call_kernel(op, arrays, options: dict[str, Any], config: tuple[int, ...]) -> tuple:
    """The results of a public op's kernel; calls that differ only in arrays share a program."""
    result = _call(op, arrays, options, "mosaic_tpu", TpuAttentionConfig(*config), FAST_COMPILE)
    return result if isinstance(result, tuple) else (result,)


def call_oracle(op, arrays, options: dict[str, Any]) -> Any:
    """The result of a public op's oracle; calls that differ only in arrays share a program."""
    return _call(op, arrays, options, "oracle", None, EXACT_COMPILE)


def _call(op, arrays, options, backend, config, compiler_options):
    dynamic = {k: v for k, v in options.items() if k == "sm_scale" or hasattr(v, "dtype")}
    static = {k: v for k, v in options.items() if k not in dynamic}
    static |= {"backend": backend, "config": config}
    jitted = _jitted(op, tuple(sorted(static.items())), tuple(compiler_options.items()))
    return jitted(arrays, dynamic)


@functools.cache
def _jitted(op, static, compiler_options):
    def call(arrays, dynamic):
        return op(*arrays, **dynamic, **dict(static))

    on_cpu = jax.default_backend() == "cpu"
    return jax.jit(call, compiler_options=dict(compiler_options) if on_cpu else None)


def run_oracle(case: Case, options: dict[str, Any]) -> list[jax.Array]:
    """[out, log-sum-exp] of the oracle, of q as float32, so that it does not round."""
    q, *rest = case.arrays
    options = options | {"return_lse": True}
    return call_oracle(ragged_paged_attention, (q.astype(jnp.float32), *rest), options)


def check(
    case: Case,
    options: dict[str, Any],
    mode: str,
    config: tuple[int, ...] = (128, 128, 2),
    *,
    detect_races: bool = True,
    slack: float = 1.0,
    label: str = "",
    whole_tolerance: float | None = None,
) -> list[np.ndarray]:
    """Raises AssertionError unless the kernel does what the oracle does; returns the kernel's."""
    out, *lse = run_kernel(case, options, mode, config, detect_races=detect_races)
    assert out.dtype == case.q.dtype and out.shape == case.q.shape
    wanted, wanted_lse = run_oracle(case, options)
    found = mismatch(out, lse[0] if lse else None, wanted, wanted_lse, slack=slack)
    assert found is None, label + found
    if whole_tolerance is not None:
        error = whole_error(out, wanted)
        assert error <= whole_tolerance, f"{label}the call is off by {error:.2e}"
    return [out, *lse]


# ---- The same where the call writes its new tokens


@dataclasses.dataclass
class Write:
    """A call that writes its new tokens: a case, k and v, and the pool before."""

    case: Case
    k: jax.Array
    v: jax.Array
    kv_pages: np.ndarray

    @property
    def arrays(self):
        """q, k, v, the pool and the metadata."""
        q, _, *metadata = self.case.arrays
        return q, self.k, self.v, jnp.asarray(self.kv_pages), *metadata


def make_write(
    case: Case,
    *,
    is_flat: bool,
    scales: tuple[Any, Any] = (None, None),
    new_dtype: str | None = None,
) -> Write:
    """Takes the new tokens out of a case's pool and gives them as k and v.

    In the pool NaN stands for them (99 in int8), padding included, so that they are not read from
    there unseen. k and v are NaN in the rows that no token comes from: those of no sequence and,
    where there are more new tokens than tokens, the first ones.

    Args:
      case: a batch; its keys and values are those of the pool, so k and v are multiplied by the
        scales to quantise to them again.
      is_flat: whether k and v are [T, K*H] rather than [T, K, H].
      scales: k_scale and v_scale.
      new_dtype: of k and v, None for q's.
    """
    head_dim, page_size = case.q.shape[2], case.kv_pages.shape[1]
    new = np.full((2, case.q.shape[0], case.num_kv_heads, head_dim), np.nan, np.float32)
    pool = np.array(case.kv_pages)
    stale = 99 if pool.dtype == np.int8 else np.nan
    for seq in range(case.num_seqs[0]):
        start, end = case.cu_q_lens[seq : seq + 2]
        kv_len = case.kv_lens[seq]
        count = min(end - start, kv_len)
        for kv, stored, scale in zip(new, (case.keys, case.values), scales, strict=True):
            factor = np.broadcast_to(1.0 if scale is None else scale, case.num_kv_heads)
            kv[end - count : end] = stored[seq][kv_len - count :] * factor[:, None]
        position = np.arange(kv_len - count, kv_len)
        pool[case.page_indices[seq, position // page_size], position % page_size] = stale
    k, v = (jnp.asarray(x, new_dtype or case.q.dtype) for x in new)
    if is_flat:
        k, v = (x.reshape(len(x), -1) for x in (k, v))
    return Write(case, k, v, pool)


def check_write(
    write: Write,
    options: dict[str, Any],
    mode: str,
    config: tuple[int, ...] = (128, 128, 2),
    *,
    detect_races: bool = True,
    slack: float = 1.0,
    label: str = "",
) -> None:
    """Raises AssertionError unless the fused kernel does what the oracle does, to the pool's last
    bit."""
    results = interpret_all(
        lambda: call_kernel(write_and_attend, write.arrays, options, config),
        mode,
        detect_races=detect_races,
    )
    found = write_mismatch(write, options, results, slack=slack)
    assert found is None, label + found


@contextlib.contextmanager
def counted_slots(kv_pages: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often the DMAs of interpreted kernels read and write each slot: two i64[P*page_size].

    Only of kernels that are compiled inside; k and v are [T, K*H].
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    counts = np.zeros((2, kv_pages.shape[0] * kv_pages.shape[1]), int)
    dma_start = interpret_pallas_call.dma_start

    def counting(
        token, device, core, source_space, source, source_at, space, target, at, *rest, **options
    ):
        for count, transforms in zip(counts, (source_at, at), strict=True):
            first, num_slots = _slots_of(transforms)
            count[first : first + num_slots] += 1
        return dma_start(
            token,
            device,
            core,
            source_space,
            source,
            source_at,
            space,
            target,
            at,
            *rest,
            **options,
        )

    interpret_pallas_call.dma_start = counting
    try:
        yield counts[0], counts[1]
    finally:
        interpret_pallas_call.dma_start = dma_start


def _slots_of(transforms) -> tuple[int, int]:
    """(first, number) of the pool's slots that one side of a DMA is; none if it is not the pool's.

    Of what a DMA touches, only the pool is [slots, words, lanes] and sliced in its first dimension.
    """
    for transform in jax.tree.leaves(transforms, is_leaf=lambda x: hasattr(x, "indices")):
        indices = getattr(transform, "indices", ())
        if len(indices) == 3 and hasattr(indices[0], "start"):
            return int(indices[0].start), int(indices[0].size)
    return 0, 0


def new_slots_of(case: Case) -> np.ndarray:
    """How many DMAs should write each slot, i64[P*page_size]: one per lane tile of a new token."""
    num_pages, page_size = case.kv_pages.shape[:2]
    counts = np.zeros(num_pages * page_size, int)
    for seq in range(case.num_seqs[0]):
        kv_len = case.kv_lens[seq]
        q_len = case.cu_q_lens[seq + 1] - case.cu_q_lens[seq]
        position = np.arange(max(0, kv_len - q_len), kv_len)
        counts[
            case.page_indices[seq, position // page_size] * page_size + position % page_size
        ] += case.kv_pages.shape[3] // 128
    return counts


def write_mismatch(write: Write, options, results, *, slack: float = 1.0) -> str | None:
    """None where (out, pool[, log-sum-exp]) are the oracle's; else a sentence."""
    out, kv_pages, *lse = results
    q, *rest = write.arrays
    options = options | {"return_lse": True}
    want, want_pages, want_lse = call_oracle(
        write_and_attend, (q.astype(jnp.float32), *rest), options
    )
    found = difference(kv_pages, want_pages)
    if found is not None:
        return "the pool: " + found
    return mismatch(out, lse[0] if lse else None, want, want_lse, slack=slack)


# ---- What one compiled program is made of

Batch = Literal[
    "mix",
    "prefill",
    "boundary",
    "blocks",
    "decodes",
    "window",
    "beyond_window",
    "few",
    "tiny",
    "late",
    "none",
    "chunks",
    "spans",
    "crowd",
]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The static side of a kernel's call, and the batches to run on its one program.

    Attributes:
      num_rows: R of a caller's own pool; None takes what `make_kv_pages` gives.
      scale: what k_scale and v_scale are.
      windows: sliding windows, one after another; empty for none.
      is_window_traced: whether the window is an array.
      config: the kernel's Config.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: str = "float32"
    pool_dtype: str = "float32"
    batches: tuple[Batch, ...] = ("mix", "prefill")
    num_rows: int | None = None
    scale: Literal["none", "tensor", "head"] = "none"
    causal: bool = True
    windows: tuple[int, ...] = ()
    is_window_traced: bool = False
    soft_cap: float | None = None
    has_sinks: bool = False
    return_lse: bool = False
    num_tokens: int = 171  # a multiple of no size in use; two q tiles
    config: tuple[int, ...] = (128, 128, 2)

    @property
    def id(self) -> str:
        """A readable name."""
        parts = [
            f"N{self.num_heads}",
            f"K{self.num_kv_heads}",
            f"H{self.head_dim}",
            f"p{self.page_size}",
            f"{_SHORT[self.dtype]}",
            f"on_{_SHORT[self.pool_dtype]}",
        ]
        parts += [f"R{self.num_rows}"] if self.num_rows else []
        parts += [f"scale_{self.scale}"] if self.scale != "none" else []
        parts += [] if self.causal else ["not_causal"]
        parts += ["window"] if self.windows else []
        parts += ["cap"] if self.soft_cap else []
        parts += ["sinks"] if self.has_sinks else []
        parts += ["lse"] if self.return_lse else []
        return "-".join(parts)

    def features(self) -> tuple[Any, ...]:
        """What a version of jax might break; for `jax_lines.runs`."""
        return (
            self.dtype,
            self.pool_dtype,
            (self.head_dim > 64, self.head_dim % 128 == 0),
            self.num_rows is None,
            self.scale,
            self.causal,
            (bool(self.windows), self.is_window_traced),
            self.soft_cap is None,
            self.has_sinks,
            self.return_lse,
            len(self.config),
        )

    def case(self, batch: Batch, seed: int = 0) -> Case:
        """The arrays of one batch, of the same shapes for all batches."""
        lists = [lengths(batch, self.page_size)[1] for batch in self.batches]
        first_row, lens = lengths(batch, self.page_size)
        pages = [[-(-kv // self.page_size) for _, kv in lens] for lens in lists]
        return make_case(
            lens,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            dtype=self.dtype,
            pool_dtype=self.pool_dtype,
            seed=seed,
            first_row=first_row,
            num_tokens=self.num_tokens,
            max_seqs=max(map(len, lists)) + 2,
            table_width=max(map(max, pages)) + 1,
            num_pages=max(map(sum, pages)) + 2,
            num_rows=self.num_rows,
        )

    def whole_tolerance(self, batch: Batch) -> float:
        """Largest relative L2 error of all that a call on a batch returns."""
        is_exact = batch in ("mix", "few", "late", "decodes", "crowd")
        if self.dtype == "bfloat16" and self.pool_dtype != "float32" and not is_exact:
            return WHOLE_TOLERANCE_OF_ROUNDED_WEIGHTS
        return WHOLE_TOLERANCE[self.dtype]

    def options(self, window: int | None = None) -> dict[str, Any]:
        """Keyword arguments of the public op; nothing among them is a power of two."""
        options: dict[str, Any] = {
            "sm_scale": 0.7 * self.head_dim**-0.5,
            "causal": self.causal,
            "soft_cap": self.soft_cap,
            "num_kv_heads": self.num_kv_heads,
            "return_lse": self.return_lse,
        }
        if window is not None:
            options["sliding_window"] = jnp.int32(window) if self.is_window_traced else window
        unit = 0.03 if self.pool_dtype == "int8" else 1.0
        head = np.arange(self.num_kv_heads, dtype=np.float32)
        if self.scale == "tensor":
            options |= {"k_scale": jnp.float32(0.9 * unit), "v_scale": jnp.float32(1.3 * unit)}
        if self.scale == "head":
            options |= {
                "k_scale": jnp.asarray((0.7 + 0.3 * head) * unit),
                "v_scale": jnp.asarray((1.9 - 0.2 * head) * unit),
            }
        if self.has_sinks:
            options["sinks"] = jnp.sin(jnp.arange(self.num_heads, dtype=jnp.float32)) * 3 + 1.5
        return options


_SHORT = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "int8": "i8",
}


def lengths(batch: Batch, page_size: int) -> tuple[int, list[tuple[int, int]]]:
    """cu_q_lens[0] and (q_len, kv_len) of the sequences of a batch, at most 171 rows.

    The numbers lie around KV blocks of 128 keys, q tiles of 128 rows and row tiles of 16 rows.
    """
    p = page_size
    if batch == "mix":  # every kind of sequence between the others, after rows without a sequence
        return 3, [
            (1, 129),
            (5, 5),
            (0, 40),
            (20, 150),
            (1, 1),
            (3, 0),
            (33, p + 33),
            (0, 0),
            (1, p),
        ]
    if batch == "prefill":  # begins and ends inside row tiles that it shares, in two q tiles
        return 0, [(1, 9), (3, 3), (139, 270), (1, 5), (2, 2)]
    if batch == "boundary":  # of pages
        ends = [p - 1, p, p + 1]
        return 0, [(min(q, n), n) for q, n in zip([1, 16, 1], ends, strict=True) if n]
    if batch == "blocks":  # of KV blocks, and of row tiles
        ends = [127, 128, 129, 255, 256, 257]
        return 0, list(zip([1, 15, 17, 1, 16, 1], ends, strict=True))
    if batch == "decodes":  # across row tiles and q tiles; most have no keys, to save time
        rows = (5, 15, 16, 17, 112, 126, 127, 128, 129, 143, 144, 154)
        kv_lens = [1 + 37 * row % 40 + (row % 16 == 1) * 190 for row in range(155)]
        return 5, [(1, kv_lens[row] if row in rows else 0) for row in range(5, 155)]
    if batch == "window":  # a decode in the last row of a q tile, then row tiles that begin anew
        return 0, [(127, 130), (1, 129), (16, 16), (17, 145)]
    if batch == "beyond_window":
        return 0, [(129, 129), (15, 256), (16, 17)]
    if batch == "few":
        return 1, [(1, 130), (3, 133), (0, 7), (2, 2)]
    if batch == "tiny":  # whole pages and parts of them
        return 1, [(1, 30), (20, 33), (0, 7), (9, 9)]
    if batch == "late":  # rows that see nothing: more new tokens than tokens
        return 4, [(1, 3), (4, 2), (20, 9), (1, 7)]
    if batch == "chunks":  # new tokens that begin and end in and at the ends of pages
        return 0, [
            (1, 7), (20, 30), (3, 0), (0, 3), (1, 1), (40, 2), (1, 16), (16, 16), (17, 33), (1, 6),
        ]  # fmt: skip
    if batch == "crowd":  # decodes of one block and of more in a row, with holes
        return 1, [
            (1, 9), (1, 128), (1, 129), (1, 1), (1, 300), (1, 17), (0, 4), (1, 256), (1, 0),
            (1, 40), (3, 5), (1, 77), (1, 257),
        ]  # fmt: skip
    if batch == "spans":  # multiple q tiles, whose ends are not those of pages
        return 2, [(1, 129), (150, 333), (3, 40), (130, 130), (1, 128)]
    return 2, [(0, 5), (0, 0), (7, 0)]


# Metadata that no batch of 6 slots, 6 pages each and 23 rows can have.
ABSURD = {
    "lengths": {"kv_lens": [-5, INT_MAX, INT_MIN, 3, 3, -1]},
    "longer than the table": {"kv_lens": [1000, 31, 2**30, 30, 7, 8]},
    "fewer tokens than new ones": {"kv_lens": [1, 1, 1, 1, 1, 1]},
    "decreasing rows": {"cu_q_lens": [19, 4, INT_MIN, INT_MAX, 0, 5, 3]},
    "huge rows": {"cu_q_lens": [INT_MAX, INT_MAX, 7, INT_MAX, INT_MIN, INT_MAX, 2]},
    "overlapping rows": {"cu_q_lens": [0, 9, 3, 17, 2, 20, 1]},
    "negative first row": {"cu_q_lens": [-9, 7, 8, 15, 20, 21, 22]},
    "too many sequences": {"num_seqs": [INT_MAX]},
    "a negative number of sequences": {"num_seqs": [INT_MIN]},
    "ids": {"page_indices": [[INT_MIN, -1, 2**30, INT_MAX, 9, 10]] * 6},
    "everything": {
        "kv_lens": [INT_MAX] * 6,
        "cu_q_lens": [INT_MIN, INT_MAX, 20, 1, 19, 0, INT_MAX],
        "num_seqs": [7],
        "page_indices": [[INT_MAX] * 6] * 6,
    },
}
