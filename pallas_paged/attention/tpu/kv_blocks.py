# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""KV blocks in VMEM: which keys a block has, waiting until they have come, and loading them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_paged.attention.tpu import new_kv
from pallas_paged.attention.tpu.index_math import ceil_div, div, rem
from pallas_paged.attention.tpu.kv_fetch import Fetch, start_block
from pallas_paged.attention.tpu.refs import Refs
from pallas_paged.attention.tpu.spec import KernelSpec
from pallas_paged.attention.tpu.token_rows import TokenRows
from pallas_paged.attention.tpu.work_items import WorkItem, first_chunk_of

# Rows that are loaded between two points at which DMAs start. 128 is the best of 64, 128 and 512:
# where many DMAs stand together, the matrix unit waits for the loads that follow them.
_ROWS_PER_ISSUE = 128
# A block that is not full is read in strips of this many tokens; block_kv is a multiple of it.
STRIP = 128
# Tokens that one trip of a loop clears.
CLEARED_PER_TRIP = 8


class BlockRows(NamedTuple):
    """The rows of `Refs.kv_vmem` that hold a KV block.

    Attributes:
      row: the row of the block's first token, in its first lane tile.
      lane_tile_rows: rows from one lane tile of a token to its next one.
      last_strip: the token where the last strip begins that has tokens, which is loaded in place of
        all strips after it; None to load every strip.
    """

    row: Any
    lane_tile_rows: Any
    last_strip: Any = None


def _rows_of_stage(spec: KernelSpec, stage: Any) -> BlockRows:
    return BlockRows(stage * spec.rows_per_stage, spec.block_kv)


def prefill_block_rows(spec: KernelSpec, item: WorkItem, block: Any, stage: Any) -> BlockRows:
    """The rows of a prefill's block: those of its stage, or those of new tokens."""
    fetched = _rows_of_stage(spec, stage)
    if not spec.writes:
        return fetched
    first_row = new_kv.row_of(spec, _new_block(item, block) * spec.block_kv)
    new = BlockRows(first_row, spec.new_kv_rows)
    is_in_pool = block < item.num_pool_blocks
    return BlockRows(
        *(jnp.where(is_in_pool, a, b) for a, b in zip(fetched[:2], new[:2], strict=True))
    )


# ---- Which keys


def key_range(spec: KernelSpec, item: WorkItem, block: Any) -> tuple[Any, Any]:
    """The keys of a block of a work item whose keys all come from the pool.

    Returns:
      the positions of the block's first key and of the first key that it does not hold.
    """
    first = item.first_chunk + block * spec.chunks_per_block
    end = (first + spec.chunks_per_block) * spec.chunk
    return first * spec.chunk, jnp.minimum(item.key_end, end)


def prefill_key_range(spec: KernelSpec, item: WorkItem, block: Any) -> tuple[Any, Any]:
    """As `key_range`, of a prefill, whose new keys are in VMEM if the call writes them."""
    if not spec.writes:
        return key_range(spec, item, block)
    is_in_pool = block < item.num_pool_blocks
    chunk = item.first_chunk + block * spec.chunks_per_block
    end = jnp.minimum(chunk + spec.chunks_per_block, item.old_end) * spec.chunk
    new = item.old_end * spec.chunk + _new_block(item, block) * spec.block_kv
    first = jnp.where(is_in_pool, chunk * spec.chunk, new)
    return first, jnp.minimum(item.key_end, jnp.where(is_in_pool, end, new + spec.block_kv))


def _new_block(item: WorkItem, block: Any) -> Any:
    """The number of a block among the blocks of new keys."""
    return item.first_new_block + block - item.num_pool_blocks


# ---- Waiting


def take_blocks(
    spec: KernelSpec, refs: Refs, taken: Sequence[tuple[WorkItem, Any]], is_full: bool
) -> list[BlockRows]:
    """Waits for the next blocks and returns their rows.

    Args:
      spec, refs: the kernel's.
      taken: (work item, block) of each; the items are decodes.
      is_full: whether all blocks are full.
    """
    first = refs.state.num_taken
    refs.state.num_taken = first + len(taken)
    stages = [rem(first + b, spec.num_stages) for b in range(len(taken))]
    for stage, (item, block) in zip(stages, taken, strict=True):
        num_tokens = _num_tokens_fetched(spec, *key_range(spec, item, block))
        _wait_block(spec, refs, stage, spec.block_kv if is_full else num_tokens)
    return [_rows_of_stage(spec, stage) for stage in stages]


