# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The fused TPU kernel, which writes a batch's new tokens and attends: interpreted.

The output is compared with the oracle's by the tolerances, and the whole pool bit for bit. Before
the call there is NaN where new tokens go, as everywhere else where nothing is. test_tpu_planted.py
shows that these checks find bugs.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.attention.api import ragged_paged_attention, write_and_attend
from pallas_paged.attention.options import AttentionOptions
from pallas_paged.attention.tpu import launch as mosaic_tpu
from pallas_paged.attention.tpu.config import TpuAttentionConfig
from tests import jax_lines
from tests.attention.cases import (
    ABSURD,
    Setup,
    Write,
    call_kernel,
    check,
    check_write,
    counted_slots,
    interpret_all,
    make_case,
    make_write,
    new_slots_of,
    run_oracle,
)
from tests.kv_write import cases
from tests.kv_write.cases import INT_MAX, INT_MIN


@dataclasses.dataclass(frozen=True)
class Call:
    """A setup, how k and v come, and the DMA mode."""

    setup: Setup
    is_flat: bool
    mode: str

    @property
    def id(self):
        return f"{self.setup.id}-{'flat' if self.is_flat else 'by_head'}-{self.mode}"

    def write(self, batch, seed=0):
        """One batch, its new tokens not yet in the pool."""
        options = self.setup.options()
        scales = options.get("k_scale"), options.get("v_scale")
        return make_write(self.setup.case(batch, seed), is_flat=self.is_flat, scales=scales)


CALLS = [
    Call(
        Setup(
            4,
            2,
            32,
            16,
            batches=("chunks", "spans", "late", "none"),
            return_lse=True,
            num_tokens=291,
        ),
        True,
        "on_wait",
    ),
    Call(
        Setup(
            5,
            1,
            128,
            24,
            "bfloat16",
            "bfloat16",
            ("chunks", "spans", "crowd"),
            windows=(20,),
            num_tokens=291,
            config=(128, 128, 4, 2),
        ),
        True,
        "eager",
    ),
    Call(
        Setup(
            2,
            1,
            192,
            200,
            "bfloat16",
            "float8_e4m3fn",
            ("spans", "tiny"),
            scale="head",
            has_sinks=True,
            return_lse=True,
            num_tokens=291,
        ),
        False,
        "on_wait",
    ),
    Call(
        Setup(
            3,
            3,
            96,
            5,
            "float32",
            "float8_e5m2",
            ("chunks", "few"),
            causal=False,
            soft_cap=2.5,
            num_tokens=103,
        ),
        False,
        "eager",
    ),
    Call(
        Setup(
            6,
            3,
            64,
            33,
            "bfloat16",
            "int8",
            ("spans", "chunks"),
            scale="head",
            causal=False,
            has_sinks=True,
            num_tokens=291,
        ),
        True,
        "on_wait",
    ),
    Call(
        Setup(
            2,
            2,
            128,
            1,
            "float32",
            "bfloat16",
            ("tiny",),
            windows=(7, INT_MAX),
            is_window_traced=True,
            num_tokens=37,
            return_lse=True,
            config=(256, 128, 2),
        ),
        True,
        "eager",
    ),
    Call(
        Setup(
            2,
            1,
            256,
            64,
            "bfloat16",
            "float32",
            ("spans", "crowd"),
            num_tokens=291,
            soft_cap=3.0,
            return_lse=True,
            config=(128, 128, 4, 2),
        ),
        False,
        "on_wait",
    ),
]


def _features(call):
    setup = call.setup  # what its reads have in common with test_tpu.py is tested there
    return setup.dtype, jnp.dtype(setup.pool_dtype).itemsize, setup.scale, call.is_flat, call.mode


@pytest.mark.parametrize("call", jax_lines.runs(CALLS, _features, lambda call: call.id))
def test_kernel_is_the_oracle(call):
    setup = call.setup
    for batch, window in itertools.product(setup.batches, setup.windows or (None,)):
        write = call.write(batch)
        q, k, _, pool, _, table, *_ = write.arrays
        config = TpuAttentionConfig(*setup.config)
        options = AttentionOptions(setup.num_kv_heads)
        assert mosaic_tpu.plan(q, pool, table, options, config, k).spec.writes
        label = f"{batch}, window {window}: "
        check_write(write, setup.options(window), call.mode, setup.config, label=label)


