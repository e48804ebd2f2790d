# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which shapes are compiled, which shape a step takes, and the threads that compile the others.

XLA compiles without Python's global lock, so that multiple threads compile at a time, and beside
the thread that serves. Tracing a step and lowering it is Python: one thread does it at a time.
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from reference_engine.batch import (
    BatchShape,
    batch_shapes,
    fitting_shapes,
    make_batch_of,
    max_num_seqs,
    num_logit_rows,
    pack,
    pad_tokens,
)
from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.model import StepOptions, lower_step
from reference_engine.sampler import run_every_program
from reference_engine.weights import Params

# Lowers the model's program of a shape; returns what compiles it, and then what compiles others.
Lower = Callable[[BatchShape], Sequence[Callable[[], None]]]

_MAX_THREADS = 8  # more of them would mostly wait for one another to lower


def lowering(
    params: Params,
    kv_pages: jax.Array,
    last_tokens: jax.Array,
    model: ModelConfig,
    config: EngineConfig,
) -> Lower:
    """How the programs of a step are made: the model's, and the sampler's for its sequences.

    A compiled program goes to the cache of the jitted function, where the steps find it.

    Args:
      params: the model's parameters, of which only the shapes and places are kept.
      kv_pages: the pool, as the parameters.
      last_tokens: as long as the tokens that a step passes on to the next one.
      model: the shape of the model.
      config: the engine's.
    """
    params, pool = jax.tree.map(_struct, (params, kv_pages))
    table_shape = (max_num_seqs(config), config.max_pages_per_seq)
    page_table = jax.ShapeDtypeStruct(table_shape, jnp.int32)
    device: Any = jax.config  # its flags are attributes, which not every jax declares
    device = device.jax_default_device
    sampled: set[int] = set()  # the numbers of rows for which the sampler is compiled

    def lower(shape: BatchShape) -> Sequence[Callable[[], None]]:
        with _on(device):
            packed, spec = pack(make_batch_of(shape, (), config)[:-1])
            lowered = lower_step(
                params,
                pool,
                page_table,
                _struct(packed),
                _struct(last_tokens),
                spec=spec,
                model=model,
                options=StepOptions.of(config, is_decode=shape.is_decode),
            )
        num_rows = num_logit_rows(shape.num_seqs)
        is_first = num_rows not in sampled
        sampled.add(num_rows)

        def compile_model() -> None:
            with _on(device):
                lowered.compile()

        def compile_sampler() -> None:
            with _on(device):
                logits = jnp.zeros((num_rows, model.vocab_size), jnp.float32)
                run_every_program(logits, config.max_model_len, last_tokens)
                pad_tokens(jnp.zeros(num_rows, jnp.int32), len(last_tokens))

        return [compile_model, compile_sampler] if is_first else [compile_model]

    return lower