def take_prefill_block(spec: KernelSpec, refs: Refs, item: WorkItem, block: Any) -> Any:
    """Waits for the next block, which is a prefill's, and returns its stage."""
    num_taken = refs.state.num_taken
    refs.state.num_taken = num_taken + 1
    stage = rem(num_taken, spec.num_stages)
    num_tokens = _num_tokens_fetched(spec, *prefill_key_range(spec, item, block))
    _when_in_pool(spec, item, block, lambda: _wait_block(spec, refs, stage, num_tokens))
    return stage


def fetch_again(spec: KernelSpec, refs: Refs, item: WorkItem, block: Any) -> Any:
    """Fetches a block that was taken before, waits for it and returns its stage, the extra one."""
    stage = jnp.int32(spec.num_stages)

    def fetch() -> None:
        first, end = prefill_key_range(spec, item, block)
        num_chunks = ceil_div(end - first, spec.chunk)
        chunk = first_chunk_of(spec, item.seq) + div(first, spec.chunk)
        start_block(spec, refs, Fetch(stage, chunk, num_chunks))
        _wait_block(spec, refs, stage, _num_tokens_fetched(spec, first, end))

    _when_in_pool(spec, item, block, fetch)
    return stage


def _wait_block(spec: KernelSpec, refs: Refs, stage: Any, num_tokens: Any) -> None:
    """Waits until the tokens of a block have come into a stage."""
    heads = spec.heads
    rows = pl.ds(0, num_tokens * heads.lane_tiles)
    view = refs.kv_vmem.at[rows, pl.ds(0, heads.num_words), 0]
    pltpu.make_async_copy(view, view, refs.stage_sems.at[stage]).wait()


def _num_tokens_fetched(spec: KernelSpec, first: Any, end: Any) -> Any:
    """How many tokens of a block are fetched: those of whole chunks."""
    return ceil_div(end - first, spec.chunk) * spec.chunk


def _when_in_pool(spec: KernelSpec, item: WorkItem, block: Any, do: Callable[[], None]) -> None:
    """Calls `do` if a prefill's block comes from the pool."""
    if not spec.writes:
        do()
    else:
        pl.when(block < item.num_pool_blocks)(do)


# ---- Loading


def clear_rest(spec: KernelSpec, refs: Refs, at: BlockRows, num_tokens: Any) -> BlockRows:
    """Fills the rows of a block after its tokens with zeros, up to the end of a strip.

    They may hold NaN, which a weight of 0 does not turn into 0. Strips without any token are not
    cleared: the rows that are returned have the last strip with tokens in their place.
    """
    rows, heads = TokenRows(refs.kv_vmem, spec.is_interpreted), spec.heads
    end = ceil_div(num_tokens, STRIP) * STRIP

    @pl.loop(0, ceil_div(end - num_tokens, CLEARED_PER_TRIP))
    def _clear(i: Any) -> None:
        for j in range(CLEARED_PER_TRIP):
            # After the last token of the strip that one is cleared again, which needs no branch.
            token = jnp.minimum(num_tokens + i * CLEARED_PER_TRIP + j, end - 1)
            for c in range(heads.lane_tiles):
                rows.clear_token(at.row + c * at.lane_tile_rows + token, heads.num_words)

    return at._replace(last_strip=end - STRIP)


def num_issue_points(spec: KernelSpec) -> int:
    """How often `load` calls `issue` while the keys and values of one block are loaded."""
    steps = 1 if spec.heads.compute_dtype == jnp.float32 else 2
    loads = 2 * spec.heads.num_kv_heads * spec.heads.lane_tiles * steps
    return loads * len(_first_tokens(spec, steps))


def _first_tokens(spec: KernelSpec, step: int) -> range:
    """The tokens where `load` begins anew, when it takes every `step`-th token of a block."""
    return range(0, spec.block_kv, _ROWS_PER_ISSUE * step)


def load(
    spec: KernelSpec,
    refs: Refs,
    at: BlockRows,
    issue: Callable[[], None],
    word: int,
    lane_tile: int,
    parity: int | None,
) -> jax.Array:
    """Loads words of a block, see `operands.Load`, and calls `issue` in between to start DMAs."""
    first, step = (0, 1) if parity is None else (parity, 2)
    row = at.row + lane_tile * at.lane_tile_rows + first
    rows = TokenRows(refs.kv_vmem, spec.is_interpreted)
    words = []
    for start in _first_tokens(spec, step):
        num_tokens = min(_ROWS_PER_ISSUE * step, spec.block_kv - start)
        if at.last_strip is None:
            words.append(rows.load(row + start, num_tokens // step, word, step))
        else:
            for token in range(start, start + num_tokens, STRIP):
                strip = row + jnp.minimum(token, at.last_strip)
                words.append(rows.load(strip, STRIP // step, word, step))
        issue()
    return lax.bitcast_convert_type(jnp.concatenate(words, axis=0), jnp.uint32)
