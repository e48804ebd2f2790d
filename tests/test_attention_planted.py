# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Bugs planted in the attention kernel: the checks of test_attention_tpu.py must catch each.

A bug is one snippet of a module's source, replaced. Each runs in one DMA mode in which it must
show, and the test says how it shows.
"""

import dataclasses
import functools
import importlib

import jax
import pytest

from tests.attention_cases import Setup, interpret_all, make_case, mismatch, run_oracle
from tests.cases import FAST_COMPILE, RaceFoundError
from tests.planted import plant

# The package; as an attribute of pallas_paged its name is the op's.
package = importlib.import_module("pallas_paged.ragged_paged_attention")
# In the order in which they import each other.
_MODULES = (
    "mosaic_tpu_operands", "mosaic_tpu_attend", "mosaic_tpu_refs", "mosaic_tpu_units",
    "mosaic_tpu_table", "mosaic_tpu_new", "mosaic_tpu_blocks", "mosaic_tpu_windows",
    "mosaic_tpu_walk", "mosaic_tpu",
)  # fmt: skip

_LENS = {
    # A decode of three blocks and prefills of two and three, so that the ring goes round.
    "long": [(1, 300), (5, 150), (3, 290), (1, 40)],
    "decodes": [(1, 150), (1, 9), (1, 33), (1, 280)],
    "one decode": [(1, 150)],
    "one prefill": [(5, 150)],
    # Windows that begin in the row tile where the one before ends.
    "shared": [(3, 9), (1, 20), (4, 4), (1, 7)],
    # Two windows of output, and rows that nobody has before, between and behind them.
    "holes": [(20, 20), (40, 0), (1, 9), (5, 5), (40, 0)],
    "short": [(3, 3), (1, 9)],
}


@dataclasses.dataclass(frozen=True)
class Call:
    """What a bug is shown on: a setup, lengths of `_LENS`, and a window."""

    setup: Setup
    lens: str
    window: int | None = None
    sm_scale: float = 0.1

    def case(self):
        """The call's arrays; the first row has no sequence."""
        setup = self.setup
        return make_case(
            _LENS[self.lens], num_heads=setup.num_heads, num_kv_heads=setup.num_kv_heads,
            head_dim=setup.head_dim, page_size=setup.page_size, dtype=setup.dtype,
            pool_dtype=setup.pool_dtype, first_row=1,
        )

    def options(self):
        """Keyword arguments of the public op."""
        return self.setup.options(self.window) | {"sm_scale": self.sm_scale}


PLAIN = Setup(2, 1, 128, 32, return_lse=True)
SINKS = dataclasses.replace(PLAIN, has_sinks=True)
CAPPED = dataclasses.replace(PLAIN, soft_cap=1.0)
SCALED = Setup(2, 2, 128, 32, "float32", "int8", scale="head")
NARROW = Setup(2, 1, 32, 32)  # K and V in one row
BF16 = Setup(2, 2, 128, 32, "bfloat16", "bfloat16")
PADDED = Setup(2, 1, 96, 32)  # lanes behind K hold NaN
PARTS = Setup(2, 1, 128, 192)  # a page in two pieces: parts of 96
SEVERAL = dataclasses.replace(PLAIN, config=(128, 128, 4, 2))  # blocks to a body

LONG, DECODES, SHARED, HOLES = (
    Call(PLAIN, lens) for lens in ("long", "decodes", "shared", "holes")
)
CONTROLS = (
    LONG, SHARED, HOLES, Call(SINKS, "short"), Call(CAPPED, "short"), Call(SCALED, "short"),
    Call(NARROW, "short"), Call(BF16, "long"), Call(PADDED, "short"), Call(PARTS, "long"),
    Call(SEVERAL, "long"), Call(PLAIN, "long", window=20),
)  # fmt: skip

