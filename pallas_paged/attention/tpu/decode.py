# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Attention of decodes' queries to KV blocks, on the matrix unit.

All heads of a decode's one row are computed together: heads are rows, keys are lanes, and the
matrix unit holds K and V. Sum and accumulator are float32, in the base 2.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_paged import layout
from pallas_paged.attention.tpu.operands import HIGH, Heads, Load, keys, values
from pallas_paged.attention.tpu.scores import (
    LOG2_E,
    SUBLANES,
    Scoring,
    holds_token,
    scores,
    seen_keys,
)

# One softmax takes KV blocks with at most this many keys, times registers of query rows. Their
# products fit the registers.
_JOINT_KEYS = 4096


def decode_rows(num_heads: int) -> int:
    """Rows that a decode's heads take, rounded up to whole registers."""
    return -(-num_heads // SUBLANES) * SUBLANES


def row_pitch(num_heads: int) -> int:
    """Rows from one decode to the next where heads are rows: odd, whole registers and one row."""
    return decode_rows(num_heads) + 1


class Step(NamedTuple):
    """One KV block that an iteration takes.

    Attributes:
      load: loads the words of the block, see `operands.Load`. What is to be done among the loads,
        such as starting DMAs, is done in it.
      first, end: positions of the block's first key, and of the first key that it does not hold.
      position: position of the query.
      is_first: whether the block is its decode's first; the static False where the step before is
        of the same decode.
      q: `q(row, lane_tile)` is f32[8, 128], eight heads of the token.
      store: `store(row, lane_tile, x)` takes f32[8, 128], the values attended to so far; None if
        they are not wanted yet.
      store_lse: `store_lse(x)` takes f32[rows, 1], the log-sum-exp so far.
    """

    load: Load
    first: Any
    end: Any
    position: Any
    is_first: Any
    q: Callable[[int, int], jax.Array]
    store: Callable[[int, int, jax.Array], None] | None
    store_lse: Callable[[jax.Array], None]


class _State(NamedTuple):
    """The running state of eight heads of a decode; see `attend`."""

    m: jax.Array
    total: jax.Array
    acc: jax.Array


# Something of each register of eight head rows, by the first row.
_ByRow = dict[int, jax.Array]


def attend(
    heads: Heads,
    scoring: Scoring,
    sinks_ref: Any,
    *,
    steps: Sequence[Step],
    num_keys: int,
    is_full: bool,
    m_ref: Any,
    l_ref: Any,
    acc_ref: Any,
) -> None:
    """Takes KV blocks, one after the other, each into the running state of its decode.

    The products with the keys of the next block come before the softmax over this block, so that
    the matrix unit has work while the softmax is computed. Where blocks are small and of one
    decode, one softmax takes multiple of them.

    Args:
      heads: shapes and dtypes.
      scoring: what turns products into scores.
      sinks_ref: f32[rows, 128], the sink of a head in all lanes; None without sinks.
      steps: the blocks.
      num_keys: keys of a block.
      is_full: whether all keys of the blocks count; static.
      m_ref, l_ref, acc_ref: the state from iteration to iteration: running maximum f32[rows, 128]
        (all lanes equal), sum f32[rows, 128] (each lane has a part) and accumulator f32[rows, C].
    """
    rows = range(0, decode_rows(heads.num_heads), SUBLANES)
    refs = (m_ref, l_ref, acc_ref)
    queries = functools.cache(functools.partial(_queries, heads))
    groups = _groups(heads, steps, num_keys)
    state = {row: _State(*(ref[_register(row)] for ref in refs)) for row in rows}
    products: list[_ByRow] = []
    nothing: list[Step] = []
    for group, following in zip([nothing, *groups], [*groups, nothing], strict=True):
        weights: list[_ByRow] = []
        if group:
            if not is_full:
                products = [
                    _mask(scoring, step, product, num_keys)
                    for step, product in zip(group, products, strict=True)
                ]
            weights, state = _weigh(heads, group[0].is_first, products, state, num_keys)
        products = [{} for _ in following]
        # The keys and the values of a head alternate, because values load the vector units and keys
        # the matrix unit. Only before the last values all keys come first, so that those values
        # hide the softmax that follows.
        lag = heads.num_kv_heads if following is groups[-1] else 0
        for i in range(heads.num_kv_heads + lag):
            if i < heads.num_kv_heads:
                for step, product in zip(following, products, strict=True):
                    _multiply_keys(heads, scoring, queries, step, i, product)
            if i >= lag:
                for step, weights_of_step in zip(group, weights, strict=True):
                    _multiply_values(
                        heads, step, i - lag, weights_of_step, state, num_keys, is_full
                    )
        if group:
            _store(heads, scoring, sinks_ref, group[-1], state)
    for row in rows:
        for ref, x in zip(refs, state[row], strict=True):
            ref[_register(row)] = x


def _groups(heads: Heads, steps: Sequence[Step], num_keys: int) -> list[list[Step]]:
    """The steps in groups that one softmax takes.

    Steps of a group are of one decode. They are as many as have few products together: on its own,
    each would wait for the result of the one before it.
    """
    registers = decode_rows(heads.num_heads) // SUBLANES
    most = max(1, _JOINT_KEYS // (registers * num_keys))
    groups: list[list[Step]] = []
    for step in steps:
        if step.is_first is not False or len(groups[-1]) == most:
            groups.append([])
        groups[-1].append(step)
    return groups


# ---- The products


def _queries(heads: Heads, q: Callable[[int, int], jax.Array], row: int) -> jax.Array:
    """Eight heads of a decode's query, `compute_dtype`[8, C]."""
    lane_tiles = [q(row, c) for c in range(heads.lane_tiles)]
    return jnp.concatenate(lane_tiles, axis=1).astype(heads.compute_dtype)


def _multiply_keys(
    heads: Heads,
    scoring: Scoring,
    queries: Callable[..., jax.Array],
    step: Step,
    head: int,
    product: _ByRow,
) -> None:
    """Takes the scores of one KV head into `product`, f32[8, keys] per register of head rows."""
    k = keys(heads, step.load, head)
    scale = scoring.scale(head)
    for row, mask in _head_rows(heads, head):
        s = lax.dot_general(
            queries(step.q, row),
            k,
            (((1,), (1,)), ((), ())),
            precision=heads.precision,
            preferred_element_type=jnp.float32,
        )
        product[row] = _select(mask, scores(scoring.options, s, scale), product.get(row))


def _multiply_values(
    heads: Heads,
    step: Step,
    head: int,
    weights: _ByRow,
    state: dict[int, _State],
    num_keys: int,
    is_full: bool,
) -> None:
    """Takes the weighted values of one KV head into the state."""
    is_token = functools.partial(holds_token, step.first, step.end, num_keys)
    v = values(heads, step.load, head, None if is_full else is_token)
    for row, mask in _head_rows(heads, head):
        acc = state[row].acc
        o = jnp.dot(weights[row], v, precision=heads.precision, preferred_element_type=jnp.float32)
        o = acc + sum(o[part : part + SUBLANES] for part in range(0, o.shape[0], SUBLANES))
        state[row] = state[row]._replace(acc=_select(mask, o, acc))


def _head_rows(heads: Heads, head: int) -> Iterator[tuple[int, jax.Array | None]]:
    """Each register of rows that has heads of a KV head: its first row, and which rows are theirs.

    The latter is bool[8, 1], None where all are.
    """
    first, end = head * heads.group, (head + 1) * heads.group
    row = lax.broadcasted_iota(jnp.int32, (SUBLANES, 1), 0)
    for start in range(first // SUBLANES * SUBLANES, end, SUBLANES):
        is_all = first <= start and end >= min(start + SUBLANES, heads.num_heads)
        yield start, None if is_all else (row + start >= first) & (row + start < end)


def _select(mask: jax.Array | None, new: jax.Array, old: jax.Array | None) -> jax.Array:
    return new if mask is None or old is None else jnp.where(mask, new, old)


def _register(row: int) -> slice:
    """The rows of one register."""
    return slice(row, row + SUBLANES)


# ---- The softmax


def _mask(scoring: Scoring, step: Step, product: _ByRow, num_keys: int) -> _ByRow:
    """Scores of a KV block, -inf where a key does not count."""
    key = lax.broadcasted_iota(jnp.int32, (SUBLANES, num_keys), 1)
    seen = seen_keys(
        scoring.options, key, step.position, step.first, step.end, scoring.sliding_window
    )
    return {row: jnp.where(seen, s, -jnp.inf) for row, s in product.items()}


def _weigh(
    heads: Heads,
    is_first: Any,
    products: Sequence[_ByRow],
    state: dict[int, _State],
    num_keys: int,
) -> tuple[list[_ByRow], dict[int, _State]]:
    """Takes the scores of a group of steps into the softmax.

    Returns:
      the weights of each step, and the state, of which only the values are still to be added.
    """
    weights: list[_ByRow] = [{} for _ in products]
    after = {}
    for row, (m, total, acc) in state.items():
        if is_first is not False:
            m, total, acc = (
                jnp.where(is_first, *x) for x in ((-jnp.inf, m), (0.0, total), (0.0, acc))
            )
        largest = (jnp.max(product[row], axis=1, keepdims=True) for product in products)
        top = functools.reduce(jnp.maximum, largest, m)
        shift = jnp.where(top == -jnp.inf, 0.0, top)  # 0 where no key was seen yet, to avoid NaN
        rescale = jnp.exp2(m - shift)
        total = total * rescale
        for weights_of_step, product in zip(weights, products, strict=True):
            p = jnp.exp2(product[row] - shift[:, :1])
            total += sum(p[:, c : c + layout.LANES] for c in range(0, num_keys, layout.LANES))
            weights_of_step[row] = _split_weights(p, heads.compute_dtype)
        after[row] = _State(top, total, acc * _wide(rescale, heads.lane_tiles))
    return weights, after


def _split_weights(weights: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Eight rows of float32 weights as operands of the matrix unit.

    In bfloat16 a weight is the sum of two operands, whose products the caller adds in float32. The
    second one takes the half of a register that eight rows leave free.
    """
    if dtype == jnp.float32:
        return weights
    bits = lax.bitcast_convert_type(weights, jnp.uint32)
    first = lax.bitcast_convert_type(bits & jnp.uint32(HIGH), jnp.float32)
    return jnp.concatenate([first, weights - first], axis=0).astype(dtype)


def _wide(x: jax.Array, lane_tiles: int) -> jax.Array:
    """f32[8, 128] with equal lanes as f32[8, C]."""
    return x if lane_tiles == 1 else jnp.concatenate([x] * lane_tiles, axis=1)


# ---- The result


def _store(
    heads: Heads, scoring: Scoring, sinks_ref: Any, step: Step, state: dict[int, _State]
) -> None:
    """Stores a decode's result if the step is one after which it is wanted."""
    if step.store is None:
        return
    lse = []
    for row, state_of_row in state.items():
        out, lse_of_row = _finish(heads, scoring, sinks_ref, row, *state_of_row)
        lse.append(lse_of_row)
        for c in range(heads.lane_tiles):
            step.store(row, c, out[:, c * layout.LANES : (c + 1) * layout.LANES])
    if scoring.options.return_lse:
        step.store_lse(jnp.concatenate(lse, axis=0))


def _finish(
    heads: Heads,
    scoring: Scoring,
    sinks_ref: Any,
    row: int,
    m: jax.Array,
    total: jax.Array,
    acc: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Attended values of eight heads, f32[8, C] with V from lane 0, and log-sum-exp f32[8, 1]."""
    m, total = m[:, :1], jnp.sum(total, axis=1, keepdims=True)
    if scoring.options.has_sinks:
        sink = sinks_ref[_register(row), :1] * LOG2_E
        top = jnp.maximum(m, sink)
        rescale = jnp.exp2(m - top)
        m, total, acc = top, total * rescale + jnp.exp2(sink - top), acc * rescale
    factor = 1.0 / jnp.where(total > 0, total, 1.0)
    if scoring.options.has_scales:
        head_row = row + lax.broadcasted_iota(jnp.int32, factor.shape, 0)
        v_scale = jnp.ones_like(factor)
        for head in range(heads.num_kv_heads):
            is_head = (head_row >= head * heads.group) & (head_row < (head + 1) * heads.group)
            v_scale = jnp.where(is_head, scoring.scales(1, head), v_scale)
        factor = factor * v_scale
    out = acc * factor
    if heads.value_lane:
        out = jnp.roll(out, -heads.value_lane, axis=1)
    return out, (m + jnp.log2(total)) / LOG2_E


def as_row(column: jax.Array, num_lanes: int) -> jax.Array:
    """A column f32[rows, 1] as a row f32[1, num_lanes], with zeros after it."""
    shape = (column.shape[0], num_lanes)
    is_diagonal = lax.broadcasted_iota(jnp.int32, shape, 0) == lax.broadcasted_iota(
        jnp.int32, shape, 1
    )
    return jnp.sum(jnp.where(is_diagonal, column, 0.0), axis=0, keepdims=True)
