# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Bugs planted in the oracle and in the kernels: the checks of test_tpu.py must catch each.

A bug is one snippet of a module's source, replaced; the modules that import it are made anew. Each
kernel bug is run in one DMA mode in which it must show, and the test says how it shows.
"""

import dataclasses

import jax
import pytest

from pallas_paged import kv_write
from tests.kv_write.cases import (
    EXACT_COMPILE,
    Case,
    RaceFoundError,
    difference,
    expected,
    interpret,
    make,
)
from tests.planted import plant


def _plant(monkeypatch, name, old, new):
    return plant(monkeypatch, kv_write.__name__, f"{kv_write.__name__}.{name}", old, new)


def _run(module, call):
    """The call through a backend's module, past the public op and what it has compiled."""
    is_kernel = module.__name__.endswith("launch")
    arrays, options = call.backend_arguments("mosaic_tpu" if is_kernel else "oracle")
    op = getattr(module, call.case.op)
    jitted = jax.jit(
        lambda arrays: op(*arrays, options), compiler_options=EXACT_COMPILE if is_kernel else None
    )
    return jitted(arrays)


def _symptom(call, module, mode):
    """How a run differs from the plain loop: "bytes", "race", "error" or None."""
    try:
        result = interpret(lambda: _run(module, call), mode)
    except RaceFoundError:
        return "race"
    except jax.errors.JaxRuntimeError as e:
        assert "interpret_pallas_call.py" in str(e), e  # it ran, and the interpreter refused
        return "error"
    return "bytes" if difference(result, expected(call)) else None


PAGES = Case("page_write", 40, 4, 1, 128, "float32", "holes", "float32", is_flat=False)
ONE_BY_ONE = Case(
    "page_write", 40, 1, 1, 128, "float32", "any", "float32", is_flat=False, block_tokens=32
)
RAGGED = Case("page_write", 45, 4, 1, 128, "float32", "live")
SLICES = Case("slice_write", 33, 16, 1, 128, "float32", "any", "float32", is_flat=False)
TOKENS = Case("token_write", 33, 4, 1, 128, "float32", "any", "float32", is_flat=False)
INT8 = Case("token_write", 16, 4, 3, 64, "int8", "live", scale="head", extreme=True)
E4M3 = Case("token_write", 16, 4, 2, 128, "float8_e4m3fn", "live", extreme=True)
BF16 = Case("token_write", 16, 4, 2, 128, "bfloat16", "live", is_flat=False)
PACKED = dataclasses.replace(BF16, is_flat=True, transpose_packed=True)
SPARE_ROWS = dataclasses.replace(TOKENS, num_tokens=16, num_rows=6)
COPIES = Case("copy_pages", 9, 4, 1, 128, "float32", "holes")
CONTROLS = (
    PAGES, ONE_BY_ONE, RAGGED, SLICES, TOKENS, INT8, E4M3, BF16, PACKED, SPARE_ROWS, COPIES,
)  # fmt: skip


BEYOND, STEP_BACK, LIVE, NONE = (
    dataclasses.replace(ONE_BY_ONE, entries=kind)
    for kind in ("beyond", "step_back", "live", "none")
)
# A token block of nine tiles, interleaved as two iterations of five.
TILES = Case("page_write", 160, 16, 1, 128, entries="live", block_tokens=128)

