# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Hostile cases of the KV writes, their meaning as a plain loop, and how to run and compare them.

Shared by the tests and the bench's correctness gate, so nothing here needs pytest. A `Case` says
what a call looks like; `make` draws its arrays; `expected` is the pool that must come out, from a
loop in numpy that shares no code with the package.
"""

import contextlib
import dataclasses
import functools
import inspect
import threading
import types
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental.pallas import tpu as pltpu

import pallas_paged
from pallas_paged.kv_write.options import WriteOptions, WriteScales

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
MODES = ("on_wait", "eager")  # each finds bugs that the other misses

Op = Literal["page_write", "slice_write", "token_write", "copy_pages"]
# How the entries of a call lie.
Entries = Literal[
    "any",  # every order, overlapping sources, and entries that are out of range in every way
    "holes",  # ascending, some to be skipped
    "live",  # ascending, all good
    "equal",  # slices: ascending, all good, of one length
    "beyond",  # pages: ascending, what is to be skipped has an id past the pool, none is negative
    "step_back",  # pages: one step back, right after a start that overflows int32
    "implicit",  # pages: no token_starts, with holes
    "none",  # all are to be skipped
]
# What is worth running on one compiled program: their arrays have the same shapes.
KINDS: dict[Op, tuple[Entries, ...]] = {
    "page_write": ("any", "holes", "live", "beyond", "step_back", "none"),
    "slice_write": ("any", "holes", "live", "equal", "none"),
    "token_write": ("any", "live", "none"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call's static side.

    Attributes:
      num_rows: R of a caller's own pool; None takes what `make_kv_pages` gives.
      scale: what k_scale and v_scale are, for 8-bit pools.
      extreme: k and v hold infinities, NaN, subnormals, ties, and values beyond the pool's range.
      block_tokens, transpose_packed, fetch_first: the kernel's Config. The blocks are small, so
        that a small case has more than one.
    """

    op: Op
    num_tokens: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    pool_dtype: str = "bfloat16"
    entries: Entries = "any"
    new_dtype: str = "bfloat16"
    is_flat: bool = True
    scale: Literal["none", "tensor", "head"] = "none"
    extreme: bool = False
    num_rows: int | None = None
    block_tokens: int = 16
    transpose_packed: bool = False
    fetch_first: bool = True

    @property
    def id(self) -> str:
        """A readable name."""
        form = "T,KH" if self.is_flat else "T,K,H"
        parts = [
            self.op,
            self.entries,
            f"T{self.num_tokens}",
            f"p{self.page_size}",
            f"K{self.num_kv_heads}",
            f"H{self.head_dim}",
            f"{_SHORT[self.new_dtype]}[{form}]",
            f"to_{_SHORT[self.pool_dtype]}",
        ]
        parts += [f"R{self.num_rows}"] if self.num_rows else []
        parts += [f"scale_{self.scale}"] if self.scale != "none" else []
        parts += ["extreme"] if self.extreme else []
        parts += ["packed"] if self.transpose_packed else []
        parts += [] if self.fetch_first else ["fetch_late"]
        return "-".join(parts)


_SHORT = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "int8": "i8",
}


@dataclasses.dataclass(frozen=True)
class Call:
    """One call's arrays, in numpy; `metadata` are the op's positional arguments after k and v."""

    case: Case
    kv_pages: np.ndarray
    k: np.ndarray | None
    v: np.ndarray | None
    metadata: tuple[np.ndarray | None, ...]
    k_scale: np.ndarray | float | None = None
    v_scale: np.ndarray | float | None = None

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Fresh arrays for the public op (it donates the pool)."""
        new = () if self.k is None else (self.k, self.v)
        positional = [None if x is None else jnp.array(x) for x in (*new, *self.metadata)]
        keywords: dict[str, Any] = {}
        if self.k is not None:
            keywords["num_kv_heads"] = self.case.num_kv_heads
            for name in ("k_scale", "v_scale"):
                scale = getattr(self, name)
                if scale is not None:
                    keywords[name] = jnp.asarray(scale, jnp.float32)
        return [jnp.array(self.kv_pages), *positional], keywords

    def config(self, backend: str) -> Any:
        """The Config of this case for a backend's kernel."""
        if backend == "mosaic_gpu":
            return pallas_paged.GpuWriteConfig(self.case.block_tokens, self.case.fetch_first)
        return pallas_paged.TpuWriteConfig(self.case.block_tokens, self.case.transpose_packed)

    def backend_arguments(self, backend: str) -> tuple[list[Any], WriteOptions]:
        """Fresh arrays, scales among them, and options for the op in a backend's own module."""
        arrays, keywords = self.arguments()
        if self.k is not None:
            arrays.append(WriteScales(keywords.get("k_scale"), keywords.get("v_scale")))
        config = self.config(backend)
        return arrays, WriteOptions(backend, False, config, self.case.num_kv_heads)

    def run(self, backend: str) -> jax.Array:
        """Calls the public op, with the TPU kernel, which is interpreted, in a quick jit."""
        positional, keywords = self.arguments()
        op = getattr(pallas_paged, self.case.op)
        op = _quickly_compiled(op) if backend == "mosaic_tpu" else op
        return op(*positional, **keywords, config=self.config(backend), backend=backend)


