# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Bugs planted in the attention kernel: the checks of test_tpu.py must catch each.

A bug is one snippet of a module's source, replaced. Each runs in one DMA mode in which it must
show, and the test says how it shows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_paged.attention import tpu
from pallas_paged.attention.api import write_and_attend
from pallas_paged.attention.options import AttentionOptions, Batch, Factors
from tests.attention.cases import (
    Setup,
    counted_slots,
    interpret_all,
    make_case,
    make_write,
    mismatch,
    new_slots_of,
    run_oracle,
    write_mismatch,
)
from tests.kv_write.cases import FAST_COMPILE, RaceFoundError, difference
from tests.planted import plant

_ROOM = tpu.__name__

_LENS = {
    # A decode of three KV blocks and prefills of two and three, so that each stage is used again.
    "long": [(1, 300), (5, 150), (3, 290), (1, 40)],
    "decodes": [(1, 150), (1, 9), (1, 33), (1, 280)],
    # Full blocks that follow each other: of one decode, of the next, and then of a prefill.
    "runs": [(1, 512), (1, 256), (5, 290)],
    "prefills": [(5, 150), (3, 290)],
    "one decode": [(1, 150)],
    "one prefill": [(5, 150)],
    # Q tiles that begin in the row tile where the one before ends.
    "shared": [(3, 9), (5, 20), (4, 4), (2, 7)],
    # Two q tiles of output, and rows without work before, between and after them.
    "holes": [(20, 20), (40, 0), (3, 9), (5, 5), (40, 0)],
    # The first new token of a prefill is in a page that has old ones, and the second q tile begins
    # in a page that the first one fills in part; a decode's token follows old ones in a page.
    "new": [(1, 40), (150, 205), (1, 1), (9, 30)],
    "new short": [(1, 40), (9, 45), (1, 3)],
    "new decodes": [(1, 40), (1, 3)],
    "new prefill": [(9, 45)],
    "new windows": [(150, 205), (9, 30)],
}