# name: (module, snippet, what stands there instead, case, DMA mode, how it shows)
KERNEL_BUGS = {
    "no_final_drain": (
        "tpu.kernel",
        "    wait_sent(refs, sent_before, stage)\n    wait_sent(refs, sent, 1 - stage)\n",
        "",
        PAGES, "on_wait", "bytes",
    ),
    "no_final_drain_seen_as_race": (
        "tpu.kernel",
        "    wait_sent(refs, sent_before, stage)\n    wait_sent(refs, sent, 1 - stage)\n",
        "",
        PAGES, "eager", "race",
    ),
    "drain_one_short": (
        "tpu.issue",
        "view = refs.pool.at[pl.ds(0, sent)]",
        "view = refs.pool.at[pl.ds(0, jnp.maximum(sent - 1, 1))]",
        ONE_BY_ONE, "on_wait", "bytes",
    ),
    "buffer_reused_before_its_wait": (
        "tpu.kernel",
        "        wait_sent(refs, sent_before, stage)\n        _interleave(",
        "        _interleave(",
        TOKENS, "on_wait", "bytes",
    ),
    "loads_not_waited_for": (
        "tpu.kernel",
        "        wait_loads(spec, refs, group, stage)\n",
        "",
        TOKENS, "on_wait", "bytes",
    ),
    "skip_not_honoured": (
        "tpu.issue",
        "pl.when(live)(lambda: self.send(",
        "(lambda action: action())(lambda: self.send(",
        TOKENS, "eager", "error",
    ),
    "skip_not_honoured_in_iterations": (
        "tpu.issue",
        "when_in_pool = pl.when(chunks.is_in_pool(target))",
        "when_in_pool = lambda action: action()",
        TOKENS, "eager", "error",
    ),
    "id_clamped": (
        "tpu.grouping",
        "return self.refs.targets[i // self.spec.chunks_per_element]",
        "return jnp.clip(self.refs.targets[i // self.spec.chunks_per_element], 0, "
        "self.num_targets - 1)",
        PAGES, "on_wait", "bytes",
    ),
    "identity_page_ids": (
        "tpu.grouping",
        "return self.refs.targets[i // self.spec.chunks_per_element]",
        "return i // self.spec.chunks_per_element",
        PAGES, "on_wait", "bytes",
    ),
    "source_off_by_one": (
        "tpu.entries",
        "starts = jnp.clip(token_starts, 0, num_tokens)",
        "starts = jnp.clip(token_starts - 1, 0, num_tokens)",
        PAGES, "eager", "bytes",
    ),
    "ragged_end_ignored": (
        "tpu.token_blocks",
        "needed_end > spec.aligned_tokens, pltpu",
        "needed_end > spec.num_tokens, pltpu",
        RAGGED, "on_wait", "bytes",
    ),
    "token_block_one_short": (
        "tpu.token_blocks",
        "rows = (needed_end - start + spec.row_align - 1) & -spec.row_align",
        "rows = (needed_end - start + spec.row_align - 2) & -spec.row_align",
        PAGES, "on_wait", "bytes",
    ),
    "needed_end_ignores_later_entries": (
        "tpu.grouping",
        "needed_end = jnp.where(live, jnp.maximum(needed_end, chunks.end(end)), needed_end)",
        "needed_end = jnp.maximum(needed_end, jnp.where(end == i, chunks.end(end), needed_end))",
        SLICES, "on_wait", "bytes",
    ),
    "sent_counted_short": (
        "tpu.issue",
        "return sent if num_tokens is None else sent + unroll * num_tokens",
        "return sent if num_tokens is None else sent + (unroll - 1) * num_tokens",
        LIVE, "on_wait", "bytes",
    ),
    "any_order_taken_for_ascending": (
        "tpu.grouping",
        "return num_used, jnp.where(-step_back < num_used, ANY_ORDER, regularity)",
        "return num_used, regularity",
        STEP_BACK, "on_wait", "error",
    ),
    "holes_taken_for_live": (
        "tpu.grouping",
        "regularity = jnp.where(-hole < num_used, ASCENDING, regularity)",
        "pass",
        BEYOND, "eager", "error",
    ),
    "ids_past_the_pool_taken_for_live": (
        "tpu.entries",
        "is_live = (page_ids >= 0) & (page_ids < num_pages)",
        "is_live = page_ids >= 0",
        BEYOND, "eager", "error",
    ),
    "whole_group_taken_for_live": (
        "tpu.issue",
        "is_whole & (sender.chunks.regularity >= ALL_LIVE),",
        "is_whole,",
        dataclasses.replace(TILES, num_tokens=320, entries="holes"), "eager", "error",
    ),
    "last_iteration_not_pulled_back": (
        "tpu.interleave",
        "make_slots(jnp.minimum(i * per_iteration, last_start), per_iteration)",
        "make_slots(i * per_iteration, per_iteration)",
        TILES, "eager", "error",
    ),
    "stored_over_unread_words": (
        "tpu.interleave",
        "return (u % _REGIONS * lane_tiles",
        "return (0 * lane_tiles",
        TILES, "eager", "bytes",
    ),
    "start_overflows": (
        "tpu.entries",
        "starts = jnp.clip(token_starts, 0, num_tokens)",
        "starts = token_starts",
        STEP_BACK, "on_wait", "error",
    ),
    "k_and_v_swapped": (
        "tpu.interleave",
        "codes(r % 2, r // 2, first,",
        "codes(1 - r % 2, r // 2, first,",
        TOKENS, "eager", "bytes",
    ),
    "wrong_heads_paired": (
        "tpu.interleave",
        "codes(r % 2, r // 2, first,",
        "codes(r // slots.num_kv_heads, r % slots.num_kv_heads, first,",
        E4M3, "eager", "bytes",
    ),
    "k_and_v_swapped_in_place": (
        "tpu.interleave",
        "(k >> 16) | (v & high)",
        "(v >> 16) | (k & high)",
        BF16, "eager", "bytes",
    ),
    "odd_tokens_before_even": (
        "tpu.interleave",
        "[(k & low) | (v << 16), (k >> 16) | (v & ~low)]",
        "[(k >> 16) | (v & ~low), (k & low) | (v << 16)]",
        PACKED, "eager", "bytes",
    ),
    "scale_ignored": (
        "tpu.interleave",
        "x = x * scales(which, head)",
        "pass",
        INT8, "eager", "bytes",
    ),
    "first_heads_scale_for_all": (
        "tpu.kernel",
        "refs.inverse_scales[which * spec.slots.num_kv_heads + head]",
        "refs.inverse_scales[which * spec.slots.num_kv_heads]",
        INT8, "eager", "bytes",
    ),
    "fp8_rounded_toward_zero": (
        "tpu.quantize",
        "normal = (clipped - rebias + ((1 << (shift - 1)) - 1) + odd) >> shift",
        "normal = (clipped - rebias) >> shift",
        E4M3, "eager", "bytes",
    ),
    "fp8_ties_rounded_down": (
        "tpu.quantize",
        "((1 << (shift - 1)) - 1) + odd",
        "((1 << (shift - 1)) - 1)",
        E4M3, "eager", "bytes",
    ),
    "fp8_not_saturated": (
        "tpu.quantize",
        "clipped = jnp.minimum(magnitude, largest)",
        "clipped = magnitude",
        E4M3, "eager", "bytes",
    ),
    "fp8_subnormals_flushed": (
        "tpu.quantize",
        "clipped < smallest_normal, subnormal, normal",
        "clipped < smallest_normal, 0, normal",
        E4M3, "eager", "bytes",
    ),
    "int8_not_saturated": (
        "tpu.quantize",
        "jnp.clip(x, -128.0, 127.0)",
        "x",
        INT8, "eager", "bytes",
    ),
    "padding_rows_not_cleared": (
        "tpu.kernel",
        "if spec.slots.has_padding:",
        "if False:",
        SPARE_ROWS, "eager", "bytes",
    ),
    "copies_not_drained": (
        "tpu.page_copies",
        "lax.while_loop(lambda sent: sent > 0, wait, sent)",
        "pass",
        COPIES, "on_wait", "bytes",
    ),
    "copies_not_drained_seen_as_race": (
        "tpu.page_copies",
        "lax.while_loop(lambda sent: sent > 0, wait, sent)",
        "pass",
        COPIES, "eager", "race",
    ),
    "copy_to_an_unchecked_page": (
        "tpu.page_copies",
        "is_live &= _is_page(dst, target)",
        "pass",
        COPIES, "eager", "error",
    ),
}  # fmt: skip

