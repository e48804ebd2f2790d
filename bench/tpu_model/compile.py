# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Compile for a TPU that is not there: libtpu does it on a CPU, here or in a quiet child process.

`aot_compile` compiles one function in this process, for tests that read the compiled HLO.
`compile_jobs` compiles many in one child process that dumps libtpu's final schedule, because
libtpu reads its dump flags once, when it is loaded, and logs to the terminal as it works.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The smallest topology of each generation for which libtpu has a description.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
# What jax calls a device of each generation, and the cores that it is programmed as.
DEVICES = {
    "v4": ("TPU v4", 1),
    "v5e": ("TPU v5 lite", 1),
    "v5p": ("TPU v5", 2),
    "v6e": ("TPU v6 lite", 1),
    "tpu7x": ("TPU7x", 1),
}
# What a process needs in its environment, before it loads libtpu, to compile without a TPU.
COMPILE_ENV = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask a cloud metadata server which TPU this is
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # a second process would die on libtpu's lock file
}
# Of the ~70 files that libtpu dumps per kernel, the two that bench.tpu_model.schedule reads.
_KEPT = ("packed-bundles-post-ra.txt", "pre-delay_hlo-static-per-bundle-utilization.txt")
_LOG_TAIL_LINES = 40


@dataclasses.dataclass(frozen=True)
class Job:
    """One thing to compile in the child process.

    Attributes:
      name: how the result is found again; unique in a list of jobs.
      target: `"module:function"`, imported in the child. It is called with `kwargs` and returns
        `(fn, args, jit_kwargs)`: see `aot_compile`.
      generation: a key of `TOPOLOGIES`.
      kwargs: plain values (they travel as JSON: a tuple arrives as a list).
    """

    name: str
    target: str
    generation: str
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_generation(self.generation)
        if self.target.count(":") != 1:
            raise ValueError(f"Job: target is {self.target!r}; it must be 'module:function'")


@dataclasses.dataclass(frozen=True)
class Dump:
    """What the child process left of one job.

    Attributes:
      job: the job.
      hlo: text of the compiled module.
      files: file name -> text of libtpu's schedule dumps, kernels in the order they were compiled.
      seconds: what lowering and compiling took.
    """

    job: Job
    hlo: str
    files: Mapping[str, str]
    seconds: float


