# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The attention of XLA's own operations against the oracle, on the cases of the TPU kernel."""

import dataclasses
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged import make_kv_pages
from pallas_paged.attention import api
from pallas_paged.attention.api import ragged_paged_attention, write_and_attend
from pallas_paged.attention.xla import launch as xla
from tests import jax_lines
from tests.attention import test_tpu
from tests.attention.cases import ABSURD, make_case, make_write, mismatch, run_oracle
from tests.kv_write.cases import FAST_COMPILE
from tests.planted import plant

ON_CPU = jax.default_backend() == "cpu"


def run(case, options):
    """[out, log-sum-exp], compiled apart from what else runs."""

    def call(*arrays):
        return ragged_paged_attention(*arrays, **options, return_lse=True, backend="xla")

    jitted = jax.jit(call, compiler_options=FAST_COMPILE if ON_CPU else None)
    return jitted(*case.arrays)


def take_small_blocks(launch, monkeypatch):
    """Several groups of several blocks, in a case of the tests' size."""
    for platform in ("cpu", "gpu"):
        monkeypatch.setitem(launch._BLOCK_Q, platform, 16)
        monkeypatch.setitem(launch._BLOCK_KV, platform, 48)
        monkeypatch.setitem(launch._MAX_TILES, platform, 3)
        monkeypatch.setitem(launch._GROUP_BYTES, platform, 2**19)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    take_small_blocks(xla, monkeypatch)


@pytest.mark.parametrize(
    "setup",
    jax_lines.runs(test_tpu.SETUPS, lambda setup: setup.features(), lambda setup: setup.id),
)
def test_it_is_the_oracle(setup):
    for batch, window in itertools.product(setup.batches, setup.windows or (None,)):
        case, options = setup.case(batch), setup.options(window)
        options.pop("return_lse", None)
        results, wanted = run(case, options), run_oracle(case, options)
        if not ON_CPU and setup.scale != "none":
            # There k_scale is multiplied into q, which is rounded.
            error = np.linalg.norm(results[0] - wanted[0]) / np.linalg.norm(wanted[0])
            assert error < 5e-3, f"{batch}, window {window}: {error}"
            continue
        found = mismatch(*results, *wanted)
        assert found is None, f"{batch}, window {window}: {found}"


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_metadata_ends(name):
    """XLA's gathers and scatters stay in bounds; that the loops end is what must be shown."""
    case = make_case(
        [(6, 6), (1, 11), (9, 20), (1, 3)], num_tokens=23, max_seqs=6, table_width=6, num_pages=12
    )
    case = dataclasses.replace(case, **{k: np.array(v, np.int32) for k, v in ABSURD[name].items()})
    out, lse = run(case, {"num_kv_heads": 2, "sliding_window": 14})
    if name.startswith("a negative"):
        assert not np.any(out) and np.all(np.isneginf(lse))


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"sliding_window": 2}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_tokens_before_position_0_see_their_sinks_alone(dtype, options):
    """A case for cuDNN too, where a GPU has it; the rows that no sequence has stay without work."""
    lens = [(40, 3), (1, 9), (6, 0), (5, 5), (20, 1), (2, 1)]
    case = make_case([(q_len, max(q_len, kv_len)) for q_len, kv_len in lens], head_dim=64)
    case.q, case.kv_pages = (jnp.asarray(x, dtype) for x in (case.q, case.kv_pages))
    case.kv_lens[: len(lens)] = [kv_len for _, kv_len in lens]
    sinks = jnp.array([0.5, -jnp.inf, 2.0, 1.0])
    options = options | {"num_kv_heads": 2, "sinks": sinks}
    (out, lse), wanted = run(case, options), run_oracle(case, options)
    assert mismatch(out, lse, *wanted) is None
    if options.get("causal", True):
        np.testing.assert_array_equal(lse[:37], np.broadcast_to(sinks, (37, 4)))


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens):
    case = make_case([(num_tokens, 9)], num_tokens=num_tokens)
    options = {"num_kv_heads": case.num_kv_heads}
    assert mismatch(*run(case, options), *run_oracle(case, options)) is None


def test_a_write_and_an_attention():
    case = make_case([(3, 30), (1, 17)], num_kv_heads=2)
    write = make_write(case, is_flat=True, scales=(None, None))

    def call(backend):
        return write_and_attend(
            *map(jnp.array, write.arrays), num_kv_heads=2, return_lse=True, backend=backend
        )

    found, wanted = call("xla"), call("oracle")
    assert mismatch(found[0], found[2], wanted[0], wanted[2]) is None
    np.testing.assert_array_equal(found[1], wanted[1])