# name: (snippet, what stands there instead, case)
ORACLE_BUGS = {
    "identity_page_ids": (
        "_set(kv_pages, jnp.where(is_live, page_ids, num_pages), new[tokens])",
        "_set(kv_pages, jnp.arange(page_ids.shape[0]), new[tokens])",
        PAGES,
    ),
    "minus_one_wraps": (
        "is_live = (page_ids >= 0) & (page_ids < num_pages)",
        "is_live = (page_ids >= -1) & (page_ids < num_pages)",
        NONE,
    ),
    "id_clamped": (
        "is_live = (page_ids >= 0) & (page_ids < num_pages)",
        "page_ids = jnp.minimum(page_ids, num_pages - 1); is_live = page_ids >= 0",
        PAGES,
    ),
    "source_off_by_one": (
        "tokens = starts[:, None] + jnp.arange(page_size, dtype=jnp.int32)",
        "tokens = starts[:, None] + jnp.arange(1, page_size + 1, dtype=jnp.int32)",
        PAGES,
    ),
    "source_clamped": (
        "is_live &= (token_starts >= 0) & (token_starts <= num_tokens - page_size)",
        "token_starts = jnp.clip(token_starts, 0, num_tokens - page_size)",
        ONE_BY_ONE,
    ),
    "slice_crosses_its_page": (
        "is_live &= first_slot % page_size <= page_size - length",
        "pass",
        SLICES,
    ),
    "num_slices_ignored": (
        "is_live = jnp.arange(slices.shape[1]) < num_slices[0]",
        "is_live = jnp.ones(slices.shape[1], bool)",
        SLICES,
    ),
    "slice_one_short": (
        "is_token = is_live[:, None] & (step < length[:, None])",
        "is_token = is_live[:, None] & (step < length[:, None] - 1)",
        SLICES,
    ),
    "token_minus_one_wraps": (
        "is_live = (slots >= 0) & (slots < pool.shape[0])",
        "is_live = (slots >= -1) & (slots < pool.shape[0])",
        TOKENS,
    ),
    "k_and_v_swapped": (
        "layout.merge_kv(as_bits(k), as_bits(v), ",
        "layout.merge_kv(as_bits(v), as_bits(k), ",
        BF16,
    ),
    "scale_ignored": (" * inverse_scale(scale, x.shape[1])[:, None]", "", INT8),
    "k_scale_for_v": (
        "quantize(layout.split_heads(v, num_kv_heads), scales.v,",
        "quantize(layout.split_heads(v, num_kv_heads), scales.k,",
        INT8,
    ),
    "int8_rounded_toward_zero": ("jnp.round(y)", "jnp.trunc(y)", INT8),
    "int8_ties_rounded_up": (
        "jnp.round(y)",
        "jnp.floor(y + 0.5)",
        dataclasses.replace(INT8, scale="none"),
    ),
    "fp8_not_saturated": ("jnp.clip(y, -largest, largest).astype", "y.astype", E4M3),
    "pool_zeroed": (
        "pool.view(bits.dtype).at[index]",
        "jnp.zeros_like(pool.view(bits.dtype)).at[index]",
        TOKENS,
    ),
    "copied_the_wrong_way": (
        "pages = as_bits(kv_pages)[jnp.where(is_live, src_ids, 0)]",
        "pages = as_bits(kv_pages)[jnp.where(is_live, dst_ids, 0)]",
        COPIES,
    ),
}
if jax.__version_info__ < (0, 11):  # what writes narrow floats on a CPU there
    HOLES = dataclasses.replace(BF16, entries="any")
    ORACLE_BUGS |= {
        "dropped_entries_come_first": (
            "jnp.argsort(is_dropped)",
            "jnp.argsort(~is_dropped)",
            HOLES,
        ),
        "one_dropped_entry_too_many": (
            "is_dropped = index >= len(pool)",
            "is_dropped = index > len(pool)",
            HOLES,
        ),
    }


