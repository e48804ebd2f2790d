# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""What a step of Llama 3 8B costs: from compiled schedules (`predicted`), or measured (`fitted`).

A step's time is the larger of reading the weights and multiplying its rows by them, plus attention,
plus the writes, plus what the host does between steps. Attention is linear in decodes, their keys,
prefilled tokens and pairs of query and key that the mask lets see. Writes take as long as their
slowest unit: bytes through HBM, descriptors issued by the core, and, if asked for, descriptors
taken by the DMA engine.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from bench.cases.attention import PRESETS, Call, room_for
from bench.cases.attention import Case as AttentionCase
from bench.cases.kv_write import WriteCase
from bench.tpu_model import attention as attention_model
from bench.tpu_model import kv_write as write_model
from bench.tpu_model import schedule as ts
from reference_engine.config import ModelConfig

LLAMA3_8B = ModelConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=500_000.0,
    rms_norm_eps=1e-5,
    dtype="bfloat16",
)
PAGE_SIZES = (16, 32, 64, 128, 256)
# Sizes from which the constants are taken: calls like those of a full step.
_WRITTEN = 2048
_DECODES, _SHORT, _LONG = 64, 1024, 4096
_CHUNK = 2048


class Work(NamedTuple):
    """What a step does.

    Attributes:
      rows: of the padded batch.
      seqs: sequences of the padded batch.
      decodes: segments of one generated token; each is a slice of one token.
      decode_keys: keys that they see.
      prefilled: tokens of the other segments.
      pairs: of query and key that those see.
      pages: whole pages written.
      partials: other pieces of pages, written by prefills.
    """

    rows: int
    seqs: int
    decodes: int
    decode_keys: int
    prefilled: int
    pairs: int
    pages: int
    partials: int

    @property
    def tokens(self) -> int:
        return self.decodes + self.prefilled

    def descriptors(self, kv_write: str) -> int:
        """Writes that are issued: by token, by piece of a page, or whole pages and the rest."""
        pieces = self.pages + self.partials + self.decodes
        return {"tokens": self.tokens, "fused": 0}.get(kv_write, pieces)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Microseconds of a step, all layers together.

    Attributes:
      name: the device.
      source: where the constants are from, for the report.
      host_us: between two steps of the device.
      weights_us: to read all weights but the embedding; no step is shorter.
      row_us: a row through all projections of the layers.
      seq_us: a row through the last projection.
      decode_us, decode_key_us: attention of a decode, and for each of its keys.
      prefilled_us, pair_us: attention of a prefilled token, and for each pair.
      written_us: HBM time of a token's slot, read and written.
      page_us: page size -> core time of a whole page written.
      slice_us: page size -> core time of a slice as long as a page.
      token_us: core time of a token written by itself, as a slice of one token is taken to be.
      fused_us: core time of a token in the fused form, decode's and prefill's.
      descriptor_us: least time of the DMA engine a descriptor; 0 leaves it out.
    """

    name: str
    source: str
    host_us: float
    weights_us: float
    row_us: float
    seq_us: float
    decode_us: float
    decode_key_us: float
    prefilled_us: float
    pair_us: float
    written_us: float
    page_us: Mapping[int, float]
    slice_us: Mapping[int, float]
    token_us: float
    fused_us: tuple[float, float]
    descriptor_us: float = 0.0

    def write_us(self, work: Work, kv_write: str, page_size: int) -> float:
        """Time of the writes."""
        if kv_write == "fused":  # on the core beside the attention; its bytes are not read again
            core = work.decodes * self.fused_us[0] + work.prefilled * self.fused_us[1]
            return max(core, work.tokens * self.written_us / 2)
        if kv_write == "tokens":
            core = work.tokens * self.token_us
        else:
            whole = self.page_us if kv_write == "pages" else self.slice_us
            core = work.pages * whole[page_size]
            core += work.partials * self.slice_us[page_size] + work.decodes * self.token_us
        engine = work.descriptors(kv_write) * self.descriptor_us
        return max(core, engine, work.tokens * self.written_us)

    def compute_us(self, work: Work) -> float:
        """Time of all but the writes and the host."""
        attention = work.decodes * self.decode_us + work.decode_keys * self.decode_key_us
        attention += work.prefilled * self.prefilled_us + work.pairs * self.pair_us
        products = work.rows * self.row_us + work.seqs * self.seq_us
        return max(self.weights_us, products) + attention

    def step_us(self, work: Work, kv_write: str, page_size: int) -> float:
        """Time of a step."""
        return self.host_us + self.compute_us(work) + self.write_us(work, kv_write, page_size)


def visible_pairs(start: int, end: int) -> int:
    """Pairs of query and key of tokens [start, end) that see all before and themselves.

    >>> visible_pairs(0, 3), visible_pairs(2, 3)
    (6, 3)
    """
    return (end * (end + 1) - start * (start + 1)) // 2


def predicted(
    generation: str,
    *,
    host_us: float,
    is_bound_by_descriptors: bool,
    on_done: Callable[[ts.Job, float], None] | None = None,
) -> Cost:
    """Constants of a TPU generation, from the schedules that libtpu compiles for it.

    Products run at the peak rate and weights come at the peak bandwidth, so a step is at least as
    long as this and the writes' share of it at most as large.
    """
    layers = LLAMA3_8B.num_layers
    writes = write_model.predict(
        [_write_case(op, generation, size) for op, size in _write_ops()], on_done=on_done
    )
    core = {
        (p.case.op, p.case.page_size): layers * _us(p.schedule_cycles, generation) / p.num_dmas
        for p in writes
    }
    token = next(p for p in writes if p.case.op == "token")
    runs = {
        "short": ((_DECODES, 1, _SHORT),),
        "long": ((_DECODES, 1, _LONG),),
        "first": ((1, _CHUNK, _CHUNK),),
        "second": ((1, _CHUNK, 2 * _CHUNK),),
    }
    page_size = 16
    call = Call(
        **PRESETS["llama3-8b"], page_size=page_size, **room_for(list(runs.values()), page_size)
    )
    cases = {name: AttentionCase(name, generation, lens, call) for name, lens in runs.items()}
    pairs = attention_model.writing_pairs([cases["short"], cases["first"]])
    attended = attention_model.predict([*cases.values(), *itertools.chain(*pairs)], on_done=on_done)
    us = {p.case.name: layers * p.microseconds for p in attended[: len(cases)]}
    fused = attended[len(cases) :]
    decode_cycles, page_cycles = (
        attention_model.Writing(*pair).extra_cycles
        for pair in zip(fused[::2], fused[1::2], strict=True)
    )
    decode_key_us = (us["long"] - us["short"]) / (_DECODES * (_LONG - _SHORT))
    pair_us = (us["second"] - us["first"]) / _CHUNK**2
    hardware = ts.GENERATIONS[generation]
    flop_per_us = attention_model.FLOP_PER_CYCLE[generation] * hardware.clock_ghz * 1e3
    matrix, last = _matrix_sizes(LLAMA3_8B)
    return Cost(
        name=generation,
        source=f"predicted for {generation} from compiled schedules; products and weights at peak",
        host_us=host_us,
        weights_us=(matrix + last) * 2 / hardware.hbm_gb_per_s * 1e-3,
        row_us=2 * matrix / flop_per_us,
        seq_us=2 * last / flop_per_us,
        decode_us=us["short"] / _DECODES - _SHORT * decode_key_us,
        decode_key_us=decode_key_us,
        prefilled_us=us["first"] / _CHUNK - visible_pairs(0, _CHUNK) / _CHUNK * pair_us,
        pair_us=pair_us,
        written_us=layers * _us(token.hbm_cycles, generation) / _WRITTEN,
        page_us={size: core["page_starts", size] for size in PAGE_SIZES},
        slice_us={size: core["slice", size] for size in PAGE_SIZES},
        token_us=core["token", 1],
        fused_us=(
            layers * _us(decode_cycles, generation),
            layers * _us(page_cycles / page_size, generation),
        ),
        descriptor_us=layers * write_model.DESCRIPTOR_NS * 1e-3 if is_bound_by_descriptors else 0.0,
    )


def fitted(file: str, *, host_us: float | None = None) -> Cost:
    """Constants of a device on which `--parts=real --json` measured this model.

    Raises:
      OSError: there is no such file.
      ValueError: it is no such record.
    """
    try:
        record = json.loads(pathlib.Path(file).read_text())
        fit = dict(record["real"]["fit"])
        for name in ("page_us", "slice_us"):
            fit[name] = {int(size): value for size, value in fit[name].items()}
        fit["fused_us"] = tuple(fit["fused_us"])
        cost = Cost(**fit)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file}: no measurement that costs can be taken from ({error!r}); make one with"
            " `python -m bench.engine --parts=real --json` on the device"
        ) from error
    return cost if host_us is None else dataclasses.replace(cost, host_us=host_us)


def _matrix_sizes(model: ModelConfig) -> tuple[int, int]:
    """Numbers in all matrices of the layers, and in the last projection."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    layer = model.hidden_size * (heads * model.head_dim + 3 * model.intermediate_size)
    return model.num_layers * layer, model.hidden_size * model.vocab_size


def _write_ops() -> Sequence[tuple[str, int]]:
    return [*((op, size) for op in ("page_starts", "slice") for size in PAGE_SIZES), ("token", 1)]


def _write_case(op: str, generation: str, page_size: int) -> WriteCase:
    return WriteCase(
        op,
        generation,
        page_size,
        _WRITTEN,
        LLAMA3_8B.num_kv_heads,
        LLAMA3_8B.head_dim,
        LLAMA3_8B.dtype,
    )


def _us(cycles: float, generation: str) -> float:
    return ts.microseconds(cycles, generation)


def as_record(cost: Cost) -> dict[str, Any]:
    """For JSON."""
    return dataclasses.asdict(cost)
