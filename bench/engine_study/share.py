# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The share of the KV write in a step of Llama 3 8B on TPU generations. Predictions.

A step is what `bench.engine_study.cost` makes of it: products at the peak rate, weights at the peak
bandwidth, attention and writes from compiled schedules, nothing for the host. A real step is
longer, so a share is at most what is said here; what the writes themselves take is a prediction of
`bench.kv_write`'s kind, with or without the bound on descriptors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from bench.cases.rounding import ceil_div
from bench.engine_study.cost import LLAMA3_8B, Cost, Work, visible_pairs
from bench.tpu_model import schedule as ts

FORMS = ("tokens", "slices", "pages", "fused")
# Cycles to start, and to wait for, the two copies of one slice in the cache update of the engines
# that serve on TPUs today (tpu-inference's kv_cache_update, whatever the slice's length), read off
# its compiled schedule; on every generation within 6%.
SHIPPED_SLICE_CYCLES = 68


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch: decodes at a context, and chunks of prefills after contexts."""

    name: str
    decodes: int
    context: int
    chunks: tuple[tuple[int, int], ...]  # (first position, one past the last)


BATCHES = (
    Batch("prefill: 2 chunks of 1,024 on 0", 0, 0, ((0, 1024),) * 2),
    Batch("prefill: 8 chunks of 1,024 on 0", 0, 0, ((0, 1024),) * 8),
    Batch("mixed: 64 decodes at 1,024, 1,984 on 1,024", 64, 1024, ((1024, 3008),)),
    Batch("decode: 64 at 1,024", 64, 1024, ()),
    Batch("decode: 256 at 1,024", 256, 1024, ()),
)


def work_of(batch: Batch, page_size: int) -> Work:
    """What the batch does, its padding left out."""
    pages = sum(end // page_size - ceil_div(start, page_size) for start, end in batch.chunks)
    pieces = sum(ceil_div(end, page_size) - start // page_size for start, end in batch.chunks)
    tokens = sum(end - start for start, end in batch.chunks)
    return Work(
        rows=batch.decodes + tokens,
        seqs=batch.decodes + len(batch.chunks),
        decodes=batch.decodes,
        decode_keys=batch.decodes * batch.context,
        prefilled=tokens,
        pairs=sum(visible_pairs(*chunk) for chunk in batch.chunks),
        pages=pages,
        partials=pieces - pages,
    )


@dataclasses.dataclass(frozen=True)
class Share:
    """A row of the report.

    Attributes:
      generation, batch, page_size: of what.
      compute_us: the step without its writes.
      write_us: form -> microseconds of the writes; "shipped" is one slice of 68 cycles a token.
      bound_us: the same at one descriptor in 18 ns.
    """

    generation: str
    batch: str
    page_size: int
    compute_us: float
    write_us: dict[str, float]
    bound_us: dict[str, float]

    def percent(self, form: str, *, is_bound: bool) -> float:
        """Of a step with such writes."""
        write = (self.bound_us if is_bound else self.write_us)[form]
        return 100 * write / (self.compute_us + write)

    def gain_percent(self, form: str, other: str, *, is_bound: bool) -> float:
        """By how much a step gets shorter that writes in one form and not in another."""
        us = self.bound_us if is_bound else self.write_us
        return 100 * (us[other] - us[form]) / (self.compute_us + us[other])


def shares(
    costs: Sequence[Cost], batches: Sequence[Batch], page_sizes: Sequence[int], descriptor_us: float
) -> list[Share]:
    """Every batch on every generation; costs without the bound on descriptors."""
    found = []
    for cost in costs:
        bound = dataclasses.replace(cost, descriptor_us=descriptor_us)
        for batch in batches:
            for size in page_sizes:
                work = work_of(batch, size)
                shipped = (
                    LLAMA3_8B.num_layers
                    * work.tokens
                    * ts.microseconds(SHIPPED_SLICE_CYCLES, cost.name)
                )
                found.append(
                    Share(
                        cost.name,
                        batch.name,
                        size,
                        cost.compute_us(work),
                        *(
                            {form: c.write_us(work, form, size) for form in FORMS}
                            | {"shipped": max(shipped, c.write_us(work, "tokens", size))}
                            for c in (cost, bound)
                        ),
                    )
                )
    return found