NOTHING = ("tpu.launch", '"""Writes on TPU', '"""Writes on a TPU')
PLANTED = [
    (f"{kv_write.__name__}.{module}", old, new)
    for module, old, new, *_ in (
        *(("oracle", *bug) for bug in ORACLE_BUGS.values()),
        *KERNEL_BUGS.values(),
        NOTHING,
    )
]


@pytest.mark.parametrize("name", ORACLE_BUGS)
def test_oracle_bug_is_caught(name, monkeypatch):
    old, new, case = ORACLE_BUGS[name]
    module = _plant(monkeypatch, "oracle", old, new)
    call = make(case)
    assert difference(_run(module, call), expected(call)) is not None


@pytest.mark.parametrize(
    "name", [pytest.param(n, id=f"{n}-{b[4]}-{b[5]}") for n, b in KERNEL_BUGS.items()]
)
def test_kernel_bug_is_caught(name, monkeypatch):
    module_name, old, new, case, mode, symptom = KERNEL_BUGS[name]
    _plant(monkeypatch, module_name, old, new)
    assert _symptom(make(case), kv_write.tpu.launch, mode) == symptom


@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.id)
def test_without_a_bug_nothing_shows(case, monkeypatch):
    """The same machinery with nothing planted."""
    module = _plant(monkeypatch, *NOTHING)
    assert _symptom(make(case), module, "on_wait") is None