class Programs:
    """The programs of an engine's shapes.

    A shape is ready once its programs are compiled; the first one already with the model's, because
    the first token waits for it, and may need only one of the sampler's. Without threads nothing is
    prepared: a step takes the smallest shape that holds it, and compiles it if need be.
    """

    def __init__(self, config: EngineConfig, lower: Lower) -> None:
        """Compiles nothing.

        Args:
          config: it gives the shapes.
          lower: see `lowering`.
        """
        self._config = config
        self._lower = lower
        self._changed = threading.Condition()  # guards what follows
        self._queue: collections.deque[BatchShape] = collections.deque()
        self._begun: set[BatchShape] = set()
        self._ready: set[BatchShape] = set()
        self._failed: set[BatchShape] = set()
        self._lowering = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Lets threads compile every shape, the most useful first. They end by themselves."""
        shapes = most_useful_first(batch_shapes(self._config))
        self._queue.extend(shapes)
        _running.add(self)
        for number in range(_num_threads(len(shapes))):
            thread = threading.Thread(
                target=self._work, name=f"compiles shapes, {number}", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def choose(self, num_tokens: int, num_seqs: int) -> BatchShape:
        """The shape for a step with this number of tokens and sequences.

        It is the smallest shape that is ready and holds the step. If none is ready, the call waits
        for the first. If the smallest shape is not ready, it is the next that a thread compiles.
        If a thread has failed at the smallest shape, or nobody compiles, the step gets that shape
        and compiles it itself, so that an error is raised where the shape is needed.
        """
        fitting = fitting_shapes(num_tokens, num_seqs, self._config)
        smallest = fitting[0]
        with self._changed:
            while self._queue or self._begun:
                if smallest in self._failed:
                    break
                if smallest in self._queue:
                    self._queue.remove(smallest)
                    self._queue.appendleft(smallest)
                ready = next((shape for shape in fitting if shape in self._ready), None)
                if ready is not None:
                    return ready
                if not any(shape in self._begun or shape in self._queue for shape in fitting):
                    break
                self._changed.wait()
        return smallest

    def compile_all(self, on_shape: Callable[[BatchShape], None] | None = None) -> None:
        """Compiles every shape, and returns when all of them are ready.

        Args:
          on_shape: called after each shape, in the calling thread.
        """
        self.close()  # this thread lowers what is left
        on_shape = on_shape or (lambda shape: None)
        shapes = []
        for shape in most_useful_first(batch_shapes(self._config)):
            if shape in self._ready:
                on_shape(shape)
            else:
                shapes.append(shape)
        executor = concurrent.futures.ThreadPoolExecutor(_num_threads(len(shapes)))
        try:
            futures = {executor.submit(_call_all, self._lower(shape)): shape for shape in shapes}
            for future in concurrent.futures.as_completed(futures):
                future.result()
                on_shape(futures[future])
        finally:
            executor.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """Lets each thread end after the shape that it compiles now."""
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """As `stop`, and waits for the threads."""
        self.stop()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            stages, is_ready = None, False
            with self._lowering:
                with self._changed:
                    if not self._queue:
                        return
                    shape = self._queue.popleft()
                    self._begun.add(shape)
                with contextlib.suppress(BaseException):  # the step that needs the shape raises it
                    stages = self._lower(shape)
            if stages is not None:
                with contextlib.suppress(BaseException):
                    stages[0]()
                    if not self._ready:
                        self._add(self._ready, shape)
                    _call_all(stages[1:])
                    is_ready = True
            self._add(self._ready if is_ready else self._failed, shape)
            with self._changed:
                self._begun.remove(shape)
                self._changed.notify_all()

    def _add(self, shapes: set[BatchShape], shape: BatchShape) -> None:
        with self._changed:
            shapes.add(shape)
            self._changed.notify_all()


def _call_all(stages: Sequence[Callable[[], None]]) -> None:
    for stage in stages:
        stage()


def most_useful_first(shapes: Sequence[BatchShape]) -> list[BatchShape]:
    """The largest shape of each kind, then the one in the middle, then the quarters, and so on.

    So early on every step finds a shape that holds it, and soon one that is not much larger.

    >>> config = EngineConfig(max_num_batched_tokens=64, max_num_seqs=4)
    >>> order = most_useful_first(batch_shapes(config))
    >>> [(s.num_tokens, s.num_seqs) for s in order]
    [(80, 4), (4, 4), (32, 4), (2, 2), (16, 4), (1, 1), (64, 4)]
    """
    kinds = [[s for s in shapes if s.is_decode == is_decode] for is_decode in (False, True)]
    pairs = itertools.zip_longest(*map(_halved, kinds))
    return [shape for pair in pairs for shape in pair if shape is not None]


def _halved(shapes: Sequence[BatchShape]) -> Iterator[BatchShape]:
    """The last, then the last of the first half, then those of the quarters, and so on."""
    seen, parts = set(), [(0, len(shapes))] if shapes else []
    for start, end in parts:  # it grows
        if end - 1 not in seen:
            yield shapes[end - 1]
        seen.add(end - 1)
        if end - start > 1:
            middle = (start + end + 1) // 2
            parts += [(start, middle), (middle, end)]


def _num_threads(num_shapes: int) -> int:
    return max(1, min(_MAX_THREADS, num_shapes, os.cpu_count() or 1))


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    """The shape of an array, and its place if it is bound to one."""
    sharding = x.sharding if getattr(x, "committed", False) else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _on(device: Any) -> contextlib.AbstractContextManager[Any]:
    """A thread does not inherit the device that another thread has chosen."""
    return contextlib.nullcontext() if device is None else jax.default_device(device)


_running: weakref.WeakSet[Programs] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Waits for XLA in the threads of the process, because jax frees what they use at exit."""
    for programs in list(_running):
        programs.close()