def test_coverage():
    """What the calls above must cover together, so that a trimmed list does not lose it."""
    setups = [call.setup for call in CALLS]
    for name, wanted in {
        "page_size": {1, 5, 16, 24, 33, 200},
        "head_dim": {32, 64, 96, 128, 192, 256},
        "pool_dtype": {"float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8"},
        "dtype": {"float32", "bfloat16"},
        "causal": {True, False},
        "has_sinks": {True, False},
        "return_lse": {True, False},
    }.items():
        assert wanted <= {getattr(s, name) for s in setups}, name
    for name in ("dtype", "causal", "return_lse"):
        assert len({(getattr(c.setup, name), c.mode) for c in CALLS}) == 4, name
    assert len({(c.is_flat, c.mode) for c in CALLS}) == 4
    assert {(c.is_flat, c.setup.head_dim % 128 == 0) for c in CALLS} >= {
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    }
    assert {s.scale for s in setups if s.pool_dtype == "int8"} == {"head"}
    assert {s.is_window_traced for s in setups if s.windows} == {True, False}
    assert any(s.page_size > s.config[0] for s in setups)  # a page in parts
    assert sum(len(s.config) == 4 for s in setups) >= 2  # multiple blocks per iteration
    modes = {(batch, c.mode) for c in CALLS for batch in c.setup.batches}
    assert set(itertools.product(("chunks", "spans", "crowd"), cases.MODES)) <= modes


# ---- That it is one kernel


def _kernels(jaxpr):
    """The names of the kernels in a jaxpr, those of the jaxprs inside included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield str(eqn.params.get("name") or eqn.params["name_and_src_info"].name)
            continue
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _kernels(inner)


def _traced_kernels(num_tokens, monkeypatch):
    """The kernels of a call with a number of tokens, and whether its plan says that it is fused."""
    ids = jnp.int32
    q = jax.ShapeDtypeStruct((num_tokens, 4, 128), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((num_tokens, 256), jnp.bfloat16)
    pool = jax.ShapeDtypeStruct((64, 16, 4, 128), jnp.bfloat16)
    metadata = [jax.ShapeDtypeStruct(shape, ids) for shape in ((8,), (8, 40), (9,), (1,))]
    # A platform's kernel is traced once for it, and once for the interpreter.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))

    def call(q, k, v, pool, *metadata):
        return write_and_attend(q, k, v, pool, *metadata, num_kv_heads=2, backend="mosaic_tpu")

    jaxpr = jax.make_jaxpr(call)(q, new, new, pool, *metadata).jaxpr
    plan = mosaic_tpu.plan(q, pool, metadata[1], AttentionOptions(2), None, new)
    return list(_kernels(jaxpr)), plan.spec.writes


def test_it_is_one_kernel(monkeypatch):
    kernels, is_fused = _traced_kernels(301, monkeypatch)
    assert is_fused and len(kernels) == 1, kernels
    assert kernels[0].startswith("write_and_attend_block"), kernels


def test_more_tokens_than_vmem_holds_are_written_before(monkeypatch):
    """The composed form: kernels that write, and one that attends."""
    kernels, is_fused = _traced_kernels(20_011, monkeypatch)
    assert not is_fused
    *writes, attends = kernels
    assert attends.startswith("ragged_paged_attention_block"), kernels
    assert len(writes) == 2, kernels
    assert ["page" in writes[0], "slice" in writes[1]] == [True, True], kernels


# ---- How often a slot is read and written


def test_each_new_token_is_sent_once_and_none_is_read_back():
    """Counts the DMAs from and to every slot of the pool, as the interpreter starts them.

    Prefills have multiple q tiles, old tokens before them in the page where they begin, and scores
    so far apart that KV blocks are taken twice. No slot that a prefill writes is read, each is
    written once, and no other slot is written. (A decode is not a prefill: the page of its new
    token is fetched once, with the old tokens in it, and the new token is inserted in VMEM.)
    """
    # Shapes that no other test has, so that the kernel is compiled inside.
    lens, page_size = [(1, 9), (290, 307), (1, 33), (20, 25), (3, 3)], 16
    case = make_case(
        lens, head_dim=128, num_heads=2, num_kv_heads=1, page_size=page_size, num_tokens=317
    )
    write = make_write(case, is_flat=True)
    with counted_slots(write.kv_pages) as (reads, writes):
        check_write(write, {"num_kv_heads": 1, "sm_scale": 5.0}, "eager", slack=20)

    assert np.array_equal(writes, new_slots_of(case))
    for row, (q_len, kv_len) in zip(case.page_indices, lens, strict=False):
        position = np.arange(kv_len)
        slots = row[position // page_size] * page_size + position % page_size
        old, new = np.split(slots, [kv_len - q_len])
        if q_len > 1:
            assert not np.any(reads[new])
        assert np.all(reads[old] >= 1)  # so that the count sees reads


# ---- Edges


@pytest.mark.parametrize("batch", ["spans", "chunks"])
def test_scores_far_apart(batch):
    """A q tile's KV blocks are taken twice, those of new tokens too."""
    call = CALLS[0]
    options = call.setup.options() | {"sm_scale": 5.0}
    write = call.write(batch)
    check_write(write, options, call.mode, call.setup.config, slack=20)
    _, lse = run_oracle(write.case, options)
    assert np.max(np.asarray(lse)[np.isfinite(lse)]) > 30