def make(case: Case, seed: int = 0) -> Call:
    """Draws a case's arrays: a pool that is never zero, fresh k and v for every token."""
    rng = np.random.default_rng([seed, zlib.crc32(case.id.encode())])
    draw = {
        "page_write": _page_entries,
        "slice_write": _slice_entries,
        "token_write": _token_entries,
        "copy_pages": _copy_entries,
    }[case.op]
    num_pages, metadata = draw(case, rng)
    pool = _random_pool(case, num_pages, rng)
    if case.op == "copy_pages":
        return Call(case, pool, None, None, metadata)
    k, v = _new(case, rng), _new(case, rng)
    return Call(case, pool, k, v, metadata, _scale(case, rng), _scale(case, rng))


def _random_pool(case, num_pages, rng):
    """Random bits: NaN of every payload, infinities, subnormals, but never a zero byte pattern."""
    empty = pallas_paged.make_kv_pages(
        1, 1, case.num_kv_heads, case.head_dim, jnp.dtype(case.pool_dtype)
    )
    num_rows = case.num_rows or empty.shape[2]
    dtype = np.dtype(empty.dtype)
    bits = np.dtype(f"uint{8 * dtype.itemsize}")
    shape = (num_pages, case.page_size, num_rows, empty.shape[3])
    pool = rng.integers(1, np.iinfo(bits).max, shape, bits, endpoint=True).view(dtype)
    if case.num_rows and dtype != np.int8:
        # The kernels pad such a pool, and XLA on a CPU does not keep a NaN's payload when it pads.
        with np.errstate(invalid="ignore"):
            pool = np.where(np.isnan(pool), dtype.type(1), pool)
    return pool


# What rounding and saturation can get wrong: ties, the ends of each pool's range and its
# subnormals (2**-9 and 2**-16 are the smallest of the two fp8), signed zeros.
_EXTREMES = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, 1e-40, 1e-30]
    + [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, 128.0, -128.5, -129.0, 1e6]
    + [447.0, 448.0, 456.0, 464.0, 465.0, 480.0, -448.0, -500.0, 57344.0, 61440.0, -65536.0]
    + [x * 2.0**e for e in (-6, -9, -10, -14, -16, -17) for x in (1, 1.5, -1.25, 0.5, 0.75)]
    + [1.0625, 1.1875, 17.0, 19.0, 1.125, 1.375],
    np.float32,
)


def _new(case, rng):
    shape = (case.num_tokens, case.num_kv_heads * case.head_dim)
    if not case.is_flat:
        shape = (case.num_tokens, case.num_kv_heads, case.head_dim)
    if jnp.dtype(case.new_dtype).itemsize == 1:  # as an 8-bit pool is to hold them: any bits
        return rng.integers(0, 256, shape, np.uint8).view(jnp.dtype(case.new_dtype))
    x = rng.standard_normal(shape, np.float32)
    if case.pool_dtype == "int8":
        x = x * 40
    if case.extreme:
        x = np.where(rng.random(shape) < 0.5, rng.choice(_EXTREMES, shape), x)
    with np.errstate(over="ignore"):  # float16 has no 1e6
        return x.astype(jnp.dtype(case.new_dtype))


def _scale(case, rng):
    if case.scale == "none":
        return None
    size = case.num_kv_heads if case.scale == "head" else None
    return np.float32(rng.uniform(0.1, 3.0, size))


def _nasty_ids(limit, rng, n):
    """Ids outside [0, limit)."""
    return rng.choice(np.array([-1, -2, INT_MIN, INT_MAX, limit, limit * 33, -limit]), n)