@dataclasses.dataclass(frozen=True)
class Call:
    """What a bug is shown on: a setup, lengths of `_LENS`, and a sliding window."""

    setup: Setup
    lens: str
    window: int | None = None
    sm_scale: float = 0.1
    writes: bool = False  # whether the call writes its new tokens, too
    table_part: int | None = None  # of a streamed page table
    has_lse: bool = True  # whether the log-sum-exp is asked for

    @property
    def id(self):
        """A readable name."""
        parts = [self.setup.id, self.lens]
        parts += ["write"] if self.writes else []
        parts += ["streamed"] if self.table_part else []
        return "-".join(parts + ([] if self.has_lse else ["no_lse"]))

    def case(self):
        """The call's arrays; the first row has no sequence."""
        setup = self.setup
        return make_case(
            _LENS[self.lens],
            num_heads=setup.num_heads,
            num_kv_heads=setup.num_kv_heads,
            head_dim=setup.head_dim,
            page_size=setup.page_size,
            dtype=setup.dtype,
            pool_dtype=setup.pool_dtype,
            first_row=1,
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
CHUNKS = dataclasses.replace(BF16, config=(384, 128, 2))  # a block is two products of a prefill
PADDED = Setup(2, 1, 96, 32)  # lanes after K hold NaN
PARTS = Setup(2, 1, 128, 192)  # a page in two chunks of 96
MULTIPLE = dataclasses.replace(PLAIN, config=(128, 128, 4, 2))  # blocks per iteration
WIDE = Setup(2, 1, 256, 32)  # two lane tiles

LONG, DECODES, PREFILLS, PREFILL, SHARED, HOLES = (
    Call(PLAIN, lens) for lens in ("long", "decodes", "prefills", "one prefill", "shared", "holes")
)
NEW, NEW_SHORT, NEW_DECODES, NEW_PREFILL, NEW_WINDOWS = (
    Call(PLAIN, lens, writes=True)
    for lens in ("new", "new short", "new decodes", "new prefill", "new windows")
)
STREAMED = Call(PLAIN, "decodes", table_part=8)
PAIRS = Call(BF16, "one prefill", has_lse=False)  # masks weights in pairs
CONTROLS = (
    PAIRS,
    LONG, DECODES, PREFILLS, SHARED, HOLES, STREAMED, NEW, NEW_SHORT,
    Call(WIDE, "new decodes", writes=True), Call(SCALED, "new decodes", writes=True),
    Call(SINKS, "one prefill"), Call(SINKS, "decodes"), Call(CAPPED, "one decode"),
    Call(SCALED, "one decode"), Call(NARROW, "one decode"), Call(BF16, "decodes"),
    Call(PADDED, "one decode"), Call(PARTS, "one decode"), Call(MULTIPLE, "decodes"),
    Call(PLAIN, "decodes", window=20), Call(PLAIN, "absurd new id", writes=True),
    Call(MULTIPLE, "runs"), Call(MULTIPLE, "runs", writes=True),
)  # fmt: skip

# name: (module, snippet, what stands there instead, call, DMA mode, how it shows)
BUGS = {
    # --- which pages, which chunks
    "page_table_of_the_first_sequence": (
        "work_items",
        "jnp.where(is_found, first_chunk_of(spec, item.seq), 0)",
        "jnp.zeros_like(item.seq)",
        DECODES, "eager", "numbers",
    ),
    "page_id_not_clamped": (
        "page_table",
        "jnp.minimum(unsigned, jnp.uint32(num_pages - 1))",
        "jnp.minimum(unsigned, jnp.uint32(2**31 - 1))",
        Call(PLAIN, "absurd id"), "eager", "error",
    ),
    "part_of_a_page_ignored": (
        "kv_fetch",
        "page_table.page_row(spec, refs, at) + part * spec.chunk",
        "page_table.page_row(spec, refs, at)",
        Call(PARTS, "one decode"), "eager", "numbers",
    ),
    # --- what counts
    "causal_edge_one_late": (
        "scores",
        "jnp.minimum(stop, query_position + 1)",
        "jnp.minimum(stop, query_position + 2)",
        PREFILL, "eager", "numbers",
    ),
    "causal_edge_one_early": (
        "scores",
        "jnp.minimum(stop, query_position + 1)",
        "jnp.minimum(stop, query_position)",
        PREFILL, "eager", "numbers",
    ),
    "window_one_too_wide": (
        "scores",
        "seen &= key > query_position - sliding_window - first",
        "seen &= key >= query_position - sliding_window - first",
        Call(PLAIN, "decodes", window=20), "eager", "numbers",
    ),
    "window_one_too_narrow": (
        "scores",
        "seen &= key > query_position - sliding_window - first",
        "seen &= key > query_position - sliding_window - first + 1",
        Call(PLAIN, "decodes", window=20), "on_wait", "numbers",
    ),
    "window_begins_a_chunk_late": (
        "work_items",
        "jnp.clip(position - sliding_window(spec, refs) + 1, 0, key_end)",
        "jnp.clip(position - sliding_window(spec, refs) + spec.chunk, 0, key_end)",
        Call(PLAIN, "decodes", window=20), "on_wait", "numbers",
    ),
    "full_block_not_masked_for_prefills": (
        "prefill_iteration",
        "is_edge |= end - 1 > item.position",
        "is_edge |= end - 1 > item.position + 8",
        Call(PLAIN, "last rows"), "eager", "numbers",
    ),
    "full_blocks_of_a_prefill_taken_as_a_decode": (
        "decode_iteration",
        "(at.index < refs.state.num_found) & (at.item.is_decode == 1)",
        "at.index < refs.state.num_found",
        Call(MULTIPLE, "runs"), "eager", "numbers",
    ),
    # --- DMAs
    "block_not_waited_for": (
        "kv_blocks",
        "pltpu.make_async_copy(view, view, refs.stage_sems.at[stage]).wait()",
        "pass",
        DECODES, "on_wait", "numbers",
    ),
    "block_not_waited_for_seen_as_race": (
        "kv_blocks",
        "pltpu.make_async_copy(view, view, refs.stage_sems.at[stage]).wait()",
        "pass",
        DECODES, "eager", "race",
    ),
    "wait_one_chunk_short": (
        "kv_blocks",
        "return ceil_div(end - first, spec.chunk) * spec.chunk",
        "return jnp.maximum(ceil_div(end - first, spec.chunk) - 1, 1) * spec.chunk",
        DECODES, "on_wait", "numbers",
    ),
    "wait_for_full_blocks_short": (
        "kv_blocks",
        "spec.block_kv if is_full else num_tokens",
        "spec.chunk if is_full else num_tokens",
        Call(MULTIPLE, "decodes"), "on_wait", "numbers",
    ),
    "one_block_too_many_ahead": (
        "kv_fetch",
        "@pl.loop(0, spec.num_stages - spec.kv_blocks_per_iteration)",
        "@pl.loop(0, spec.num_stages)",
        DECODES, "eager", "race",
    ),
    "output_sent_over_the_one_before": (
        "q_tiles",
        "    wait_output(spec, refs)\n    for copy in _output_copies(",
        "    for copy in _output_copies(",
        HOLES, "on_wait", "numbers",
    ),
    "output_sent_over_the_one_before_seen_as_race": (
        "q_tiles",
        "    wait_output(spec, refs)\n    for copy in _output_copies(",
        "    for copy in _output_copies(",
        HOLES, "eager", "race",
    ),
    "last_output_not_waited_for": (
        "kernel",
        "    q_tiles.wait_output(spec, refs)\n",
        "",
        DECODES, "on_wait", "numbers",
    ),
    "queries_not_waited_for": (
        "q_tiles",
        "        load.wait()\n",
        "        pass\n",
        SHARED, "on_wait", "numbers",
    ),
    # --- q tiles
    "shared_tile_not_kept": (
        "q_tiles",
        "is_shared = state.rows_sent > first",
        "is_shared = state.rows_sent > 2**30",
        SHARED, "eager", "numbers",
    ),
    "rows_without_work_not_zeroed": (
        "kernel",
        "    q_tiles.zero_until(spec, refs, spec.num_tokens)\n",
        "",
        HOLES, "eager", "numbers",
    ),
    "rows_between_q_tiles_not_zeroed": (
        "q_tiles",
        "    zero_until(spec, refs, first)\n",
        "",
        Call(PLAIN, "far"), "eager", "numbers",
    ),
    "zeros_over_the_next_work_item": (
        "prefill_iteration",
        "is_row = (row >= item.row) & (row < item.end)",
        "is_row = row < item.end",
        SHARED, "eager", "numbers",
    ),
    # --- softmax
    "decode_not_rescaled": (
        "decode",
        "acc * _wide(rescale, heads.lane_tiles)",
        "acc",
        Call(PLAIN, "decodes", sm_scale=0.4), "eager", "numbers",
    ),
    "decode_sum_not_rescaled": (
        "decode",
        "total = total * rescale",
        "total = total",
        Call(PLAIN, "decodes", sm_scale=0.4), "eager", "numbers",
    ),
    "prefill_not_rescaled": (
        "prefill",
        "acc_ref[head, :, at] = acc_ref[head, :, at] * rescale + ",
        "acc_ref[head, :, at] = acc_ref[head, :, at] + ",
        PREFILLS, "eager", "numbers",
    ),
    "prefill_sum_not_rescaled": (
        "prefill",
        "l_ref[head, :1, at] = l_ref[head, :1, at] * rescale + ",
        "l_ref[head, :1, at] = l_ref[head, :1, at] + ",
        PREFILLS, "eager", "numbers",
    ),
    "unsound_sums_taken": (
        "prefill_iteration",
        "lambda: jnp.logical_not(_is_sound(spec, refs, item)),",
        "lambda: jnp.bool_(False),",
        Call(PLAIN, "one prefill", sm_scale=5.0), "eager", "numbers",
    ),
    "repeat_from_the_wrong_shift": (
        "prefill",
        "jnp.maximum(shift_ref[head, :1, at], largest)",
        "largest",
        Call(PLAIN, "one prefill", sm_scale=5.0), "eager", "numbers",
    ),
    "sinks_not_in_the_sum_of_decodes": (
        "decode",
        "total * rescale + jnp.exp2(sink - top), acc * rescale",
        "total * rescale, acc * rescale",
        Call(SINKS, "decodes"), "eager", "numbers",
    ),
    "sinks_not_in_the_sum_of_prefills": (
        "prefill",
        "(x * rescale + jnp.exp2(sink - top) for x in (total, weight))",
        "(x * rescale for x in (total, weight))",
        Call(SINKS, "one prefill"), "eager", "numbers",
    ),
    "log_sum_exp_of_decodes_in_the_base_2": (
        "decode",
        "(m + jnp.log2(total)) / LOG2_E",
        "(m + jnp.log2(total))",
        DECODES, "eager", "numbers",
    ),
    "log_sum_exp_of_prefills_in_the_base_2": (
        "prefill",
        "(shift + jnp.log2(weight)) / LOG2_E",
        "(shift + jnp.log2(weight))",
        PREFILL, "eager", "numbers",
    ),
    "soft_cap_in_the_wrong_place": (
        "scores",
        "jnp.tanh(product * (scale / options.soft_cap))",
        "jnp.tanh(product / options.soft_cap) * scale",
        Call(CAPPED, "one decode"), "eager", "numbers",
    ),
    # --- operands
    "values_not_masked": (
        "operands",
        "return lax.bitcast_convert_type(bits if mask is None else bits & mask, jnp.float32)",
        "return lax.bitcast_convert_type(bits, jnp.float32)",
        DECODES, "eager", "numbers",
    ),
    "values_not_masked_in_pairs": (
        "operands",
        "pltpu.bitcast(pairs if mask is None else pairs & mask, jnp.bfloat16)",
        "pltpu.bitcast(pairs, jnp.bfloat16)",
        Call(BF16, "one decode"), "eager", "numbers",
    ),
    "values_masked_one_early": (
        "scores",
        "return first + row * step + offset < end",
        "return first + row * step + offset < end - 1",
        DECODES, "eager", "numbers",
    ),
    "lanes_after_a_key_not_masked": (
        "operands",
        "    if used >= layout.LANES:",
        "    if True:",
        Call(PADDED, "one decode"), "eager", "numbers",
    ),
    "value_taken_for_lanes_of_the_key": (
        "operands",
        "    if used >= layout.LANES:",
        "    if True:",
        Call(NARROW, "one decode"), "eager", "numbers",
    ),
    "weight_masked_by_the_other_of_its_pair": (
        "prefill",
        "scoring.options, key + i, position,",
        "scoring.options, key + 1 - i, position,",
        PAIRS, "eager", "numbers",
    ),
    "pairs_of_the_first_keys_masked_alone": (
        "prefill",
        "mask.ref[pl.ds(row + first_key // per_word,",
        "mask.ref[pl.ds(row,",
        dataclasses.replace(PAIRS, setup=CHUNKS, lens="long"), "eager", "numbers",
    ),
    "keys_of_the_first_rows_masked_alone": (
        "prefill",
        "key = per_word * (row + lax",
        "key = per_word * (lax",
        PREFILLS, "eager", "numbers",
    ),
    "token_after_the_last_not_cleared": (
        "kv_blocks",
        "jnp.minimum(num_tokens + i * CLEARED_PER_TRIP + j, end - 1)",
        "jnp.minimum(num_tokens + i * CLEARED_PER_TRIP + j + 1, end - 1)",
        PREFILLS, "eager", "numbers",
    ),
    "last_token_cleared": (
        "kv_blocks",
        "jnp.minimum(num_tokens + i * CLEARED_PER_TRIP + j, end - 1)",
        "jnp.minimum(num_tokens + i * CLEARED_PER_TRIP + j - 1, end - 1)",
        PREFILLS, "eager", "numbers",
    ),
    "strip_without_tokens_read": (
        "kv_blocks",
        "jnp.minimum(token, at.last_strip)",
        "token",
        dataclasses.replace(PAIRS, setup=CHUNKS, lens="prefills"), "eager", "numbers",
    ),
    "rest_of_a_weight_subtracted": (
        "decode",
        "weights - first], axis=0)",
        "first - weights], axis=0)",
        Call(BF16, "one decode"), "eager", "numbers",
    ),
    "odd_tokens_before_even": (
        "operands",
        "even, odd = load(word, lane_tile, 0), load(word, lane_tile, 1)",
        "odd, even = load(word, lane_tile, 0), load(word, lane_tile, 1)",
        Call(BF16, "decodes"), "eager", "numbers",
    ),
    "scale_of_another_head": (
        "scores",
        "return refs.factors[1 + which * spec.heads.num_kv_heads + head]",
        "return refs.factors[1 + which * spec.heads.num_kv_heads]",
        Call(SCALED, "one decode"), "eager", "numbers",
    ),
    "scale_of_keys_for_values": (
        "scores",
        "return refs.factors[1 + which * spec.heads.num_kv_heads + head]",
        "return refs.factors[1 + head]",
        Call(SCALED, "one decode"), "eager", "numbers",
    ),
    "int8_unsigned": (
        "operands",
        "lax.bitcast_convert_type(byte << 24, jnp.int32) >> 24",
        "lax.bitcast_convert_type(byte, jnp.int32)",
        Call(SCALED, "one decode"), "eager", "numbers",
    ),
    # --- new tokens
    "new_tokens_one_row_late": (
        "new_kv",
        "rem(i, per_page) * chunk + row",
        "rem(i, per_page) * chunk + row + 1",
        NEW_PREFILL, "eager", "pool",
    ),
    "last_page_of_a_chunk_not_sent": (
        "new_kv",
        "is_wanted = (end_chunk > first_chunk) & (end_chunk * chunk < end)",
        "is_wanted = end < 0",
        NEW_WINDOWS, "eager", "pool",
    ),
    "first_page_of_a_chunk_not_sent": (
        "new_kv",
        "num_tokens, first < end, state.tokens_in_flight",
        "num_tokens, first > end, state.tokens_in_flight",
        NEW_PREFILL, "eager", "pool",
    ),
    "last_whole_page_of_a_chunk_not_sent": (
        "new_kv",
        "at < end_chunk, num_sent",
        "at + 1 < end_chunk, num_sent",
        NEW_WINDOWS, "eager", "pool",
    ),
    "page_of_two_q_tiles_sent_before_it_is_full": (
        "new_kv",
        "end = jnp.where(item.end == stop, end, div(end, spec.chunk) * spec.chunk)",
        "end = jnp.where(item.end == stop, end, ceil_div(end, spec.chunk) * spec.chunk)",
        NEW_WINDOWS, "eager", "race",
    ),
    "page_of_two_q_tiles_sent_in_part": (
        "new_kv",
        "first = div(jnp.maximum(item.position, 0), spec.chunk) * spec.chunk",
        "first = jnp.maximum(item.position, 0)",
        NEW_WINDOWS, "eager", "pool",
    ),
    "new_token_of_a_decode_not_inserted": (
        "new_kv",
        "rows.copy_token(target, plan.source + c * spec.new_kv_rows, spec.heads.num_words)",
        "pass",
        NEW_DECODES, "eager", "numbers",
    ),
    "new_token_of_a_decode_inserted_one_row_late": (
        "new_kv",
        "block_row + c * lane_tile_rows + plan.row",
        "block_row + c * lane_tile_rows + plan.row + 1",
        NEW_DECODES, "eager", "numbers",
    ),
    "new_token_of_a_decode_from_the_first_lane_tile": (
        "new_kv",
        "copy_token(target, plan.source + c * spec.new_kv_rows,",
        "copy_token(target, plan.source,",
        Call(WIDE, "new decodes", writes=True), "eager", "numbers",
    ),
    "new_token_of_a_decode_not_sent": (
        "new_kv",
        "plan.source, 1, plan.is_wanted)",
        "plan.source, 1, jnp.bool_(False))",
        NEW_DECODES, "eager", "pool",
    ),
    "old_tokens_of_the_first_page_not_brought": (
        "new_kv",
        "num_tokens = jnp.where(item.row == start, _num_old_tokens(spec, refs, item) - first, 0)",
        "num_tokens = jnp.int32(0)",
        NEW_PREFILL, "eager", "numbers",
    ),
    "old_tokens_of_the_first_page_not_waited_for": (
        "prefill_iteration",
        "        new_kv.wait_old_tokens(spec, refs, num_tokens)\n",
        "",
        NEW_PREFILL, "on_wait", "numbers",
    ),
    "old_tokens_overwritten_by_rows_before_the_first": (
        "new_kv",
        "word = jnp.where(token >= first_new, word, rows.load(at, ROW_TILE, w))",
        "pass",
        NEW_WINDOWS, "eager", "numbers",
    ),
    "slots_made_before_those_there_are_sent": (
        "new_kv",
        '''      how many there are: 0 unless the item is the first one of its sequence.
    """
    wait_sent(spec, refs)
''',
        '''      how many there are: 0 unless the item is the first one of its sequence.
    """
''',
        NEW_WINDOWS, "on_wait", "pool",
    ),
    "slots_of_decodes_made_before_those_there_are_sent": (
        "new_kv",
        '''of a q tile of decodes, also of rows that are no decodes."""
    wait_sent(spec, refs)
''',
        '''of a q tile of decodes, also of rows that are no decodes."""
''',
        NEW_SHORT, "on_wait", "pool",
    ),
    "last_slots_not_waited_for": (
        "kernel",
        "        new_kv.wait_sent(spec, refs)\n",
        "        pass\n",
        NEW_DECODES, "on_wait", "pool",
    ),
    "new_token_sent_to_any_id": (
        "new_kv",
        "is_inside = page_id.astype(jnp.uint32) < jnp.uint32(spec.num_pages)",
        "is_inside = page_id == page_id",
        Call(PLAIN, "absurd new id", writes=True), "eager", "pool",
    ),
    "quantising_scale_ignored": (
        "new_kv",
        "scales if refs.inverse_scales is not None else None",
        "None",
        Call(SCALED, "new decodes", writes=True), "eager", "pool",
    ),
    "quantising_scale_of_another_head": (
        "new_kv",
        "return refs.inverse_scales[which * new.num_kv_heads + head]",
        "return refs.inverse_scales[which * new.num_kv_heads]",
        Call(SCALED, "new decodes", writes=True), "eager", "pool",
    ),
    # --- a page table in parts
    "part_of_the_table_in_the_wrong_half": (
        "page_table",
        "refs.table_parts.at[pl.ds(pl.multiple_of(half * size, size), size)]",
        "refs.table_parts.at[pl.ds(pl.multiple_of((1 - half) * size, size), size)]",
        STREAMED, "eager", "race",
    ),
    "part_of_the_table_not_waited_for": (
        "page_table",
        "        _wait_half(spec, refs, part & 1)\n    following",
        "    following",
        STREAMED, "eager", "race",
    ),
    "entry_of_the_other_half": (
        "page_table",
        "refs.table_parts[i & (2 * spec.table_part - 1)]",
        "refs.table_parts[i & (spec.table_part - 1)]",
        STREAMED, "eager", "race",
    ),
    "part_of_the_table_taken_for_the_one_before": (
        "page_table",
        "@pl.when(refs.state.table_part[half] != part)",
        "@pl.when(refs.state.table_part[half] < 0)",
        STREAMED, "eager", "numbers",
    ),
}  # fmt: skip

_LENS["absurd new id"] = [(1, 3), (1, 40)]
_LENS["absurd id"] = _LENS["one decode"]
_LENS["last rows"] = [(9, 128)]  # one full block, of which most rows do not see all
_LENS["far"] = [(2, 2), (150, 0), (3, 9)]


def _symptom(module, call, mode):
    """How a run differs from the oracle: "numbers", "pool", "counts", "race", "error" or None.

    "counts" means that a slot is not written exactly as often as it gets a new token.
    """
    case, options = call.case(), call.options()
    if call.lens.startswith("absurd"):
        case.page_indices[int(call.writes), 1] = 1_000_000
    factors = Factors(*(options.get(name) for name in Factors._fields))
    static = AttentionOptions(
        options["num_kv_heads"],
        causal=options["causal"],
        soft_cap=options["soft_cap"],
        return_lse=call.has_lse,
        has_window=factors.sliding_window is not None,
        has_scales=factors.has_scales,
        has_sinks=factors.sinks is not None,
    )
    operands, write = case.arrays, None
    if call.writes and not call.lens.startswith("absurd"):
        write = make_write(case, is_flat=True, scales=(factors.k_scale, factors.v_scale))
        operands = write.arrays
    elif call.writes:
        new = jnp.zeros((len(case.q), case.q.shape[2] * case.num_kv_heads), case.q.dtype)
        operands = (operands[0], new, new, *operands[1:])
    q, *new, pool, kv_lens, table, cu_q_lens, num_seqs = operands
    batch = Batch(kv_lens, table, cu_q_lens, num_seqs)
    config = module.TpuAttentionConfig(*call.setup.config)
    spec = module.plan(q, pool, table, static, config, new[0] if new else None).spec
    assert spec.writes == call.writes

    def run():  # past the public op and what it has compiled
        jitted = jax.jit(
            lambda *operands: [x for x in module.attend(spec, *operands) if x is not None],
            compiler_options=FAST_COMPILE,
        )
        return jitted(q, tuple(new) or None, pool, batch, factors)

    try:
        with counted_slots(case.kv_pages) as (_, writes):
            out, *more = interpret_all(run, mode)
    except RaceFoundError:
        return "race"
    except jax.errors.JaxRuntimeError as e:
        assert "interpret_pallas_call.py" in str(e), e  # it ran, and the interpreter refused
        return "error"
    lse, *kv_pages = more if call.has_lse else (None, *more)
    if call.lens.startswith("absurd"):
        if not call.writes:
            return None
        want = write_and_attend(*operands, num_kv_heads=case.num_kv_heads, backend="oracle")[1]
        return "pool" if difference(kv_pages[0], want) else None
    if write is None:
        return "numbers" if mismatch(out, lse, *run_oracle(case, options)) else None
    found = write_mismatch(write, options, [out, *kv_pages, lse])
    if found is None:
        return None if np.array_equal(writes, new_slots_of(case)) else "counts"
    return "pool" if found.startswith("the pool") else "numbers"


def _stream(monkeypatch, module, call):
    """Makes the module stream the page table where the call says so."""
    if call.table_part is not None:
        monkeypatch.setattr(module, "MAX_TABLE", 1)
        monkeypatch.setattr(module, "_TABLE_PART", call.table_part)


def _leave_out(monkeypatch, room, call):
    """Leaves out the code that a call does not run, which is half of what there is to compile.

    If a bug makes the call run it after all, it does nothing and ends.
    """
    decodes, prefills = room.decode_iteration, room.prefill_iteration

    def skip(static, refs, *at):
        refs.state.num_taken = refs.state.num_taken + 1

    q_lens = {q_len for q_len, kv_len in _LENS[call.lens] if kv_len}
    if q_lens == {1}:
        monkeypatch.setattr(prefills, "run", lambda *args: skip(*args) or jnp.bool_(False))
    if 1 not in q_lens:
        monkeypatch.setattr(decodes, "run", lambda *args: skip(*args) or (args[2], args[4]))
    if call.sm_scale < 1:  # no sum is so large that a work item takes its blocks twice
        monkeypatch.setattr(prefills, "_find_shifts", lambda *args: None)


NOTHING = ("launch", '"""Ragged paged attention on TPU', '"""Attention on TPU')
PLANTED = [(f"{_ROOM}.{module}", old, new) for module, old, new, *_ in (*BUGS.values(), NOTHING)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, id=f"{n}-{b[4]}-{b[5]}") for n, b in BUGS.items()]
)
def test_bug_is_caught(name, monkeypatch):
    module_name, old, new, call, mode, symptom = BUGS[name]
    plant(monkeypatch, _ROOM, f"{_ROOM}.{module_name}", old, new)
    _stream(monkeypatch, tpu.launch, call)
    _leave_out(monkeypatch, tpu, call)
    assert _symptom(tpu.launch, call, mode) == symptom


@pytest.mark.parametrize("call", CONTROLS, ids=lambda call: call.id)
def test_without_a_bug_nothing_shows(call, monkeypatch):
    """The same machinery with nothing planted."""
    name, old, new = NOTHING
    module = plant(monkeypatch, _ROOM, f"{_ROOM}.{name}", old, new)
    _stream(monkeypatch, module, call)
    _leave_out(monkeypatch, tpu, call)
    assert _symptom(module, call, "on_wait") is None