@pytest.mark.parametrize("return_lse", [True, False])
def test_no_tokens(return_lse):
    write = make_write(make_case([(1, 3)]), is_flat=False)
    q, k, v, pool, *metadata = write.arrays
    out, kv_pages, *lse = write_and_attend(
        q[:0], k[:0], v[:0], pool, *metadata, return_lse=return_lse, backend="mosaic_tpu"
    )
    assert out.shape == (0, 4, 32) and [x.shape for x in lse] == [(0, 4)] * return_lse
    assert cases.difference(kv_pages, write.kv_pages) is None


@pytest.mark.parametrize("dtypes", [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_float16_is_refused(dtypes):
    write = make_write(make_case([(1, 3)]), is_flat=False)
    q, k, v, pool, *metadata = write.arrays
    q, k, v = (x.astype(dtypes[0]) for x in (q, k, v))
    with pytest.raises(NotImplementedError, match="a TPU has no float16; use bfloat16"):
        write_and_attend(q, k, v, pool.astype(dtypes[1]), *metadata, backend="mosaic_tpu")


def test_without_the_log_sum_exp_and_by_default():
    """The default backend of a CPU; then the read-only op finds what was written."""
    write = make_write(make_case([(3, 7), (1, 9)], head_dim=128), is_flat=False)
    q, k, v, pool, *metadata = write.arrays
    out, kv_pages = write_and_attend(q, k, v, pool, *metadata)
    assert out.shape == q.shape
    assert jnp.array_equal(out, ragged_paged_attention(q, kv_pages, *metadata, num_kv_heads=2))


# With what is to be written to: a sequence that is longer by one token, and no id inside the pool.
ABSURD_WRITES = ABSURD | {
    "longer than the table": {"kv_lens": [1000, 31, 2**30, 31, 7, 8]},
    "ids": {"page_indices": [[INT_MIN, -1, 2**30, INT_MAX, 12, 13]] * 6},
}
# Those in which it is written down what is written: nothing.
WRITES_NOTHING = {
    "longer than the table",
    "a negative number of sequences",
    "ids",
    "everything",
}


def _absurd(change, page_size=5):
    """A batch of prefills and decodes with absurd metadata; its k and v are numbers everywhere."""
    case = make_case(
        [(6, 6), (1, 11), (9, 20), (1, 3)],
        num_tokens=23,
        max_seqs=6,
        table_width=6,
        num_pages=12,
        page_size=page_size,
    )
    k, v = np.random.default_rng(1).standard_normal((2, 23, case.num_kv_heads * 32))
    case = dataclasses.replace(case, **{k: np.array(v, np.int32) for k, v in change.items()})
    k, v = (jnp.asarray(x, jnp.float32) for x in (k, v))
    return Write(case, k, v, np.asarray(case.kv_pages))


def _run_absurd(write):
    """(out, pool, log-sum-exp); one program for all."""
    options = {"num_kv_heads": 2, "return_lse": True, "sliding_window": 14}
    return interpret_all(
        lambda: call_kernel(write_and_attend, write.arrays, options, (128, 128, 2)), "on_wait"
    )


@pytest.mark.parametrize("name", ABSURD_WRITES)
def test_absurd_metadata_ends_and_stays_in_bounds(name):
    """The interpreter raises where the kernel leaves an array. Pages that are not in the table are
    left alone, all of them where the tokens have no place or no page."""
    write = _absurd(ABSURD_WRITES[name])
    _, kv_pages, _ = _run_absurd(write)
    num_pages = len(write.kv_pages)
    ids = np.asarray(write.case.page_indices)
    others = np.setdiff1d(np.arange(num_pages), ids)
    assert len(others)
    if name in WRITES_NOTHING:
        others = np.arange(num_pages)
    assert cases.difference(kv_pages[others], write.kv_pages[others]) is None
    if name in ("lengths", "fewer tokens than new ones"):  # each sequence's own are clear enough
        want = write_and_attend(*write.arrays, num_kv_heads=2, backend="oracle")[1]
        assert cases.difference(kv_pages, want) is None


@pytest.mark.parametrize("page_size", [4, 5])
def test_an_id_outside_the_pool_is_skipped(page_size):
    """Of a prefill's pages the second, and a decode's: all other tokens are written.

    Such ids are marked before the kernel, which is free where pages are even, or checked inside.
    """
    write = _absurd({}, page_size)
    table = write.case.page_indices
    for page in (-1, INT_MIN, 12, INT_MAX):
        table[2, 3], table[1, 2] = page, page  # of the 9 new of 20 and of the new one of 11
        _, kv_pages, _ = _run_absurd(write)
        want = write_and_attend(*write.arrays, num_kv_heads=2, backend="oracle")[1]
        assert cases.difference(kv_pages, want) is None
        assert cases.difference(kv_pages, write.kv_pages) is not None


# ---- A page table in parts

STREAMED = [
    # 4 or 7 entries a row and parts of 8: rows begin and end anywhere in a part.
    (Setup(4, 2, 32, 16, batches=("chunks",), num_tokens=107, return_lse=True), "on_wait"),
    (
        Setup(
            2,
            1,
            128,
            56,
            "bfloat16",
            "bfloat16",
            ("crowd", "spans"),
            num_tokens=293,
            config=(128, 128, 4, 2),
        ),
        "eager",
    ),
]


@pytest.mark.parametrize("writes", [False, True], ids=["read_only", "write"])
@pytest.mark.parametrize(("setup", "mode"), STREAMED, ids=["chunks", "multiple_blocks"])
def test_a_table_in_parts(monkeypatch, setup, mode, writes):
    """Numbers of tokens that no other test has: what is static is read when a call is traced."""
    monkeypatch.setattr(mosaic_tpu, "MAX_TABLE", 1)
    monkeypatch.setattr(mosaic_tpu, "_TABLE_PART", 8)
    for batch in setup.batches:
        case = setup.case(batch)
        assert case.page_indices.shape[1] % 8 and case.page_indices.size > 5 * 8
        if writes:
            write = make_write(case, is_flat=True)
            check_write(write, setup.options(), mode, setup.config, label=f"{batch}: ")
        else:
            check(case, setup.options(), mode, setup.config, label=f"{batch}: ")


# ---- k and v that are quantised already

STORED = Setup(
    4,
    2,
    64,
    16,
    "bfloat16",
    "float8_e5m2",
    ("few",),
    scale="head",
    num_tokens=37,
    config=(128, 128, 2),
)


def _stored_and_unstored():
    """A batch whose k and v are the pool's values, and the one that quantises to the same."""
    case, options = STORED.case("few"), STORED.options() | {"return_lse": True}
    stored = make_write(case, is_flat=True, new_dtype="float8_e5m2")
    scales = options["k_scale"], options["v_scale"]
    return stored, make_write(case, is_flat=True, scales=scales, new_dtype="float32"), options


def test_stored_k_and_v_are_stored_as_they_are():
    """The scales then only serve the read."""
    stored, unstored, options = _stored_and_unstored()
    found, wanted = (
        write_and_attend(*write.arrays, **options, backend="oracle") for write in (stored, unstored)
    )
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def test_stored_k_and_v_in_the_tpu_kernels():
    """Composed: the fused kernel attends to what it quantised itself."""
    stored, _, options = _stored_and_unstored()
    check_write(stored, options, "eager", STORED.config, detect_races=False)