def test_a_gradual_mask_is_refused():
    case = make_case([(1, 3)])
    with pytest.raises(NotImplementedError, match="would let hidden keys count"):
        run(case, {"num_kv_heads": case.num_kv_heads, "mask_value": -5.0})


_ROOM = "pallas_paged.attention.xla"
BUGS = {
    "last_key_lost": ("kv_blocks", "(key < end[:, None])", "(key < end[:, None] - 1)"),
    "own_key_hidden": (
        "launch",
        "jnp.minimum(end, tiles.position + 1)",
        "jnp.minimum(end, tiles.position)",
    ),
    "window_too_wide": ("launch", "tiles.position - window + 1", "tiles.position - window"),
    "tile_of_another_sequence": (
        "launch",
        "first_tile = ends[seq] - -(-q_lens[seq] // block_q)",
        "first_tile = ends[seq]",
    ),
    "block_sum_not_shifted": ("online_softmax", "b.total * of_b", "b.total"),
    "block_not_shifted": ("online_softmax", "b.out * of_b[..., None]", "b.out"),
    "rows_without_work_have_sinks": ("launch", "(row >= starts - num_blind)", "(row >= 0)"),
    "sink_of_a_blind_row_lost": ("launch", "of_sinks[0], lse)", "lse, lse)"),
    "sink_counted_twice": (
        "online_softmax",
        "jnp.isneginf(largest), 0.0, 1.0)",
        "jnp.isneginf(largest), 0.0, 2.0)",
    ),
}
PLANTED = [(f"{_ROOM}.{module}", old, new) for module, old, new in BUGS.values()]


@pytest.mark.parametrize("name", BUGS)
def test_bugs_are_caught(name, monkeypatch):
    module, old, new = BUGS[name]
    planted = plant(monkeypatch, _ROOM, f"{_ROOM}.{module}", old, new)
    launch = planted if module == "launch" else importlib.import_module(f"{_ROOM}.launch")
    take_small_blocks(launch, monkeypatch)
    monkeypatch.setattr(api, "xla", launch)
    monkeypatch.setattr(api, "_attention", api._attention.__wrapped__)  # past what is compiled
    lens = [(40, 70), (1, 17), (1, 100), (9, 9)]
    case = make_case(lens, num_kv_heads=2, num_heads=4, first_row=2)
    case.kv_lens[3] = 4
    sinks = jnp.array([0.5, -jnp.inf, 2.0, 1.0])
    options = {"num_kv_heads": 2, "sliding_window": 33, "sinks": sinks}
    assert mismatch(*run(case, options), *run_oracle(case, options)) is not None


def test_it_holds_wherever_a_call_can_stand():
    """In loops, a branch, a shard_map over heads, and under jax's strictest settings."""
    case = make_case([(11, 30), (1, 9)], num_heads=8, num_kv_heads=4, head_dim=128, page_size=8)
    q, pool, *batch = map(jnp.array, case.arrays)

    def attend(q, pool=pool, num_kv_heads=4):
        return ragged_paged_attention(q, pool, *batch, num_kv_heads=num_kv_heads, backend="xla")

    wanted = attend(q)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    heads, rows = jax.P(None, "x"), jax.P(None, None, "x")
    by_head = jax.shard_map(
        lambda q, pool: attend(q, pool, 2), mesh=mesh, in_specs=(heads, rows), out_specs=heads
    )
    found = {
        "scan": jax.lax.scan(lambda carry, x: (carry, attend(x)), 0, q[None])[1][0],
        "map": jax.lax.map(attend, q[None])[0],
        "cond": jax.jit(lambda p: jax.lax.cond(p, lambda: attend(q), lambda: q))(True),
    }
    if len(jax.devices()) > 1:
        found["shard_map"] = jax.jit(by_head)(q, pool)
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        found["strict"] = attend(q)
    for place, out in found.items():
        np.testing.assert_allclose(out, wanted, atol=1e-6, err_msg=place)


@pytest.mark.skipif(not ON_CPU, reason="of a CPU alone")
@pytest.mark.parametrize("backend", ["oracle", "xla"])
@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2"]
)
def test_a_cpu_copies_no_pool(dtype, backend):
    """XLA would gather narrow floats from a wider copy of the whole pool."""
    pool = make_kv_pages(2048, 8, 2, 128, dtype)
    q = jax.ShapeDtypeStruct((2, 4, 128), jnp.bfloat16)
    ids, starts = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 4), (3,)))

    def attend(q, pool, kv_lens, page_indices, cu_q_lens):
        return ragged_paged_attention(
            q, pool, kv_lens, page_indices, cu_q_lens, 2, num_kv_heads=2, backend=backend
        )

    lowered = jax.jit(attend).lower(q, pool, jax.ShapeDtypeStruct((2,), jnp.int32), ids, starts)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < pool.nbytes / 4