def mesh_of(generation: str, axes: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of chips (on tpu7x: cores) of a TPU generation that need not be there.

    Args:
      generation: a key of `TOPOLOGIES`.
      axes: axis name -> size; one device when left out.

    Raises:
      ValueError: unknown generation, or more devices than the topology has.
      RuntimeError: libtpu is not installed.
    """
    _check_generation(generation)
    axes = dict(axes or {"x": 1})
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=TOPOLOGIES[generation]
        ).devices
    except Exception as e:
        raise RuntimeError(
            f"no TPU compiler for {generation} (pip install 'pallas-paged[tpu]'): {e}"
        ) from e
    wanted = math.prod(axes.values())
    if wanted > len(devices):
        raise ValueError(
            f"mesh_of: axes {axes} want {wanted} devices; {TOPOLOGIES[generation]} has"
            f" {len(devices)}"
        )
    return Mesh(np.array(devices[:wanted]).reshape(tuple(axes.values())), tuple(axes))


def as_if_on(generation: str) -> Any:
    """A context in which jax traces for a device of a generation; needs no libtpu.

    Raises:
      ValueError: unknown generation.
    """
    _check_generation(generation)
    kind, cores = DEVICES[generation]
    device = jax.sharding.AbstractDevice(kind, cores, "tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def aot_compile(
    fn: Callable,
    args: Sequence[Any],
    generation: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    jit_kwargs: Mapping[str, Any] | None = None,
    axes: Mapping[str, int] | None = None,
    specs: Sequence[PartitionSpec] | None = None,
) -> jax.stages.Compiled:
    """Compiles a function for a TPU generation, in this process, on a CPU.

    The process must have `COMPILE_ENV` in its environment. The function is lowered with the
    abstract mesh of the topology as context, so `pltpu.get_tpu_info()` knows the chip while it is
    traced and `jax.shard_map` needs no `mesh`.

    Args:
      fn: a function, or one that is already jitted: then its own donation and static arguments
        hold. (A lambda or partial around a jitted function loses them: give `jit_kwargs`.)
      args: pytrees of `jax.ShapeDtypeStruct`, of global shapes.
      generation: a key of `TOPOLOGIES`.
      kwargs: passed to `fn` by keyword as they are (static arguments of a jitted `fn`).
      jit_kwargs: passed to `jax.jit` (`donate_argnums`, ...); only for an `fn` not yet jitted.
      axes: axis name -> size of the mesh; one device when left out.
      specs: one PartitionSpec per element of `args`; replicated when left out.

    Returns:
      The compiled function: `.as_text()` is its HLO, `.memory_analysis()` its memory.

    Raises:
      ValueError: an argument makes no sense.
      RuntimeError: libtpu is not installed.
    """
    mesh = mesh_of(generation, axes)
    specs = [PartitionSpec()] * len(args) if specs is None else list(specs)
    if len(specs) != len(args):
        raise ValueError(f"aot_compile: {len(specs)} specs for {len(args)} args; want one each")
    if not hasattr(fn, "lower"):
        fn = jax.jit(fn, **dict(jit_kwargs or {}))
    elif jit_kwargs:
        raise ValueError(
            f"aot_compile: fn is already jitted, jit_kwargs {dict(jit_kwargs)} would be lost; jit"
            " it with them or pass the plain function"
        )
    placed = [
        _placed(arg, NamedSharding(mesh, spec)) for arg, spec in zip(args, specs, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return fn.lower(*placed, **dict(kwargs or {})).compile()


def _placed(arg: Any, sharding: NamedSharding) -> Any:
    """The pytree of ShapeDtypeStructs with a sharding on each."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arg)


def compile_jobs(
    jobs: Sequence[Job], *, on_done: Callable[[Job, float], None] | None = None
) -> list[Dump]:
    """Compiles jobs in one child process and returns libtpu's schedule dumps, in order.

    Nothing that libtpu prints reaches this process's stdout or stderr.

    Args:
      jobs: what to compile; names must differ.
      on_done: called after each job with the job and its seconds (for progress).

    Raises:
      ValueError: two jobs have one name.
      RuntimeError: a job failed; the message holds its error and the end of libtpu's log.
    """
    jobs = list(jobs)
    if len({job.name for job in jobs}) != len(jobs):
        raise ValueError(f"compile_jobs: names must differ, got {sorted(j.name for j in jobs)}")
    if not jobs:
        return []
    with tempfile.TemporaryDirectory(prefix="tpu_schedule_") as folder:
        root = pathlib.Path(folder)
        (root / "dump").mkdir()
        (root / "jobs.json").write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
        with (root / "log.txt").open("w") as log:
            process = subprocess.Popen(
                # -P: only PYTHONPATH decides where modules come from, as in this process.
                [sys.executable, "-P", "-m", "bench.tpu_model.compile", folder],
                env=_child_env(root / "dump"),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            dumps = _collect(process, jobs, root, on_done)
        finally:
            process.kill()  # no effect once it has ended
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    return dumps


def _collect(
    process: subprocess.Popen[str],
    jobs: Sequence[Job],
    root: pathlib.Path,
    on_done: Callable[[Job, float], None] | None,
) -> list[Dump]:
    """Reads the child's line of JSON per job; its end without one is an error."""
    dumps = []
    assert process.stdout is not None
    for index, job in enumerate(jobs):
        line = process.stdout.readline()
        died = {"error": "the compiling process died", "seconds": 0.0}
        report: dict[str, Any] = json.loads(line) if line else died
        if report["error"]:
            log = (root / "log.txt").read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
            raise RuntimeError(
                f"compiling {job.name} for {job.generation} failed:\n{report['error']}\n"
                f"end of libtpu's log:\n" + "\n".join(log)
            )
        folder = root / str(index)
        files = {p.name: p.read_text() for p in sorted(folder.glob("*.txt"))}
        dumps.append(Dump(job, (folder / "hlo").read_text(), files, report["seconds"]))
        if on_done is not None:
            on_done(job, report["seconds"])
    return dumps


def _child_env(dump: pathlib.Path) -> dict[str, str]:
    """This process's environment, with what the child must see before libtpu loads."""
    # sys.path need not name it: an editable install may find this package by an import hook.
    here = str(pathlib.Path(__file__).resolve().parent.parent.parent)
    return (
        dict(os.environ)
        | COMPILE_ENV
        | {
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
            "PYTHONPATH": os.pathsep.join([here] + [os.path.abspath(p) for p in sys.path]),
        }
    )


def _child(folder: str) -> None:
    """Compiles the jobs of `folder/jobs.json`, each into a folder of its own."""
    # libtpu's C++ logging must not mix with the lines of JSON: stdout becomes stderr, the log.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    root = pathlib.Path(folder)
    for index, fields in enumerate(json.loads((root / "jobs.json").read_text())):
        began, error = time.perf_counter(), None
        try:
            hlo = _compile_job(Job(**fields))
        except Exception as e:
            error = f"{type(e).__name__}: {e}"
        else:
            _keep(root / "dump", root / str(index))
            (root / str(index) / "hlo").write_text(hlo)
        report = {"error": error, "seconds": time.perf_counter() - began}
        print(json.dumps(report), file=reports, flush=True)
        if error:
            return


def _compile_job(job: Job) -> str:
    module, function = job.target.split(":")
    fn, args, jit_kwargs = getattr(importlib.import_module(module), function)(**job.kwargs)
    return aot_compile(fn, args, job.generation, jit_kwargs=jit_kwargs).as_text() or ""


def _keep(dump: pathlib.Path, folder: pathlib.Path) -> None:
    """Moves the files that matter out of the dump folder and deletes the rest (4 MB a kernel).

    Emptying the folder between jobs is what tells equal kernel names of two jobs apart.
    """
    folder.mkdir()
    for path in list(dump.iterdir()):
        if path.name.endswith(_KEPT) and "schedule-analysis" not in path.name:
            path.rename(folder / path.name)
        else:
            path.unlink()


def _check_generation(generation: str) -> None:
    if generation not in TOPOLOGIES:
        raise ValueError(f"generation is {generation!r}; must be one of {list(TOPOLOGIES)}")


if __name__ == "__main__":
    _child(sys.argv[1])