# name: (module, snippet, what stands there instead, call, DMA mode, how it shows)
BUGS = {
    # --- which pages, which pieces
    "page_table_of_the_first_sequence": (
        "mosaic_tpu_units",
        "table = unit.seq * walk.table_width",
        "table = 0 * walk.table_width",
        DECODES, "eager", "numbers",
    ),
    "page_id_not_clamped": (
        "mosaic_tpu_blocks",
        "jnp.minimum(page_id, jnp.uint32(walk.num_pages - 1))",
        "jnp.minimum(page_id, jnp.uint32(2**31 - 1))",
        Call(PLAIN, "absurd id"), "eager", "error",
    ),
    "part_of_a_page_ignored": (
        "mosaic_tpu_blocks",
        "page_id * walk.page_size + part * walk.piece",
        "page_id * walk.page_size",
        Call(PARTS, "one decode"), "eager", "numbers",
    ),
    # --- what counts
    "causal_edge_one_late": (
        "mosaic_tpu_attend",
        "seen &= key_position <= query_position",
        "seen &= key_position <= query_position + 1",
        SHARED, "eager", "numbers",
    ),
    "causal_edge_one_early": (
        "mosaic_tpu_attend",
        "seen &= key_position <= query_position",
        "seen &= key_position < query_position",
        SHARED, "eager", "numbers",
    ),
    "window_one_too_wide": (
        "mosaic_tpu_attend",
        "seen &= key_position > query_position - window",
        "seen &= key_position >= query_position - window",
        Call(PLAIN, "long", window=20), "eager", "numbers",
    ),
    "window_one_too_narrow": (
        "mosaic_tpu_attend",
        "seen &= key_position > query_position - window",
        "seen &= key_position > query_position - window + 1",
        Call(PLAIN, "long", window=20), "on_wait", "numbers",
    ),
    "window_begins_a_piece_late": (
        "mosaic_tpu_units",
        "jnp.clip(position - window_len(walk, refs) + 1, 0, key_end)",
        "jnp.clip(position - window_len(walk, refs) + walk.piece, 0, key_end)",
        Call(PLAIN, "long", window=20), "on_wait", "numbers",
    ),
    "full_block_not_masked_for_prefills": (
        "mosaic_tpu_walk",
        "is_edge |= end - 1 > unit.position",
        "is_edge |= end - 1 > unit.position + 8",
        Call(PLAIN, "last rows"), "eager", "numbers",
    ),
    # --- DMAs
    "block_not_waited_for": (
        "mosaic_tpu_blocks",
        "pltpu.make_async_copy(view, view, refs.ring_sems.at[buffer]).wait()",
        "pass",
        LONG, "on_wait", "numbers",
    ),
    "block_not_waited_for_seen_as_race": (
        "mosaic_tpu_blocks",
        "pltpu.make_async_copy(view, view, refs.ring_sems.at[buffer]).wait()",
        "pass",
        LONG, "eager", "race",
    ),
    "wait_one_piece_short": (
        "mosaic_tpu_blocks",
        "return ceil_div(end - first, walk.piece) * walk.piece",
        "return jnp.maximum(ceil_div(end - first, walk.piece) - 1, 1) * walk.piece",
        LONG, "on_wait", "numbers",
    ),
    "wait_for_full_blocks_short": (
        "mosaic_tpu_blocks",
        "if is_any else walk.pieces_per_block * walk.piece",
        "if is_any else walk.piece",
        Call(SEVERAL, "long"), "on_wait", "numbers",
    ),
    "one_block_too_many_ahead": (
        "mosaic_tpu_blocks",
        "@pl.loop(0, walk.ring - walk.blocks_per_body)",
        "@pl.loop(0, walk.ring)",
        LONG, "eager", "race",
    ),
    "output_sent_over_the_one_before": (
        "mosaic_tpu_windows",
        "    wait_leaving(walk, refs)\n    for copy in _leaves(",
        "    for copy in _leaves(",
        HOLES, "on_wait", "numbers",
    ),
    "output_sent_over_the_one_before_seen_as_race": (
        "mosaic_tpu_windows",
        "    wait_leaving(walk, refs)\n    for copy in _leaves(",
        "    for copy in _leaves(",
        HOLES, "eager", "race",
    ),
    "last_output_not_waited_for": (
        "mosaic_tpu_walk",
        "    windows.wait_leaving(walk, refs)\n",
        "",
        LONG, "on_wait", "numbers",
    ),
    "queries_not_waited_for": (
        "mosaic_tpu_windows",
        "        load.wait()\n",
        "        pass\n",
        SHARED, "on_wait", "numbers",
    ),
    # --- windows
    "shared_tile_not_kept": (
        "mosaic_tpu_windows",
        "is_shared = state[DONE] > first",
        "is_shared = state[DONE] > 2**30",
        SHARED, "eager", "numbers",
    ),
    "rows_of_nobody_not_zeroed": (
        "mosaic_tpu_walk",
        "    windows.zero_until(walk, refs, walk.num_tokens)\n",
        "",
        HOLES, "eager", "numbers",
    ),
    "rows_between_windows_not_zeroed": (
        "mosaic_tpu_windows",
        "    zero_until(walk, refs, first)\n",
        "",
        Call(PLAIN, "far"), "eager", "numbers",
    ),
    "zeros_over_the_next_unit": (
        "mosaic_tpu_walk",
        "is_row = (row >= unit.row) & (row < unit.end)",
        "is_row = row < unit.end",
        SHARED, "eager", "numbers",
    ),
    # --- softmax
    "decode_not_rescaled": (
        "mosaic_tpu_attend",
        "attended = {row: acc[row] * _wide(rescale[row], heads.lane_tiles) for row in rows}",
        "attended = dict(acc)",
        Call(PLAIN, "long", sm_scale=0.4), "eager", "numbers",
    ),
    "decode_sum_not_rescaled": (
        "mosaic_tpu_attend",
        "total[row] = total[row] * rescale[row] + sum(",
        "total[row] = total[row] + sum(",
        Call(PLAIN, "long", sm_scale=0.4), "eager", "numbers",
    ),
    "prefill_not_rescaled": (
        "mosaic_tpu_attend",
        "acc_ref[head, :, at] = acc_ref[head, :, at] * rescale + ",
        "acc_ref[head, :, at] = acc_ref[head, :, at] + ",
        LONG, "eager", "numbers",
    ),
    "prefill_sum_not_rescaled": (
        "mosaic_tpu_attend",
        "l_ref[head, :1, at] = l_ref[head, :1, at] * rescale + ",
        "l_ref[head, :1, at] = l_ref[head, :1, at] + ",
        LONG, "eager", "numbers",
    ),
    "unsound_sums_taken": (
        "mosaic_tpu_walk",
        "lambda: jnp.logical_not(_is_sound(walk, refs, unit)),",
        "lambda: jnp.bool_(False),",
        Call(PLAIN, "one prefill", sm_scale=5.0), "eager", "numbers",
    ),
    "repeat_from_the_wrong_shift": (
        "mosaic_tpu_attend",
        "jnp.maximum(shift_ref[head, :1, at], largest)",
        "largest",
        Call(PLAIN, "one prefill", sm_scale=5.0), "eager", "numbers",
    ),
    "sinks_not_in_the_sum_of_decodes": (
        "mosaic_tpu_attend",
        "total * rescale + jnp.exp2(sink - top), acc * rescale",
        "total * rescale, acc * rescale",
        Call(SINKS, "decodes"), "eager", "numbers",
    ),
    "sinks_not_in_the_sum_of_prefills": (
        "mosaic_tpu_attend",
        "(x * rescale + jnp.exp2(sink - top) for x in (total, weight))",
        "(x * rescale for x in (total, weight))",
        Call(SINKS, "short"), "eager", "numbers",
    ),
    "log_sum_exp_of_decodes_in_the_base_2": (
        "mosaic_tpu_attend",
        "(m + jnp.log2(total)) / _LOG2_E",
        "(m + jnp.log2(total))",
        DECODES, "eager", "numbers",
    ),
    "log_sum_exp_of_prefills_in_the_base_2": (
        "mosaic_tpu_attend",
        "(shift + jnp.log2(weight)) / _LOG2_E",
        "(shift + jnp.log2(weight))",
        LONG, "eager", "numbers",
    ),
    "soft_cap_in_the_wrong_place": (
        "mosaic_tpu_attend",
        "jnp.tanh(product * (scale / score.soft_cap))",
        "jnp.tanh(product / score.soft_cap) * scale",
        Call(CAPPED, "short"), "eager", "numbers",
    ),
    # --- operands
    "values_not_masked": (
        "mosaic_tpu_operands",
        "return lax.bitcast_convert_type(bits if mask is None else bits & mask, jnp.float32)",
        "return lax.bitcast_convert_type(bits, jnp.float32)",
        LONG, "eager", "numbers",
    ),
    "values_not_masked_in_pairs": (
        "mosaic_tpu_operands",
        "pltpu.bitcast(pairs if mask is None else pairs & mask, jnp.bfloat16)",
        "pltpu.bitcast(pairs, jnp.bfloat16)",
        Call(BF16, "short"), "eager", "numbers",
    ),
    "values_masked_one_early": (
        "mosaic_tpu_attend",
        "return first + slot * step + offset < end",
        "return first + slot * step + offset < end - 1",
        LONG, "eager", "numbers",
    ),
    "lanes_behind_a_key_not_masked": (
        "mosaic_tpu_operands",
        "    if used >= layout.LANES:",
        "    if True:",
        Call(PADDED, "short"), "eager", "numbers",
    ),
    "value_taken_for_lanes_of_the_key": (
        "mosaic_tpu_operands",
        "    if used >= layout.LANES:",
        "    if True:",
        Call(NARROW, "short"), "eager", "numbers",
    ),
    "odd_tokens_before_even": (
        "mosaic_tpu_operands",
        "even, odd = load(word, lane_tile, 0), load(word, lane_tile, 1)",
        "odd, even = load(word, lane_tile, 0), load(word, lane_tile, 1)",
        Call(BF16, "short"), "eager", "numbers",
    ),
    "scale_of_another_head": (
        "mosaic_tpu_walk",
        "return refs.factors[1 + which * walk.heads.num_kv_heads + head]",
        "return refs.factors[1 + which * walk.heads.num_kv_heads]",
        Call(SCALED, "short"), "eager", "numbers",
    ),
    "scale_of_keys_for_values": (
        "mosaic_tpu_walk",
        "return refs.factors[1 + which * walk.heads.num_kv_heads + head]",
        "return refs.factors[1 + head]",
        Call(SCALED, "short"), "eager", "numbers",
    ),
    "int8_unsigned": (
        "mosaic_tpu_operands",
        "lax.bitcast_convert_type(byte << 24, jnp.int32) >> 24",
        "lax.bitcast_convert_type(byte, jnp.int32)",
        Call(SCALED, "short"), "eager", "numbers",
    ),
}  # fmt: skip