def _holes(case, n, rng):
    """Which of n entries are to be skipped: some, the first and the last two among them."""
    if case.entries == "none":
        return np.ones(n, bool)
    if case.entries in ("live", "equal", "beyond", "step_back"):
        return np.zeros(n, bool)
    hole = rng.random(n) < 0.25
    hole[:1] = n > 3
    hole[-2:] = n > 5
    return hole


def _int32(*arrays):
    return tuple(np.asarray(a, np.int64).astype(np.int32) for a in arrays)


def _page_entries(case, rng):
    num_tokens, page_size = case.num_tokens, case.page_size
    num_pages = num_tokens // page_size + 16
    pages = rng.permutation(num_pages).astype(np.int64)
    if case.entries == "implicit":
        n = num_tokens // page_size + 2  # two pages that the batch does not have
        ids, starts = pages[:n], None
    elif case.entries in ("any", "none"):
        n = num_tokens // page_size + 3
        ids, starts = pages[:n], rng.integers(0, max(1, num_tokens - page_size + 1), n)
    else:
        starts, token = [], rng.integers(0, 2)
        while token + page_size <= num_tokens:
            starts.append(token)
            token += page_size + (rng.integers(0, 3) if len(starts) % 8 == 7 else 0)
        n, starts = len(starts), np.array(starts, np.int64)
        ids = pages[:n]
    spare = pages[n:]
    hole = _holes(case, n, rng)
    ids[hole] = _nasty_ids(num_pages, rng, hole.sum())
    if case.entries == "implicit":
        return num_pages, (*_int32(ids), None)
    if case.entries == "beyond":
        ids[n // 2 :: 16] = num_pages
        ids[n // 2 + 1 :: 16] = INT_MAX
    if case.entries == "step_back":
        ids, starts = np.roll(ids, n // 2), np.roll(starts, n // 2)
        ids, starts = np.insert(ids, n // 2, spare[0]), np.insert(starts, n // 2, INT_MAX)
    if case.entries == "any":
        # Good pages with sources that leave the batch, among the others.
        wild = np.array(
            [-1, num_tokens - page_size + 1, num_tokens, INT_MAX, INT_MIN, INT_MAX - page_size + 1]
        )
        where = rng.integers(0, n + 1, wild.size)
        ids = np.insert(ids, where, spare[: wild.size])
        starts = np.insert(starts, where, wild)
    # What write_indices puts after the pages of a batch; one number of entries for all kinds.
    num_unused = num_tokens // page_size + 12 - ids.size
    ids, starts = np.append(ids, [-1] * num_unused), np.append(starts, [-1] * num_unused)
    return num_pages, _int32(ids, starts)


def _slice_entries(case, rng):
    """Slices of free slots: every page that is used is cut into runs, in random order."""
    num_tokens, page_size = case.num_tokens, case.page_size
    num_pages = 2 * -(-num_tokens // page_size) + 12
    size = num_pages * page_size
    lengths = _slice_lengths(case, rng)
    tokens = np.cumsum([0, *lengths])[:-1]
    rows = np.array([_free_slots(lengths, page_size, rng), tokens, lengths], np.int64)
    rows = rows.reshape(3, -1)
    if case.entries == "any":
        rows[1] = [rng.integers(0, num_tokens - n + 1) for n in lengths]
    hole = _holes(case, rows.shape[1], rng)
    by_slot = hole & (rng.random(hole.size) < 0.6)
    rows[0][by_slot] = _nasty_ids(size, rng, by_slot.sum())
    by_length = hole & ~by_slot
    rows[2][by_length] = rng.choice([0, -1, INT_MIN], by_length.sum())
    # Pages that nobody may touch: the last 8 are spare.
    spare = (num_pages - 1 - np.arange(8)) * page_size
    if case.entries == "any":
        wild = np.array(
            [
                (spare[0] + page_size - 1, 0, 2),
                (spare[1], 0, page_size + 1),
                (spare[2], -1, 1),
                (spare[3], num_tokens, 1),
                (spare[3], num_tokens - 1, 2),
                (spare[4], INT_MAX, 1),
                (spare[4], INT_MIN, 1),
                (spare[5], 0, INT_MAX),
                (spare[5], 0, 0),
                (size - 1, 0, 2),
                (INT_MAX, INT_MAX, INT_MAX),
            ],
            np.int64,
        ).T
        where = rng.integers(0, rows.shape[1] + 1, wild.shape[1])
        rows = np.insert(rows, where, wild, axis=1)
    num_slices = rows.shape[1]
    # After num_slices: slices that would be good ones, and absurd ones.
    unused = np.array([(spare[6], 0, 1), (spare[7], 0, 1), (INT_MIN, INT_MAX, INT_MIN)]).T
    rows = np.concatenate([rows, np.tile(unused, num_tokens + 16)], axis=1)[:, : num_tokens + 16]
    return num_pages, (*_int32(rows), *_int32([num_slices]))


def _slice_lengths(case, rng):
    """About two tokens per slice, so that whole iterations of 16 come up; "any" has longer ones."""
    lengths, free = [], case.num_tokens
    while free > 0:
        is_long = case.entries == "any" and rng.random() < 0.3
        longest = min(case.page_size, case.page_size if is_long else 2)
        if case.entries == "equal" and free < longest:
            break
        shortest = longest if case.entries == "equal" else 1
        lengths.append(int(min(free, rng.integers(shortest, longest, endpoint=True))))
        free -= lengths[-1]
    return lengths


def _free_slots(lengths, page_size, rng):
    """A first slot for each run, no two overlapping, none leaving its page; permuted pages."""
    slots, page, row = [0] * len(lengths), 0, int(rng.integers(0, page_size))
    for i in rng.permutation(len(lengths)):
        if row + lengths[i] > page_size:
            page, row = page + 1, 0
        slots[i] = page * page_size + row
        row += lengths[i]
    permuted = rng.permutation(page + 1)
    return [int(permuted[s // page_size]) * page_size + s % page_size for s in slots]


def _token_entries(case, rng):
    n = case.num_tokens
    num_pages = -(-n // case.page_size) + 3
    slots = rng.permutation(num_pages * case.page_size)[:n].astype(np.int64)
    hole = _holes(case, n, rng)
    slots[hole] = _nasty_ids(num_pages * case.page_size, rng, hole.sum())
    return num_pages, _int32(slots)


def _copy_entries(case, rng):
    n = case.num_tokens  # pairs
    num_pages = 2 * n + 3
    pages = rng.permutation(num_pages).astype(np.int64)
    src, dst = pages[:n].copy(), pages[n : 2 * n].copy()
    src[1::5] = src[0::5][: src[1::5].size]  # one page copied twice
    hole = _holes(case, n, rng)
    which = hole & (rng.random(n) < 0.5)
    src[which] = _nasty_ids(num_pages, rng, which.sum())
    dst[hole & ~which] = _nasty_ids(num_pages, rng, (hole & ~which).sum())
    return num_pages, _int32(src, dst)


def expected(call: Call) -> np.ndarray:
    """The pool after the call, one token at a time in Python integers."""
    pool = call.kv_pages.copy()
    num_pages, page_size = pool.shape[:2]
    if call.case.op == "copy_pages":
        for src, dst in zip(*(x.tolist() for x in call.metadata), strict=True):
            if 0 <= src < num_pages and 0 <= dst < num_pages:
                pool[dst] = call.kv_pages[src]
        return pool
    num_tokens = call.k.shape[0]
    slots = new_slots(call)
    for slot, token, length in _entries(call):
        if not (0 <= slot < num_pages * page_size and 0 <= token and 1 <= length):
            continue
        if token + length > num_tokens or slot % page_size + length > page_size:
            continue
        for j in range(length):
            pool[(slot + j) // page_size, (slot + j) % page_size] = slots[token + j]
    return pool


def _entries(call):
    """(first slot, first token, length) of each entry that the call is given."""
    page_size = call.kv_pages.shape[1]
    if call.case.op == "page_write":
        ids, starts = call.metadata
        for i, page in enumerate(ids.tolist()):
            yield page * page_size, i * page_size if starts is None else int(starts[i]), page_size
    elif call.case.op == "slice_write":
        slices, num_slices = call.metadata
        for i in range(min(slices.shape[1], int(num_slices[0]))):
            yield tuple(slices[:, i].tolist())
    else:
        for token, slot in enumerate(call.metadata[0].tolist()):
            yield slot, token, 1


def new_slots(call: Call) -> np.ndarray:
    """[T, R, C]: every token as the pool holds it, padding zero."""
    case, pool = call.case, call.kv_pages
    heads, head_dim = case.num_kv_heads, case.head_dim
    k, v = (
        _stored(x.reshape(-1, heads, head_dim), scale, pool.dtype)
        for x, scale in ((call.k, call.k_scale), (call.v, call.v_scale))
    )
    slots = np.zeros((case.num_tokens, *pool.shape[2:]), pool.dtype)
    for head in range(heads):
        if head_dim <= 64:
            slots[:, head, :head_dim] = k[:, head]
            slots[:, head, 64 : 64 + head_dim] = v[:, head]
        else:
            slots[:, 2 * head, :head_dim] = k[:, head]
            slots[:, 2 * head + 1, :head_dim] = v[:, head]
    return slots


def _stored(x, scale, dtype):
    """Rounding and saturation as kv_write.oracle.quantize documents them."""
    if x.dtype == dtype:
        return x
    inverse = np.float32(1) / np.float32(1.0 if scale is None else scale)
    with np.errstate(over="ignore"):  # infinities are what is meant
        if dtype.itemsize > 1:
            return x.astype(dtype)
        y = x.astype(np.float32) * np.broadcast_to(inverse, (x.shape[1],))[:, None]
    if dtype == np.int8:
        y = np.rint(np.where(np.isnan(y), np.float32(0), y))
        return np.clip(y, -128, 127).astype(np.int8)
    largest = np.float32(ml_dtypes.finfo(dtype).max)
    return np.clip(y, -largest, largest).astype(dtype)


def difference(actual: Any, wanted: Any) -> str | None:
    """None where two pools have the same bytes; else the first that differs, as a sentence."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    if actual.shape != wanted.shape or actual.dtype != wanted.dtype:
        return f"{actual.dtype}{actual.shape} came, wanted {wanted.dtype}{wanted.shape}"
    bits = np.dtype(f"uint{8 * actual.dtype.itemsize}")
    wrong = np.argwhere(actual.view(bits) != wanted.view(bits))
    if not len(wrong):
        return None
    first = tuple(wrong[0].tolist())
    return (
        f"{len(wrong)} of {actual.size} values differ, in slots (page, row)"
        f" {sorted({tuple(w[:2].tolist()) for w in wrong})[:8]}; first at {first}:"
        f" {actual[first]} (0x{actual.view(bits)[first]:x}) came,"
        f" {wanted[first]} (0x{wanted.view(bits)[first]:x}) wanted"
    )


class RaceFoundError(Exception):
    """The interpreter's race detector saw two unordered accesses."""


_RACES_RAISE = "on_race" in {f.name for f in dataclasses.fields(pltpu.InterpretParams)}


def _was_race_printed() -> bool:
    """Before jax 0.12 a race prints and sets a flag in a private module, and nothing else."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    races = interpret_pallas_call.races
    return races is not None and races.races_found


def _forget_failed_run() -> None:
    """Drops the token of an interpreter's failed callback, which the next run would raise again."""
    from jax._src import dispatch

    dispatch.runtime_tokens.clear()


# For a jit around an interpreted kernel: as the interpreter's program runs once, its compilation is
# what takes time, and with these it takes half as long. For all of the tests' programs they will
# not do: unoptimised bfloat16 flushes subnormals and loses the bits of NaN.
FAST_COMPILE: dict[str, bool | str | int | float] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_parallel_codegen_split_count": 1,
}
if jax.__version_info__ < (0, 11):  # gone since
    FAST_COMPILE["xla_cpu_use_fusion_emitters"] = False
# The same for an interpreted kernel whose result is compared bit for bit: at level 1 bfloat16 that
# is only moved keeps its bits. With jax 0.10 they compile in 0.4 of the time, with 0.12 in 0.94.
EXACT_COMPILE = FAST_COMPILE | {"xla_backend_optimization_level": 1}


@functools.cache
def _quickly_compiled(op):
    """A public op in a jit with EXACT_COMPILE; it does not donate the pool."""
    static = {"num_kv_heads", "config", "backend"} & set(inspect.signature(op).parameters)
    return jax.jit(op, static_argnames=tuple(static), compiler_options=EXACT_COMPILE)


def _on_a_cpu(*args, default, **_):
    return default(*args)


def is_ordered(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether one of two vector clocks is before the other, as jax's own `ordered` says.

    The race detector asks for all pairs of accesses, and jax's takes ten calls of numpy for each.
    """
    return (np.count_nonzero(a > b) == 0) != (np.count_nonzero(b > a) == 0)


def _faster_race_detector():
    from jax._src.pallas.mosaic.interpret import vector_clock

    if hasattr(vector_clock, "ordered"):  # jax 0.10
        return mock.patch.object(vector_clock, "ordered", is_ordered)
    return mock.patch.object(
        vector_clock.NpVectorClock, "ordered", lambda a, b: is_ordered(a.clock, b.clock)
    )


def _faster_callbacks():
    """The TPU interpreter's callbacks get numpy's arrays: making jax's takes half of a run."""
    from jax._src import callback

    in_numpy = types.SimpleNamespace(device_put=lambda args, _: jax.tree.map(np.array, args))
    return mock.patch.object(callback, "api", in_numpy)


@contextlib.contextmanager
def _races_raise(was_found: Callable[[], bool]) -> Iterator[None]:
    """Makes a RaceFoundError of what an interpreter says of a race in whatever way it does."""
    try:
        yield
        if not _RACES_RAISE and was_found():
            raise RaceFoundError("see the interpreter's output")
    except jax.errors.JaxRuntimeError as e:
        _forget_failed_run()
        if "RACE DETECTED" in str(e):
            raise RaceFoundError(str(e)) from e
        raise


_ON_RACE: dict[str, Any] = {"on_race": "raise"} if _RACES_RAISE else {}


def interpret(call: Any, mode: str, *, detect_races: bool = True) -> np.ndarray:
    """The result of `call()` in TPU interpret mode, with everything on that can find a bug.

    Raises:
      RaceFoundError: the race detector found a race.
      Exception: whatever else the interpreter refuses, e.g. a read out of bounds.
    """
    params = pltpu.InterpretParams(
        dma_execution_mode=mode,
        detect_races=detect_races,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        **_ON_RACE,
    )
    pltpu.reset_tpu_interpret_mode_state()
    try:
        with (
            _races_raise(_was_race_printed),
            pltpu.force_tpu_interpret_mode(params),
            _faster_race_detector(),
            _faster_callbacks(),
            # What is for a TPU alone is traced by the tests that compile for one.
            mock.patch.object(jax.lax, "platform_dependent", _on_a_cpu),
        ):
            return np.asarray(call())
    finally:
        pltpu.reset_tpu_interpret_mode_state()


@contextlib.contextmanager
def _faster_gpu_threads(options: dict[str, bool | str | int | float]) -> Iterator[None]:
    """The GPU interpreter compiles a kernel once for each of its threads; once for all will do.

    Its callbacks take numpy's numbers, too, if it is told how to read them.
    """
    from jax._src.pallas.mosaic.interpret import thread_map
    from jax._src.pallas.mosaic_gpu.interpret import shared_memory

    lock, compiled, to_int = threading.Lock(), {}, shared_memory._to_int

    def numpy_to_int(x):
        return int(x) if isinstance(x, np.ndarray) else to_int(x)

    def run(jaxpr, consts, *args):
        with lock:
            if id(jaxpr) not in compiled:
                traced = jax.jit(thread_map._run, static_argnums=0).trace(jaxpr, consts, *args)
                compiled[id(jaxpr)] = jaxpr, traced.lower().compile(compiler_options=options)
        compiled[id(jaxpr)][1](consts, *args)

    with (
        mock.patch.object(thread_map, "_run_jaxpr", run),
        mock.patch.object(shared_memory, "_to_int", numpy_to_int),
        _faster_callbacks(),
    ):
        yield


def run_on_gpu(call: Any, *, detect_races: bool = True) -> np.ndarray:
    """As `run_all_on_gpu`, where `call()` returns one array."""
    return run_all_on_gpu(lambda: (call(),), detect_races=detect_races, is_exact=True)[0]


def run_all_on_gpu(
    call: Any, *, detect_races: bool = True, is_exact: bool = False
) -> list[np.ndarray]:
    """The results of `call()` on the GPU that jax runs on, or in GPU interpret mode on a CPU.

    Args:
      call: makes the arrays.
      detect_races: whether the interpreter looks for races.
      is_exact: whether results are compared bit for bit; see FAST_COMPILE.

    Raises:
      RaceFoundError: the interpreter's race detector found a race.
      Exception: whatever else the interpreter refuses, e.g. a read out of bounds.
    """
    if jax.default_backend() == "gpu":
        return [np.asarray(x) for x in call()]
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def was_found() -> bool:
        races = gpu_callbacks._races  # None where the call ran no kernel
        return detect_races and races is not None and races.races_found

    params = plgpu.InterpretGPUParams(detect_races=detect_races, **_ON_RACE)
    gpu_callbacks.reset_gpu_interpret_mode_state()
    try:
        with (
            _races_raise(was_found),
            plgpu.force_gpu_interpret_mode(params),
            _faster_gpu_threads({} if is_exact else FAST_COMPILE),
            _faster_race_detector(),
        ):
            return [np.asarray(x) for x in call()]
    finally:
        gpu_callbacks.reset_gpu_interpret_mode_state()