_LENS["absurd id"] = _LENS["one decode"]
_LENS["last rows"] = [(9, 128)]  # one full block, most rows of the window see not all of it
_LENS["far"] = [(2, 2), (150, 0), (1, 9)]


def _symptom(module, call, mode):
    """How a run differs from the oracle: "numbers", "race", "error" or None."""
    case, options = call.case(), call.options()
    if call.lens == "absurd id":
        case.page_indices[0, 1] = 1_000_000
    static = {k: options[k] for k in ("causal", "soft_cap", "num_kv_heads")}
    arrays = {k: options.get(k) for k in ("sliding_window", "k_scale", "v_scale", "sinks")}

    def run():  # past the public op and what it has compiled
        op = functools.partial(
            module.ragged_paged_attention, return_lse=True,
            config=module.Config(*call.setup.config), **static,
        )
        jitted = jax.jit(
            lambda arrays, options: op(*arrays, **options), compiler_options=FAST_COMPILE
        )
        return jitted(case.arrays, arrays | {"sm_scale": options["sm_scale"]})

    try:
        out, lse = interpret_all(run, mode)
    except RaceFoundError:
        return "race"
    except jax.errors.JaxRuntimeError as e:
        assert "interpret_pallas_call.py" in str(e), e  # it ran, and the interpreter refused
        return "error"
    if call.lens == "absurd id":
        return None
    return "numbers" if mismatch(out, lse, *run_oracle(case, options)) else None


@pytest.mark.parametrize(
    "name", [pytest.param(n, id=f"{n}-{b[4]}-{b[5]}") for n, b in BUGS.items()]
)
def test_bug_is_caught(name, monkeypatch):
    module_name, old, new, call, mode, symptom = BUGS[name]
    plant(monkeypatch, package, _MODULES, module_name, old, new)
    assert _symptom(package.mosaic_tpu, call, mode) == symptom


@pytest.mark.parametrize("call", CONTROLS, ids=lambda call: f"{call.setup.id}-{call.lens}")
def test_without_a_bug_nothing_shows(call, monkeypatch):
    """The same machinery with nothing planted."""
    old = '"""Ragged paged attention on TPU'
    module = plant(monkeypatch, package, _MODULES, "mosaic_tpu", old, '"""Attention on TPU')
    assert _symptom(module, call, "on_wait") is None
